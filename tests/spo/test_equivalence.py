"""An optimizer step is the same however it is cut into micro-batches, and whatever stands in the padding."""

import pytest
import torch

CUTS = [(8, 1), (2, 4), (1, 8)]  # rows at once, micro-batches of a step


def train(make_trainer, rows, batch, accumulation, **options):
    trainer = make_trainer(
        rows,
        output=f"cut-{batch}",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        optim="sgd",  # Adam would blow rounding errors of tiny gradients up to whole steps
        learning_rate=0.1,
        **options,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {"kl_gradient": "token", "beta": 0.3},
        {"kl_gradient": "full", "beta": 0.3},
        {"beta": 0.3, "weight_exponent": 0.5, "sampling_interval": 1, "samples_per_refresh": 5},
        {"method": "dpo", "beta": 0.5},
        {"beta": 0.1, "sizes": (2, 4, 3), "alpha": 0.5},
    ],
    ids=["token", "full", "weights", "dpo", "rankings"],
)
def test_batch_times_accumulation_is_all_that_counts(make_trainer, make_rows, weights, options):
    options = dict(options)
    # 28 rows in steps of 8: the last step of each epoch holds 4
    rows = make_rows(28, soft=True, sizes=options.pop("sizes", (2,)))
    runs = [train(make_trainer, rows, *cut, **options) for cut in CUTS]
    start = weights(make_trainer(rows).model)
    one = weights(runs[0].model)
    assert float((one - start).abs().max()) > 0.02
    for other in runs[1:]:
        torch.testing.assert_close(weights(other.model), one, rtol=0, atol=1e-5)
    logs = [[log for log in run.state.log_history if "loss" in log] for run in runs]
    assert len(logs[0]) == 8
    for log in logs[1:]:
        for ours, theirs in zip(log, logs[0], strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                if not name.startswith(("sampling/t", "epoch")):
                    assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


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
