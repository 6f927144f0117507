"""The console command: every stage without KFP, from a file or from --key value."""

import json
import subprocess
import sys

import pytest
from softpref.cli import main

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def test_help_loads_no_training_library():
    script = (
        "import sys\nfrom softpref.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'mlflow', 'kfp', 'yaml'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.strip().endswith("[]"), result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data", "--output", "x", "--sourc", "story"], "did you mean 'source'"),
        (["data", "--output", "x", "story"], "belongs to no parameter"),
        (["data", "--output", "x", "--config", "none.yaml"], "does not exist"),
        (["sft", "--dataset", "x", "--output", "y"], "base_model"),
        (
            ["train", "--dataset", "x", "--reference", "r", "--output", "y", "--top_p", "0.5"],
            "top_p must be 1",
        ),
        (
            ["train", "--dataset", "x", "--reference", "r", "--output", "y", "--output_dir", "z"],
            "--output names",
        ),
        (["track-sync", "no-such-folder"], "no-such-folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error


def test_an_output_that_cannot_be_written_is_one_line_too(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["data", "--output", str(tmp_path / "file" / "dataset"), "--rows", "20"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert str(tmp_path / "file") in error


def test_stages_follow_one_another_from_data_to_registry(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    config = tmp_path / "sft.yaml"
    config.write_text(
        json.dumps({"model_config": TINY, "vocab_size": 600, "max_completion_length": 32}), encoding="utf-8"
    )
    shared = ["--use_cpu", "--disable_tqdm", "true", "--per_device_train_batch_size", "16"]

    assert main(["data", "--output", "dataset", "--rows", "200", "--sft_rows", "200"]) == 0
    assert (
        main(["sft", "--dataset", "dataset", "--output", "reference", "--config", str(config), *shared]) == 0
    )
    train = ["train", "--dataset", "dataset", "--reference", "reference", "--output", "policy"]
    options = [
        "--alpha",
        "0.5",
        "--samples-per-refresh=16",
        "--max_completion_length",
        "24",
        "--max_steps",
        "3",
    ]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work", encoding="utf-8")
    kept = ["--checkpoint-dir", "mine", "--save_steps", "2"]
    assert main([*train, *options, *shared, *kept]) == 0
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    metadata = json.loads((tmp_path / "policy/softpref.json").read_text(encoding="utf-8"))
    assert (metadata["method"], metadata["alpha"]) == ("spo", 0.5)
    assert (tmp_path / "policy/model.safetensors").is_file()
    assert not (tmp_path / "policy/checkpoints").exists()

    assert main([*train, *options, *shared]) == 2
    assert "finished model" in capsys.readouterr().err
    started = tmp_path / "started/checkpoints"  # as an earlier run from another reference leaves it
    (started / "checkpoint-2").mkdir(parents=True)
    (started / "checkpoint-2/trainer_state.json").write_text('{"global_step": 2}', encoding="utf-8")
    (started / "run.json").write_text('{"reference": "other"}', encoding="utf-8")
    assert main([*train[:-1], "started", *options, *shared]) == 2
    assert "reference: 'other' there, 'reference' here" in capsys.readouterr().err
    (tmp_path / "dataset/dataset_dict.json").rename(tmp_path / "kept.json")
    assert main([*train[:-1], "anew", *options, *shared]) == 2
    assert "holds no dataset_dict.json" in capsys.readouterr().err
    (tmp_path / "kept.json").rename(tmp_path / "dataset/dataset_dict.json")

    folders = ["--dataset", "dataset", "--reference", "reference", "--policy", "policy"]
    quick = ["--samples_per_prompt", "2", "--exact_prompts", "1", "--bootstrap_samples", "100"]
    assert main(["evaluate", *folders, "--output", "evaluation", *quick]) == 0
    capsys.readouterr()
    gate = ["--registered_model_name", "tiny", "--min_win_rate", "0"]
    assert (
        main(["register", "--policy", "policy", "--evaluation", "evaluation", "--output", "decision", *gate])
        == 0
    )
    decision = json.loads(capsys.readouterr().out)
    assert decision["registered"]
    assert decision["aliases"] == ["challenger", "champion"]
