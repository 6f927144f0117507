"""What must not matter does not, step by step and through the command: how a step is cut, padded, ordered."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from softpref.lm import padding

ROWS, STEP = 28, 8  # the last step of each epoch holds 4
SHARED = {
    "optim": "sgd",  # Adam would blow rounding errors of tiny gradients up to whole steps
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",
    "max_prompt_length": 40,
    "max_completion_length": 32,
    "samples_per_refresh": 26,
    "sampling_interval": 3,
    "num_train_epochs": 2,
}
# the rows' own prompts come in the order of the rows
APART = {"kl_prompts": "separate"}
CASES = {
    "token": {"beta": 0.3, "learning_rate": 0.1, **APART},
    "limited": {"beta": 0.3, "learning_rate": 0.02, "reverse_kl_limit": 0.001, **APART},
    "lambda": {"beta": 0.3, "learning_rate": 0.1, "kl_gradient": 0.7, "max_importance_ratio": 1.5, **APART},
    "full-weighted": {
        "beta": 0.3,
        "learning_rate": 0.1,
        "kl_gradient": "full",
        "max_importance_ratio": 1.5,
        "refresh": "adaptive",
        "sampling_interval": 4,
        "samples_per_refresh": 32,
        **APART,
    },
    "on data": {
        "beta": 0.3,
        "anchor": 0.5,
        "learning_rate": 0.1,
        "kl_on": "data",
        "kinds": ("pairwise", "best_of_n", "ranking"),
    },
    "dpo": {"method": "dpo", "beta": 0.5, "learning_rate": 0.1},
    "orpo": {
        "method": "orpo",
        "beta": 0.5,
        "nll_weight": 0.7,
        "learning_rate": 0.1,
        "kinds": ("pairwise", "best_of_n", "ranking"),
    },
    "sppo": {"method": "sppo", "beta": 2.0, "learning_rate": 1e-3, "kinds": ("pairwise", "ranking")},
    "mixed": {
        "beta": 0.2,
        "alpha": 0.5,
        "learning_rate": 0.1,
        "soft_labels": "geometric",
        "weight_exponent": 0.5,
        "weight_scores": "token",
        "kinds": ("pairwise", "best_of_n", "ranking"),
        **APART,
    },
    "tdpo": {
        "method": "tdpo",
        "beta": 0.3,
        "kl_beta": 0.2,
        "kl_on": "data",
        "learning_rate": 0.1,
        "kinds": ("pairwise", "best_of_n", "ranking"),
    },
}
# what tells of time, or of the place within an epoch
UNLIKE = ("epoch", "sampling/t", "seconds/", "total_flos")
UNLIKE += tuple(
    f"{split}_{what}" for split in ("train", "eval") for what in ("runtime", "samples_", "steps_")
)


def rows_of(kinds, seed=0):
    """Rows whose lengths range from one letter to thirty."""
    rng = random.Random(seed)

    def text():
        return "".join(rng.choices("abcdefgh", k=rng.choice((1, 2, 5, 30))))

    def texts(count):
        found = [text() for _ in range(count)]
        return found if len({*found}) == count else texts(count)  # rows with equal ones are left out

    rows = []
    for number in range(ROWS):
        kind = kinds[number % len(kinds)]
        size = 2 if kind == "pairwise" else rng.choice((3, 5))
        rows.append(
            {
                "prompt": text(),
                "completions": texts(size),
                "kind": kind,
                "probability": round(rng.uniform(0.05, 0.95), 3) if size == 2 else None,
            }
        )
    return rows


def permuted(rows):
    """The rows of each step in another order, and the losers of a best-of-n in another."""
    rng = random.Random(1)
    mixed = []
    for epoch_step in range(0, ROWS, STEP):
        step = rows[epoch_step : epoch_step + STEP]
        rng.shuffle(step)
        for row in step:
            best, *others = row["completions"]
            if row["kind"] == "best_of_n":
                rng.shuffle(others)
            mixed.append({**row, "completions": [best, *others]})
    assert mixed != rows
    return mixed


@pytest.fixture
def train(tmp_path, write_dataset, command):
    """`train(name, rows, batch, **options)` through the command: every metric by step, and the weights."""

    def run(name, rows, batch, **options):
        kinds = sorted({row["kind"] for row in rows})
        splits = {"train": rows, "validation": rows_of(kinds, seed=5)[:9]}
        # the KL term has prompts of its own: the same ones whatever the order of the rows
        prompts = [{"prompt": "abcdefgh"[: 1 + i % 7] * (1 + i % 3)} for i in range(20)]
        dataset = write_dataset(tmp_path / f"{name}-data", splits, prompts=prompts)
        cut = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": STEP // batch,
            "per_device_eval_batch_size": batch,
        }
        assert command(name, dataset, **{**SHARED, **cut, **options}) == 0
        metrics = {}
        for line in (tmp_path / name / "tracking.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["kind"] == "metrics":
                metrics.setdefault(record["step"], {}).update(record["values"])
        return metrics, flat(tmp_path / name)

    return run


def flat(folder):
    """All weights of a model folder as one vector."""
    weights = load_file(folder / "model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.mark.parametrize("case", CASES)
def test_the_trajectory_is_the_same_however_steps_are_cut_padded_and_ordered(
    train, reference_folder, monkeypatch, case
):
    options = dict(CASES[case])
    rows = rows_of(options.pop("kinds", ("pairwise",)))
    metrics, weights = train("whole", rows, STEP, **options)
    assert sorted(metrics) == list(range(1, 9))
    assert (
        float((weights - flat(Path(reference_folder))).abs().max()) > 5e-4
    )  # a hundred times what is forgiven below

    others = {
        "ones": train("ones", rows, 1, **options),
        "twos": train("twos", rows, 2, **options),
        "order": train("order", permuted(rows), 4, **options),
    }
    pad_sequences, padded = padding.pad_sequences, []

    def wider(sequences, pad_id):
        ids, mask, completions, lengths = pad_sequences(sequences, pad_id)
        padded.append(len(ids))
        more = ids.new_full((len(ids), 9), 7)  # what stands in the padding is no padding token either
        ids = torch.where(mask.bool(), ids, 7)
        return padding.PaddedBatch(
            torch.cat([ids, more], 1),
            torch.cat([mask, 0 * more], 1),
            torch.cat([completions, more < 0], 1),
            lengths,
        )

    monkeypatch.setattr("softpref.lm.head.pad_sequences", wider)
    assert not padded
    others["plain"] = train("plain", rows, STEP, plain_forward=True, **options)
    assert padded

    for name, (found, ended) in others.items():
        assert found.keys() == metrics.keys()
        for step, expected in metrics.items():
            assert found[step].keys() == expected.keys(), (name, step)
            for key, value in expected.items():
                if not key.startswith(UNLIKE):
                    close = pytest.approx(value, rel=2e-4, abs=2e-4)
                    assert found[step][key] == close, (name, step, key)
        torch.testing.assert_close(ended, weights, rtol=0, atol=5e-6, msg=name)
    logged = {"loss/preference", "rewards/margins", "grad_norm", "eval_loss"}
    if options.get("kl_on") == "data":
        logged |= {"kl/data"}
    elif "method" not in options:
        logged |= {"kl/sequence", "sampling/ess", "sampling/age"}
    assert logged <= {key for values in metrics.values() for key in values}


def test_metrics_are_averages_over_rows_and_tokens_and_not_over_padding(make_trainer, make_rows):
    rows = make_rows(12)
    long_row = {"prompt": "a", "completions": ["abcdefg", "hgfedcb"], "kind": "pairwise", "probability": None}
    # one step that does not move: the means of twelve rows at once equal the mean of twelve single ones
    whole = make_trainer([*rows, long_row], per_device_train_batch_size=13, learning_rate=0.0, beta=0.1)
    whole.train()
    apart = make_trainer([*rows, long_row], per_device_train_batch_size=1, learning_rate=0.0, beta=0.0)
    apart.train()
    together = next(log for log in whole.state.log_history if "loss" in log)
    singles = [log for log in apart.state.log_history if "loss" in log]
    for name in (
        "loss/preference",
        "logps/chosen",
        "logps/rejected",
        "rewards/margins",
        "rewards/accuracies",
    ):
        assert together[name] == pytest.approx(sum(log[name] for log in singles) / 13, rel=1e-4), name
    assert together["kl/sequence"] == pytest.approx(0.0, abs=1e-5)
    samples = whole.buffer._samples[: whole.buffer.slice_size(0)]
    lengths = [len(sample.completion) for sample in samples]
    assert len(set(lengths)) > 1
    assert together["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert together["completions/truncated_fraction"] == pytest.approx(
        sum(sample.truncated for sample in samples) / len(samples)
    )
