"""The console command: every stage without KFP, from a file or from --key value."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import softpref
import yaml
from softpref.cli import main
from softpref.config import write_parameters
from softpref.data.config import DataConfig
from softpref.evaluation.config import EvaluationConfig
from softpref.options import read_options

pytestmark = pytest.mark.fast

TRAIN = ["train", "--dataset", "x", "--reference", "r", "--output", "y"]
CONFIGURATIONS = {
    "data": "softpref.data.config.DataConfig",
    "sft": "softpref.sft.config.SFTConfig",
    "train": "softpref.spo.config.SPOConfig",
    "judge": "softpref.reward_model.config.RewardModelConfig",
    "evaluate": "softpref.evaluation.config.EvaluationConfig",
    "register": "softpref.registry.config.RegistryConfig",
}


@pytest.mark.parametrize("stage", CONFIGURATIONS)
def test_help_lists_every_option_with_its_default_as_the_class_has_it(stage, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100000")  # where a sentence takes one line
    with pytest.raises(SystemExit) as ended:
        main([stage, "--help"])
    assert ended.value.code == 0
    entries = re.findall(r"^  (--\w+)(.*(?:\n {24}.*)?)$", capsys.readouterr().out, re.MULTILINE)
    shown = {option: " ".join(text.split()) for option, text in entries}
    module, _, name = CONFIGURATIONS[stage].rpartition(".")
    for field in dataclasses.fields(getattr(importlib.import_module(module), name)):
        if not field.init or field.name in ("output_dir", "resume_from_checkpoint"):
            assert f"--{field.name}" not in shown
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        says = "(required)" if default is dataclasses.MISSING else f"(default: {json.dumps(default)})"
        assert shown[f"--{field.name}"].endswith(says)
        assert len(shown[f"--{field.name}"].split()) > 5, f"{field.name} has no sentence"


def test_choices_of_our_own_are_shown_and_checked_before_anything_is_imported():
    for place in CONFIGURATIONS.values():
        module, _, name = place.rpartition(".")
        own = [option for option in read_options(module, name).values() if not option.inherited]
        assert own
        assert typing.Any not in [option.hint for option in own]


def test_help_has_the_options_of_the_stage_before_those_of_transformers(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    order = ["--dataset", "options of the stage", "--alpha", "options of transformers", "--adam_beta1"]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    methods = "spo|dpo|rdpo|ipo|slic|ropo|apo_zero|apo_down|tdpo|tdpo1|simpo|cpo|orpo|kto|sppo"
    assert f"--method {methods}\n" in text


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"softpref {softpref.__version__}\n"


def test_help_and_refusals_load_no_training_library():
    script = f"""
import contextlib, sys
from softpref.cli import main
for arguments in {[["train", "--help"], [*TRAIN, "--alhpa", "1"], [*TRAIN, "--lora-r", "x"]]}:
    with contextlib.suppress(SystemExit):
        main(arguments)
