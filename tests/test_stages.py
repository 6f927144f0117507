"""Every stage after another from the console, and again from the parameters that it wrote."""

import json

import yaml
from softpref.cli import main
from softpref.config import build_config, read_mapping, write_parameters
from softpref.data.config import DataConfig
from softpref.evaluation.config import EvaluationConfig
from softpref.lm.checkpoints import seal_checkpoint
from softpref.registry.config import RegistryConfig
from softpref.sft.config import SFTConfig

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def printed(capsys):
    text = capsys.readouterr().out
    return json.loads(text[text.rindex("{\n") :])


def test_stages_follow_one_another_from_data_to_registry(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    config = tmp_path / "sft.yaml"
    config.write_text(
        json.dumps({"model_config": TINY, "vocab_size": 600, "max_completion_length": 32}), encoding="utf-8"
    )
    shared = ["--use_cpu", "--disable_tqdm", "true", "--per_device_train_batch_size", "16"]

    data = ["data", "--output", "dataset", "--rows", "200", "--sft_rows", "200"]
    assert main([*data, "--test_fraction", "0.17"]) == 0  # ten prompts or more, for intervals
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
    capsys.readouterr()
    assert main([*train, *options, *shared, *kept]) == 0
    trained = printed(capsys)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    metadata = json.loads((tmp_path / "policy/softpref.json").read_text(encoding="utf-8"))
    assert (metadata["method"], metadata["alpha"]) == ("spo", 0.5)
    assert (tmp_path / "policy/model.safetensors").is_file()
    assert not (tmp_path / "policy/checkpoints").exists()
    ran = yaml.safe_load((tmp_path / "policy/parameters.yaml").read_text(encoding="utf-8"))
    assert (ran["alpha"], ran["samples_per_refresh"], ran["lora_r"], ran["max_steps"]) == (0.5, 16, 16, 3)
    assert not {"output_dir", "hub_token", "resume_from_checkpoint"} & set(ran)

    again = tmp_path / "again.yaml"  # what the stage wrote beside its model, and its folders
    again.write_text(
        yaml.safe_dump({**ran, "dataset": "dataset", "reference": "reference", "output": "again"})
    )
    assert main(["train", "--config", str(again)]) == 0
    assert yaml.safe_load((tmp_path / "again/parameters.yaml").read_text()) == ran
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("policy", "again")]
    assert weights[0] == weights[1]

    capsys.readouterr()
    assert main([*train, *options, *shared]) == 0  # the same again is the same
    assert printed(capsys) == trained
    assert main([*train, *options, *shared, "--seed", "9"]) == 2
    assert "a finished model already, of something else (seed: 42 there, 9 here)" in capsys.readouterr().err
    started = tmp_path / "started/checkpoints"  # as an earlier run from another reference leaves it
    (started / "checkpoint-2").mkdir(parents=True)
    (started / "checkpoint-2" / "training_loss.json").write_text('{"summed_loss": 1}')
    seal_checkpoint(started / "checkpoint-2")
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
    written = {
        "dataset": DataConfig,
        "reference": SFTConfig,
        "evaluation": EvaluationConfig,
        "decision": RegistryConfig,
    }
    for folder, config in written.items():
        parameters = read_mapping(tmp_path / folder / "parameters.yaml")
        write_parameters(build_config(config, parameters), tmp_path / "again")
        assert read_mapping(tmp_path / "again/parameters.yaml") == parameters
    assert decision["registered"]
    assert decision["aliases"] == ["challenger", "champion"]
