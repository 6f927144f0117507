"""A toy world for the trainer: prompts and completions of letters, a model with a token per letter."""

import random

import pytest
import torch

LETTERS = "abcdefgh"


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    return make_tokenizer(LETTERS)


@pytest.fixture
def model(make_model, tokenizer):
    return make_model(tokenizer, layers=2)


@pytest.fixture(scope="session")
def make_rows():
    return _make_rows


@pytest.fixture
def make_trainer(tmp_path, make_model, tokenizer):
    """`make_trainer(rows, **options) -> SPOTrainer` on the CPU, ready to train a fresh toy model."""

    def make(rows, *, model=None, output="run", trainer_options=None, **options):
        from softpref.spo import SPOConfig, SPOTrainer

        defaults = {
            "output_dir": str(tmp_path / output),
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "max_prompt_length": 16,
            "max_completion_length": 8,
            "samples_per_refresh": 24,
            "sampling_interval": 3,
            "num_train_epochs": 1,
            "seed": 3,
        }
        return SPOTrainer(
            make_model(tokenizer, layers=2) if model is None else model,
            SPOConfig(**{**defaults, **options}),
            train_dataset=rows,
            processing_class=tokenizer,
            **(trainer_options or {}),
        )

    return make


@pytest.fixture
def weights():
    """`weights(model) -> tensor`, all parameters as one vector."""

    def flatten(model):
        return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])

    return flatten


def _make_rows(count, *, sizes=(2,), soft=False, seed=0):
    """Preference rows of random letters, the completions of several lengths."""
    rng = random.Random(seed)

    def text(longest):
        return "".join(rng.choices(LETTERS, k=rng.randint(1, longest)))

    rows = []
    for number in range(count):
        size = sizes[number % len(sizes)]
        rows.append(
            {
                "prompt": text(6),
                "completions": [text(6) for _ in range(size)],
                "kind": "pairwise" if size == 2 else "ranking",
                "probability": round(rng.uniform(0.05, 0.95), 3) if soft and size == 2 else None,
            }
        )
    return rows
