"""A toy world for the trainer: prompts and completions of letters, a model with a token per letter."""

import gc
import json
import random
from copy import deepcopy

import pytest
import torch
from transformers import TrainerCallback

LETTERS = "abcdefgh"


@pytest.fixture(scope="module", autouse=True)
def _frozen_libraries():
    """A trainer collects garbage when it starts, most of a short run's time: spare it what libraries keep."""
    import softpref.spo.stage  # noqa: F401

    gc.collect()
    gc.freeze()


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
            **{"processing_class": tokenizer, **(trainer_options or {})},
        )

    return make


class Watch(TrainerCallback):
    """Keeps what each optimizer step began with and the gradient that it took, `[parameters]`."""

    def __init__(self):
        self.models, self.gradients = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.models.append(deepcopy(model).double())

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(
            torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])
        )


@pytest.fixture
def watch():
    return Watch()


@pytest.fixture
def logs_of():
    """`logs_of(trainer) -> logs of its optimizer steps`."""
    return lambda trainer: [log for log in trainer.state.log_history if "loss" in log]


@pytest.fixture(scope="session")
def direct():
    """What a formula is written with: one sequence at a time, no padding, float64."""
    return Direct


class Direct:
    @staticmethod
    def distributions(model, prompt, completion):
        """log π at each completion token over the vocabulary: `[tokens, V]`."""
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
        return logits[len(prompt) - 1 : -1].double().log_softmax(-1)

    @staticmethod
    def token_logps(model, prompt, completion):
        every = Direct.distributions(model, prompt, completion)
        return every[range(len(completion)), completion]

    @staticmethod
    def gradient(model, loss):
        """Gradient of every trained parameter as one vector; zeros where the loss does not touch it."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, trained, **options)])

    @staticmethod
    def agree(found, expected, tolerance=1e-4):
        """Whether two vectors are the same up to a share of the expected one's length."""
        error = float((found.double() - expected).norm() / expected.norm())
        assert error < tolerance, f"relative error {error}"


@pytest.fixture(scope="session")
def reference_folder(tmp_path_factory, make_model, tokenizer):
    folder = tmp_path_factory.mktemp("reference")
    make_model(tokenizer, layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def write_dataset():
    """`write_dataset(folder, splits, sft=None, prompts=None, outcomes=None)` in the layout of stage 1."""

    def write(folder, splits, *, sft=None, prompts=None, outcomes=None):
        from datasets import Dataset, DatasetDict

        def save(splits, folder):
            DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(
                str(folder)
            )

        save(splits, folder)
        if sft:
            save(sft, folder / "sft")
        if prompts:
            Dataset.from_list(prompts).save_to_disk(str(folder / "prompts"))
        if outcomes:
            lines = [json.dumps(outcome) + "\n" for outcome in outcomes]
            (folder / "outcomes.jsonl").write_text("".join(lines))
        (folder / "stats.json").write_text(json.dumps({"dataset_hash": "abc"}))
        return str(folder)

    return write


@pytest.fixture
def command(tmp_path, reference_folder, monkeypatch):
    """`command(name, dataset, *more, **options)`: `softpref train` to the folder `name`; its exit status."""
    # the mirror alone is written
    monkeypatch.setattr("softpref.tracking.tracker.mlflow_ready", lambda uri: False)
    monkeypatch.setattr("softpref.tracking.syncing.mlflow_ready", lambda uri: False)

    def run(name, dataset, *more, **options):
        from softpref.cli import main

        config = tmp_path / f"{name}.json"
        defaults = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "logging_steps": 1, "seed": 3}
        config.write_text(json.dumps({**defaults, **options}))
        folders = ["--dataset", dataset, "--reference", reference_folder, "--output", str(tmp_path / name)]
        return main(["train", *folders, "--config", str(config), *more])

    return run


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
