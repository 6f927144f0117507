"""Mistakes that people make at the command line: each is answered with what to write, and at once."""

import fnmatch
import subprocess
import sys

import pytest
from softpref.cli import main

TRAIN = ["train", "--dataset", "d", "--reference", "r", "--output", "o"]
MISTAKES = [
    (["sweep", "--learning_rte", "1e-4"], "did you mean --learning-rate?"),
    ([*TRAIN, "--learning_rte", "1e-4"], "did you mean 'learning_rate'?"),
    (["sweep", "--lora-r", "8"], """write --train-overrides '{"lora_r": 8}'"""),
    (["sweep", "--train.lora_r", "8"], """write --train-overrides '{"lora_r": 8}'"""),
    (["sweep", "--alphas", "0.5,1,2"], "with spaces between them, as in --alphas 0.5 1.0 2.0"),
    (["sweep", "--alphas", "[0.5, 1]"], "with spaces between them, as in --alphas 0.5 1.0 2.0"),
    (["sweep", "--train-overrides", "{lora_r: 8}"], """train_overrides is not JSON"""),
    (["sweep", "--train-overrides", "{lora_r: 8}"], """write it like {"lora_r": 8}"""),
    (["sweep", "--lora_rank", "8"], """did you mean --train-overrides '{"lora_r": 8}'?"""),
    (["sweep", "--train-overrides", '{"lora_rank": 8}'], "did you mean 'lora_r'?"),
    (["sweep", "--train-overrides", '{"lora_r": 0}'], "lora_r must be at least 1, got 0"),
    ([*TRAIN, "--lora_rank", "8"], "did you mean 'lora_r'?"),
    ([*TRAIN, "--lora_r", "0"], "lora_r must be at least 1, got 0"),
    (["sweep", "--columns", "chosen=better"], """write it like {"chosen": "better"}"""),
    (
        ["data", "--output", "o", "--columns", "chosen=better"],
        """write it as JSON, like {"chosen": "better"}""",
    ),
    (
        ["data", "--output", "o", "--tracking_uri", "u"],
        "softpref sft, softpref train, softpref judge, softpref evaluate",
    ),
    (["sweep", "--resume_from_checkpoint", "X"], "when the same command is given again"),
    ([*TRAIN, "--resume_from_checkpoint", "X"], "when the same command is given again"),
    (["sweep", "--recipe", "onw"], "did you mean 'own'?"),
    (["sweep", "--baselines", "dpo=0.1"], "write METHOD:BETA, such as dpo:0.1; did you mean 'dpo'?"),
    (["sweep", "--baselines", "ppo:0.1"], "write METHOD:BETA, such as dpo:0.1; did you mean "),
    (["sweep", "--source", "owner/pairs"], "data_overrides has votes and story_kind: settings"),
    (["sweep", "--source", "owner/pairs"], "use the recipe own (--recipe own"),
    (["sweep", "--precompute-ref-log-probs", "true"], """--train-overrides '{"reference_cache": "…"}'"""),
    (["sweep", "--use_weighting", "true"], """--train-overrides '{"weight_exponent": "…"}'"""),
    (["compile", "swep"], "did you mean 'sweep'?"),
    (["compare", "a", "--outptu", "o"], "--output"),
]


def error_of(arguments, capsys):
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "says"), MISTAKES)
def test_a_mistake_is_answered_with_what_to_write(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in error_of(arguments, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file", "file/below", f"{'x' * 300}"])
def test_a_place_where_no_folder_can_be_is_one_line(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["sweep", "--output", place]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert place in line


def test_a_warning_of_the_parameters_is_said_once(capsys, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = ["--source", "owner/pairs", "--base-model", "owner/name", "--output", "own.yaml"]
    assert main(["compile", "sweep", "--recipe", "own", "--anchor", "0", *own]) == 0
    assert (caplog.text + capsys.readouterr().err).count("anchor is 0, the method as published") == 1


def test_gpus_that_this_machine_lacks_are_refused_at_once(capsys, monkeypatch):
    monkeypatch.setattr("softpref.pipelines.local.glob", lambda pattern: [])
    monkeypatch.setattr("sys.platform", "linux")
    assert "gpus is 1, and this machine has none" in error_of(["sweep", "--gpus", "1"], capsys)
    monkeypatch.setattr(
        "softpref.pipelines.local.glob", lambda pattern: fnmatch.filter(["/dev/nvidia0"], pattern)
    )
    assert "the GPUs would be held without being used" in error_of(["sweep", "--gpus", "1"], capsys)


@pytest.mark.parametrize("stage", ["sft", "train", "judge", "evaluate", "register"])
def test_tracking_uri_is_an_option_of_every_stage_that_tracks(stage, capsys):
    with pytest.raises(SystemExit):
        main([stage, "--help"])
    assert "--tracking_uri" in capsys.readouterr().out


def test_no_answer_waits_for_a_training_library(tmp_path):
    script = f"""
import contextlib, sys
from softpref.cli import main
for arguments in {[["sweep", "--help"], *(arguments for arguments, _ in MISTAKES)]!r}:
    with contextlib.suppress(SystemExit):
        main(arguments)
print(sorted({{"torch", "transformers", "mlflow", "datasets"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stdout + result.stderr


def test_completion_offers_every_option(tmp_path):
    script = subprocess.run(
        [sys.executable, "-m", "softpref", "completion"], capture_output=True, text=True, check=True
    ).stdout

    def offered(*words):
        asked = f"COMP_WORDS=(softpref {' '.join(words)}); COMP_CWORD={len(words)}; _softpref"
        command = ["bash", "-c", f'{script}\n{asked}; printf "%s\\n" "${{COMPREPLY[@]}}"']
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert offered("sw") == ["sweep"]
    assert offered("compile", "s") == ["sweep"]
    assert offered("compile", "''")[:3] == ["sweep", "run", "components"]
    assert offered("sweep", "com") == ["compile", "components"]
    assert offered("train", "--lora_") == ["--lora_r", "--lora_alpha", "--lora_target_modules"]
    assert "--train-overrides" in offered("sweep", "--t")
    assert offered("compare", "a", "--sel") == ["--selection_rule"]
