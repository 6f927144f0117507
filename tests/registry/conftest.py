"""Tiny models with known odds and their evaluation folders; nothing here is trained."""

import json

import pytest

STORE_NAMES = ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    for name in STORE_NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def write_model():
    return _write_model


@pytest.fixture(scope="session")
def write_evaluation():
    return _write_evaluation


def _write_model(folder, *, seed=0, generation=None, chat=False, **metadata):
    """A two-layer Llama with a byte-level vocabulary whose next-token odds are far from uniform."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    text = Tokenizer(models.BPE())
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = decoders.ByteLevel()
    letters = [
        letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter.isascii() and letter.isalpha()
    ]
    text.train_from_iterator(
        ["a small fox went home"],
        trainers.BpeTrainer(
            vocab_size=80,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=sorted(letters),
            show_progress=False,
        ),
    )
    text.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    if chat:
        tokenizer.chat_template = (
            "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
        )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            initializer_range=0.1,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    model.generation_config = GenerationConfig(
        **(sampling if generation is None else generation), bos_token_id=0, eos_token_id=1, pad_token_id=1
    )
    model.save_pretrained(folder)
    contents = {"stage": "train", "method": "spo", "alpha": 0.5, "beta": 0.05, "name": "alpha-0.5"}
    contents |= {"dataset_hash": "d" * 64, "code_version": "0.1.0", "run_id": None, "adapter": False}
    contents |= {"max_prompt_length": 32, "max_completion_length": 12, **metadata}
    (folder / "softpref.json").write_text(json.dumps(contents))
    return folder


def _write_evaluation(folder, *, win_rate=(0.7, 0.65, 0.75), kl=(2.0, 1.8, 2.2), **changes):
    def figure(values, unit):
        return {"value": values[0], "low": values[1], "high": values[2], "n": 400, "unit": unit}

    contents = {
        "name": "alpha-0.5",
        "method": "spo",
        "alpha": 0.5,
        "beta": 0.05,
        "rounds": 1,
        "train_on": "preferences",
        "extrapolation": 0.0,
        "model_uri": "",
        "run_id": None,
        "dataset_hash": "d" * 64,
        "evaluation_id": "e" * 16,
        "judge": {"name": "expert", "description": "the known reward", "accuracy": None},
        "metrics": {"win_rate": figure(win_rate, "share"), "kl_sequence": figure(kl, "nats")},
        "exact": {"entropy": figure((4.2, 4.1, 4.3), "nats")},
        "softmax_frontier": None,
        "by_prompt": {},
        "warnings": [],
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(contents))
    return folder
