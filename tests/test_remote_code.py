"""A model whose code comes with its folder goes through every stage where it is trusted, and else nowhere."""

import json
import os
import sys

import pytest
import torch
from softpref.cli import main
from softpref.errors import ConfigError
from softpref.lm.loading import load_model, load_tokenizer, save_model_folder

CONFIGURATION = """
from transformers import LlamaConfig


class DoubledConfig(LlamaConfig):
    model_type = "doubled-llama"
"""
MODELING = """
from transformers import LlamaForCausalLM

from .configuration_doubled import DoubledConfig


class DoubledForCausalLM(LlamaForCausalLM):
    config_class = DoubledConfig

    def __init__(self, config):
        super().__init__(config)
        self.lm_head.register_forward_hook(lambda module, inputs, logits: 2 * logits)
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast


class OwnTokenizerFast(PreTrainedTokenizerFast):
    pass
"""
CODE = {"configuration_doubled.py", "modeling_doubled.py", "tokenization_own.py"}
TRUSTED = ["--trust_remote_code", "true"]
ROWS = [
    {"prompt": f"a {one} went", "chosen": f" home to {two}", "rejected": f" away {two}"}
    for one in ("fox", "hen", "cat", "dog", "owl", "pig", "cow", "bee", "ant", "elk")
    for two in ("eat", "sleep")
]
QUICK = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "bf16": False,
    "max_prompt_length": 32,
    "max_completion_length": 24,
}


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    """Code of a checkpoint is copied into a cache before it is imported: here one that goes with the test."""
    import transformers.dynamic_module_utils

    modules = str(tmp_path / "modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
    before = list(sys.path)
    yield
    sys.path[:] = before
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path, make_model, make_tokenizer):
    """A Llama whose logits its own code doubles: loaded as a plain Llama it computes something else."""
    tokenizer = make_tokenizer(chat_template=None)
    path = tmp_path / "own-code"
    save_model_folder(make_model(tokenizer), tokenizer, path, {"name": "own"})
    (path / "configuration_doubled.py").write_text(CONFIGURATION)
    (path / "modeling_doubled.py").write_text(MODELING)
    config = json.loads((path / "config.json").read_text())
    config |= {
        "model_type": "doubled-llama",
        "architectures": ["DoubledForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_doubled.DoubledConfig",
            "AutoModelForCausalLM": "modeling_doubled.DoubledForCausalLM",
        },
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenization_own.py").write_text(TOKENIZATION)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "OwnTokenizerFast"
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizerFast"]}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "softpref.json").unlink()
    return path


def logits(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=True)
    assert type(model).__name__ == "DoubledForCausalLM"
    return model(torch.tensor([[1, 7, 8]])).logits


def test_code_goes_with_what_is_saved_merged_and_extrapolated(folder, tmp_path):
    from peft import LoraConfig, get_peft_model
    from softpref.lm.extrapolation import write_extrapolations

    model = load_model(str(folder), trust_remote_code=True)
    tokenizer = load_tokenizer(str(folder), trust_remote_code=True)
    expected = logits(folder)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")  # zero at first
    adapted = get_peft_model(model, lora)
    save_model_folder(adapted, tokenizer, tmp_path / "adapter", {"adapter": True})
    merged = load_model(str(tmp_path / "adapter"), trust_remote_code=True)
    save_model_folder(merged, tokenizer, tmp_path / "merged", {"name": "merged"})
    write_extrapolations(
        merged, str(folder), tokenizer, tmp_path / "out", {"name": "x"}, [0.5], trust_remote_code=True
    )
    for saved in (tmp_path / "merged", tmp_path / "out" / "extrapolated-0.5"):
        assert {path.name for path in saved.iterdir()} >= CODE
        torch.testing.assert_close(logits(saved), expected)


def test_what_is_not_trusted_is_refused_by_name_before_it_is_loaded(folder, tmp_path):
    for load in (load_model, load_tokenizer):
        with pytest.raises(
            ConfigError, match=r"'doubled-llama'.*configuration_doubled\.py, modeling_doubled\.py"
        ):
            load(str(folder))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    (adapter / "adapter_model.safetensors").touch()
    with pytest.raises(ConfigError, match="set trust_remote_code to true"):
        load_model(str(adapter))


def test_code_beside_a_known_architecture_is_left_alone_unless_trusted(tmp_path, make_model, make_tokenizer):
    tokenizer = make_tokenizer()
    save_model_folder(make_model(tokenizer), tokenizer, tmp_path / "known", {})
    config = json.loads((tmp_path / "known" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_absent.LlamaForCausalLM"}
    (tmp_path / "known" / "config.json").write_text(json.dumps(config))
    assert load_model(str(tmp_path / "known")).__class__.__module__.startswith("transformers.models.llama")


def test_a_model_with_code_is_trained_measured_registered_and_served(
    folder, tmp_path, cache, monkeypatch, capsys
):
    import mlflow

    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(f"asked: {question}"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "quick.json").write_text(json.dumps(QUICK))
    assert main(["data", "--output", "dataset", "--source", "rows.jsonl", "--test_fraction", "0.3"]) == 0
    quick = ["--config", "quick.json"]
    sft = ["sft", "--dataset", "dataset", "--base_model", str(folder), *quick]
    train = ["train", "--dataset", "dataset", "--reference", "reference", *quick, "--extrapolation", "0.5"]
    train += ["--samples_per_refresh", "8"]
    evaluate = ["evaluate", "--dataset", "dataset", "--reference", "reference", "--policy", "policy"]
    evaluate += ["--samples_per_prompt", "2", "--bootstrap_samples", "100", "--exact_prompts", "0"]
    register = ["register", "--policy", "policy", "--evaluation", "evaluation", "--min_win_rate", "0"]
    register += ["--registered_model_name", "own"]
    for command, output in (
        (sft, "reference"),
        (train, "policy"),
        (evaluate, "evaluation"),
        (register, "decision"),
    ):
        capsys.readouterr()
        assert main([*command, "--output", output]) == 2
        assert "set trust_remote_code to true" in capsys.readouterr().err
        assert not (tmp_path / output).exists()
        assert main([*command, "--output", output, *TRUSTED]) == 0
    for saved in ("reference", "policy", "policy/extrapolated-0.5"):
        assert {path.name for path in (tmp_path / saved).iterdir()} >= CODE

    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])  # another test may have named its own
    served = mlflow.pyfunc.load_model("models:/own@challenger")
    (answer,) = served.predict({"prompt": "a fox went", "max_tokens": 4})
    assert isinstance(answer["choices"][0]["text"], str)
    pipeline = served.get_raw_model()
    assert type(pipeline.tokenizer).__name__ == "OwnTokenizerFast"
    torch.testing.assert_close(pipeline.model(torch.tensor([[1, 7, 8]])).logits, logits(tmp_path / "policy"))

    with pytest.raises(ConfigError, match="set trust_remote_code to true"):
        load_model("models:/own@challenger")
    again = load_model("models:/own@challenger", trust_remote_code=True)
    torch.testing.assert_close(again(torch.tensor([[1, 7, 8]])).logits, logits(tmp_path / "policy"))
    tokenizer = load_tokenizer("models:/own@challenger", trust_remote_code=True)
    assert type(tokenizer).__name__ == "OwnTokenizerFast"


def test_a_class_named_like_one_of_transformers_is_not_served_in_its_place(folder, tmp_path):
    from softpref.registry.served import passed_over

    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    config["auto_map"]["AutoModelForCausalLM"] = "modeling_doubled.LlamaForCausalLM"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="has the name of one in transformers"):
        passed_over(folder)
    config["model_type"] = "llama"
    (folder / "config.json").write_text(json.dumps(config))
    assert "transformers' own LlamaForCausalLM" in passed_over(folder)[0]


@pytest.mark.parametrize("stage", ["sft", "train", "evaluation", "registry"])
def test_one_parameter_of_the_pipeline_reaches_every_stage(stage, folder):
    from softpref.preflight.stage import plan

    parameters = {"alpha": 1.0, "beta": 0.05, "registered_model_name": "own", "base_model": str(folder)}
    with pytest.raises(ConfigError, match="set trust_remote_code to true"):
        plan(parameters)
    assert len(plan({**parameters, "trust_remote_code": True})) == 1
    with pytest.raises(ConfigError, match=f"{stage}_overrides must not hold trust_remote_code"):
        plan({**parameters, f"{stage}_overrides": {"trust_remote_code": True}})