print(sorted({{"torch", "transformers", "mlflow", "kfp", "datasets"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]"), result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data", "--output", "x", "--sourc", "story"], "did you mean 'source'"),
        (["data", "--output", "x", "story"], "belongs to no option"),
        (
            ["data", "--output", "x", "--tracking-uri", "u"],
            "no option 'tracking_uri'; softpref sft, softpref",
        ),
        (["data", "--output", "x", "--alpha", "1"], "no option 'alpha'; softpref train has it"),
        ([*TRAIN, "--learning_rte", "1e-4"], "did you mean 'learning_rate'"),
        ([*TRAIN, "--lora_rank", "8"], "did you mean 'lora_r'"),  # not 'local_rank' of transformers
        ([*TRAIN, "--gradient-acumulation-steps", "8"], "did you mean 'gradient_accumulation_steps'"),
        ([*TRAIN, "--num_epochs", "2"], "did you mean 'num_train_epochs'"),
        ([*TRAIN, "--batch-size", "2"], "or 'per_device_train_batch_size'?"),  # not evaluate's 'batch_size'
        ([*TRAIN, "--strictness", "2"], "softpref train has no option 'strictness'; --help lists all"),
        ([*TRAIN, "--tracking_url", "u"], "did you mean 'tracking_uri'"),
        (
            [*TRAIN, "--resume_from_checkpoint", "c"],
            "softpref train: resume_from_checkpoint must be left out",
        ),
        ([*TRAIN, "--resume_from_checkpoint", "c"], "continues from its last complete checkpoint"),
        ([*TRAIN, "--lora-r", "eight"], "softpref train: lora_r must be int, got 'eight'"),
        (["data", "--output", "x", "--columns", "a"], "softpref data: columns must be dict, got 'a'"),
        (["sft", *TRAIN[1:3], "--output", "y", "--epochs", "3"], "did you mean 'num_train_epochs'"),
        (["register", "--output", "x", "--model_name", "m"], "did you mean 'registered_model_name'"),
        ([*TRAIN, "--recipe", "convarg"], "did you mean 'config'"),
        ([*TRAIN, "--votes", "3"], "no option 'votes'; softpref data has it"),
        ([*TRAIN, "--alpha", "-1e-3"], "alpha must be at least 0"),
        (["data", "--output", "x", "--config", "none.yaml"], "does not exist"),
        (["sft", "--dataset", "x", "--output", "y"], "base_model"),
        ([*TRAIN, "--top_p", "0.5"], "top_p must be 1"),
        ([*TRAIN, "--output_dir", "z"], "--output names"),
        (["track-sync", "no-such-folder"], "no-such-folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error


def test_a_switch_leaves_the_next_word_alone(capsys):
    for arguments, says in (
        (["train", "--help", "lora_r"], "--lora_r"),
        (["--version", "train"], "softpref "),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        assert says in capsys.readouterr().out


@pytest.mark.parametrize("command", [["-m", "softpref.cli", "train"], ["pipelines/spo_sweep.py"]])
def test_help_is_printed_where_the_terminal_knows_few_characters(command):
    if command[0].startswith("pipelines"):
        pytest.importorskip("kfp", reason="kfp is not installed here; make setup installs it")
    result = subprocess.run(
        [sys.executable, *command, "--help"],
        capture_output=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert result.returncode == 0, result.stderr
    assert b"--learning" in result.stdout


def test_a_file_takes_underscores(tmp_path, capsys):
    (tmp_path / "train.yaml").write_text("lora-r: 1")
    assert main([*TRAIN, "--config", str(tmp_path / "train.yaml")]) == 2
    assert "no option 'lora-r'; did you mean 'lora_r'" in capsys.readouterr().err


def test_options_are_not_shortened(capsys):
    with pytest.raises(SystemExit):
        main(["track-sync", "folder", "--tracking", "u"])
    assert "unknown arguments: --tracking=u" in capsys.readouterr().err


def test_a_place_that_is_missing_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--dataset", "x"])
    assert ended.value.code == 2
    assert "it needs --reference, --output" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_one_line_too(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["data", "--output", str(tmp_path / "file" / "dataset"), "--rows", "20"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert str(tmp_path / "file") in error


def test_a_datasets_parameters_are_taken_again_escapes_and_all(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"question": f"q{n}", "chosen": "yes", "rejected": "no"}) + "\n" for n in range(20)
        )
    )
    template = [r"--prompt_template", r"a\nb \\n {question}"]
    assert main(["data", "--output", str(tmp_path / "one"), "--source", str(rows), *template]) == 0
    parameters = tmp_path / "one/parameters.yaml"
    assert main(["data", "--output", str(tmp_path / "two"), "--config", str(parameters)]) == 0
    stats = [json.loads((tmp_path / name / "stats.json").read_text()) for name in ("one", "two")]
    assert stats[0]["config"]["prompt_template"] == "a\nb \\n {question}"
    assert stats[0] == stats[1]
    assert parameters.read_text() == (tmp_path / "two/parameters.yaml").read_text()


def test_recorded_parameters_hold_no_password(tmp_path):
    def written(config):
        write_parameters(config, tmp_path)
        return yaml.safe_load((tmp_path / "parameters.yaml").read_text())

    evaluation = EvaluationConfig(tracking_uri="https://me:secret@host/mlflow")
    assert written(evaluation)["tracking_uri"] == "https://host/mlflow"
    template = "https://forum/?thread={thread}"  # words of a prompt, and no address
    columns = {"chosen": "https://me:secret@host/a?key=1", "rejected": "b"}
    data = DataConfig(source="rows.jsonl", prompt_template=template, columns=columns)
    assert written(data)["prompt_template"] == template
    assert written(data)["columns"]["chosen"] == "https://host/a"
