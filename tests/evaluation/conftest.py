"""A world of nine answers per prompt and two random Llamas of a few thousand parameters."""

import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS = ["<s>", "</s>", "<unk>", "tell", "me", "of", "fox", "owl", "cat", "hen", "runs", "sleeps", "eats"]
WORDS += ["home", "away", "<b>", "."]
PROMPTS = [f"tell me of {hero} " for hero in ("fox", "owl", "cat", "hen", "<b>")]
ANSWERS = [" ".join(pair) for pair in itertools.product(("runs", "sleeps", "eats"), ("home", "away", "."))]
REWARDS = np.linspace(-1.0, 1.5, len(ANSWERS))
METRICS = {  # of the stage, with a judge that scores
    "preference_accuracy", "preference_margin", "win_rate", "expected_reward", "reference_expected_reward",
    "kl_sequence", "entropy_sequence", "distinct_1", "distinct_2", "self_bleu", "perplexity",
    "completion_length", "truncated_fraction", "reference_truncated_fraction", "kl_token",
    "repetition", "reference_repetition", "cross_entropy", "reference_cross_entropy",
    "relative_accuracy", "relative_margin", "reference_accuracy", "implied_accuracy", "implied_log_loss",
    "vote_entropy", "vote_divergence", "overconfidence", "calibration_error", "calibration_floor",
    "length_controlled_win_rate", "best_of_8", "reference_best_of_8",
    *(
        f"{side}{name}"
        for side in ("", "reference_")
        for name in ("vendi_score", "distinct_answers", "mode_share", "compression_ratio", "good_diversity")
    ),
}  # fmt: skip


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def llama(seed):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def save_model(folder: Path, seed: int, **metadata) -> Path:
    from softpref.records.model import save_metadata

    llama(seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if metadata:
        save_metadata(
            folder,
            {"stage": "train", "max_prompt_length": 8, "max_completion_length": 6, "dataset_hash": "abc"}
            | metadata,
        )
    return folder


def save_dataset(folder: Path, *, outcomes: bool = True) -> Path:
    """A dataset folder of stage 1: preferences drawn from REWARDS by Bradley-Terry."""
    from datasets import Dataset, DatasetDict

    random = np.random.default_rng(0)

    def rows(prompts, count):
        for number in range(count):
            a, b = random.choice(len(ANSWERS), 2, replace=False)
            if random.random() > 1 / (1 + np.exp(REWARDS[b] - REWARDS[a])):
                a, b = b, a
            yield {
                "prompt": prompts[number % len(prompts)],
                "completions": [ANSWERS[a], ANSWERS[b]],
                "kind": "pairwise",
                "probability": None,
                "source_row": number + 1,
            }

    splits = {"train": PROMPTS[:2], "validation": PROMPTS[2:3], "test": PROMPTS[2:]}
    DatasetDict(
        {name: Dataset.from_list(list(rows(prompts, 60))) for name, prompts in splits.items()}
    ).save_to_disk(str(folder))
    (folder / "stats.json").write_text(json.dumps({"dataset_hash": "abc"}))
    if outcomes:
        with open(folder / "outcomes.jsonl", "w") as lines:
            for prompt in PROMPTS:
                row = {"prompt": prompt, "completions": ANSWERS, "rewards": REWARDS.tolist()}
                lines.write(json.dumps(row | {"weights": [1 / len(ANSWERS)] * len(ANSWERS)}) + "\n")
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folders: `dataset`, `plain` (no outcomes), `reference`, `policy`."""
    root = tmp_path_factory.mktemp("world")
    return SimpleNamespace(
        dataset=save_dataset(root / "dataset"),
        plain=save_dataset(root / "plain", outcomes=False),
        reference=save_model(root / "reference", seed=1),
        policy=save_model(root / "policy", seed=2, name="spo-1 <&>", method="spo", alpha=1.0, beta=0.1),
    )


@pytest.fixture(autouse=True)
def _own_tracking_store(tmp_path, monkeypatch):
    """Every test has its own store; none writes beside the repository."""
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


class Recorder:
    """Stands in for the Tracker in tests about something else: a real store takes seconds to make."""

    calls: list

    def __init__(self, output_dir, **options):
        self.run_id = options.get("run_id") or "new-run"
        self.calls.append(("open", options))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def metrics(self, values, step):
        self.calls.append(("metrics", values))

    def tags(self, values):
        self.calls.append(("tags", values))

    def dataset(self, stats, context):
        self.calls.append(("dataset", context))

    def artifact(self, path, folder=""):
        self.calls.append(("artifact", Path(path).name))


@pytest.fixture
def recorded(monkeypatch):
    """What the stage would track, as a list of calls."""
    import softpref.tracking

    monkeypatch.setattr(Recorder, "calls", [], raising=False)
    monkeypatch.setattr(softpref.tracking, "Tracker", Recorder)
    return Recorder.calls


def evaluate(world, output, *, dataset=None, policy=None, reference=None, **options):
    """Run the stage with few samples; what it wrote into evaluation.json."""
    from softpref.evaluation.config import EvaluationConfig
    from softpref.evaluation.stage import run

    found = run(
        EvaluationConfig(**({"samples_per_prompt": 6, "bootstrap_samples": 200} | options)),
        dataset_dir=str(dataset or world.dataset),
        reference_dir=str(reference or world.reference),
        policy_dir=str(policy or world.policy),
        output_dir=str(output),
    )
    written = json.loads((Path(output) / "evaluation.json").read_text())
    assert written == found.as_dict()
    return written


@pytest.fixture(scope="session")
def evaluated(world, tmp_path_factory):
    """One finished evaluation folder, not to be written to."""
    import softpref.tracking

    folder = tmp_path_factory.mktemp("evaluated") / "evaluation"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "calls", [], raising=False)
        patch.setattr(softpref.tracking, "Tracker", Recorder)
        evaluate(world, folder)
    return folder


@pytest.fixture(scope="session")
def extrapolated(world, tmp_path_factory):
    """The policy's folder with two extrapolated models in it, not to be written to."""
    from softpref.lm.extrapolation import write_extrapolations
    from softpref.lm.loading import load_model
    from softpref.records.model import load_metadata, save_metadata

    folder = tmp_path_factory.mktemp("extrapolated") / "policy"
    shutil.copytree(world.policy, folder)
    metadata = load_metadata(folder) | {"run_id": "run-of-training"}
    model = load_model(str(world.policy))
    write_extrapolations(model, str(world.reference), tokenizer(), folder, metadata, [-0.5, 0.5])
    save_metadata(folder, metadata)
    return folder


@pytest.fixture(scope="session")
def evaluating():
    """The function that runs the stage with few samples."""
    return evaluate


@pytest.fixture
def evaluation(evaluated):
    """What the finished evaluation says."""
    return json.loads((evaluated / "evaluation.json").read_text())


def copy_policy(world, folder, **metadata):
    """The policy in another folder, with changed metadata."""
    from softpref.records.model import load_metadata, save_metadata

    shutil.copytree(world.policy, folder)
    save_metadata(folder, load_metadata(folder) | metadata)
    return folder
