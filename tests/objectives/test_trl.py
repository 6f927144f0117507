"""Where TRL has the same loss, the same numbers: against what record_trl.py recorded of its trainers."""

import json
from pathlib import Path

import pytest
import torch
from softpref.lm.padding import pad_sequences
from softpref.lm.scoring import sequence_logps
from softpref.objectives import (
    apo_down_loss,
    apo_zero_loss,
    cpo_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    nll_loss,
    orpo_loss,
    rdpo_loss,
    simpo_loss,
    slic_loss,
    sppo_loss,
)

pytestmark = pytest.mark.fast

RECORDED = json.loads(Path(__file__).with_name("trl_losses.json").read_text(encoding="utf-8"))
ROWS = len(RECORDED["rows"])


def in_turn(recorded):
    """TRL keeps the chosen and then the rejected; ours stand in turn."""
    return torch.tensor([recorded["chosen"], recorded["rejected"]]).T.flatten()


def recorded_logps(name):
    return in_turn(RECORDED[f"{name}_logps"])


@pytest.fixture(scope="module")
def score():
    """`score(sequences)`: log-probabilities under the recorded models: policy, reference."""
    from transformers import LlamaConfig, LlamaForCausalLM

    models = []
    for name in ("policy", "reference"):
        models.append(LlamaForCausalLM(LlamaConfig(**RECORDED["model"]["config"])).eval())
        weights = {key: torch.tensor(values) for key, values in RECORDED["model"][name].items()}
        models[-1].load_state_dict(weights)

    def run(sequences):
        with torch.no_grad():
            return [sequence_logps(model, pad_sequences(sequences, pad_id=0)) for model in models]

    return run


@pytest.fixture(scope="module")
def own_logps(score):
    """Ours of the same rows."""
    return score(
        [(row["prompt"], row[which]) for row in RECORDED["rows"] for which in ("chosen", "rejected")]
    )


def own_losses(kind, beta, smoothing, logps, ref_logps):
    if kind == "sigmoid":
        return dpo_loss(logps, ref_logps, beta=beta)
    if kind == "aot_unpaired":  # of one row, conservative DPO
        return dpo_loss(logps, ref_logps, beta=beta, label_smoothing=smoothing)
    if kind == "robust":
        return rdpo_loss(logps, ref_logps, beta=beta, label_smoothing=smoothing)
    if kind == "hinge":
        return slic_loss(logps, ref_logps, beta=beta)
    if kind == "sppo_hard":  # the chosen is sure to beat the policy, the rejected to lose
        return sppo_loss(
            logps, ref_logps, torch.tensor([1.0, 0.0]).repeat(ROWS), torch.full((ROWS,), 2), beta=beta
        )
    if kind in ("apo_zero", "apo_down"):
        return {"apo_zero": apo_zero_loss, "apo_down": apo_down_loss}[kind](logps, ref_logps, beta=beta)
    lengths = in_turn(RECORDED["completion_lengths"])
    if kind == "sigmoid+sft":
        return dpo_loss(logps, ref_logps, beta=beta) + nll_loss(logps, lengths)
    if kind == "cpo":
        return cpo_loss(logps, lengths, beta=beta)
    if kind == "simpo":
        return simpo_loss(logps, lengths, beta=beta, simpo_gamma=0.5)
    if kind == "orpo":  # TRL's likelihood is of the prompt too
        return orpo_loss(logps, lengths, beta=beta, nll_weight=0.0)
    assert kind == "ipo"  # TRL's margin is of means per token, ours of sums, as in the paper
    return ipo_loss(logps / lengths, ref_logps / lengths, beta=beta)


def test_log_probabilities_of_completions_are_those_of_trl(own_logps):
    for name, logps in zip(("policy", "reference"), own_logps, strict=True):
        torch.testing.assert_close(logps, recorded_logps(name), rtol=0, atol=1e-5)
    lengths = [len(row[which]) for row in RECORDED["rows"] for which in ("chosen", "rejected")]
    assert in_turn(RECORDED["completion_lengths"]).tolist() == lengths


@pytest.mark.parametrize(
    "recorded", RECORDED["losses"], ids=lambda one: f"{one['type']} {one['beta']} {one['label_smoothing']}"
)
def test_losses_are_those_of_trl(recorded, own_logps):
    setting = (recorded["type"], recorded["beta"], recorded["label_smoothing"])
    expected = torch.tensor(recorded["of_rows"])
    given = own_losses(*setting, recorded_logps("policy"), recorded_logps("reference"))
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own_losses(*setting, *own_logps), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recorded", RECORDED["kto"], ids=lambda one: f"kto {one['beta']}")
def test_losses_of_single_completions_are_those_of_trl(recorded, score):
    """Of batches of two, whose drift is that of their completions with prompts exchanged."""
    rows, positive = RECORDED["rows"], 0
    for i, expected in enumerate(recorded["of_batches"]):
        good, bad = rows[i], rows[(i + 1) % ROWS]
        logps, ref_logps = score([(good["prompt"], good["chosen"]), (bad["prompt"], bad["rejected"])])
        exchanged = score([(bad["prompt"], good["chosen"]), (good["prompt"], bad["rejected"])])
        kl = (exchanged[0] - exchanged[1]).mean()
        losses = kto_loss(
            logps,
            ref_logps,
            torch.tensor([1.0, 0.0]),
            kl,
            beta=recorded["beta"],
            undesirable_weight=1.5,
        )
        assert float(losses.mean()) == pytest.approx(expected, abs=1e-5)
        positive += float(kl) > 0
    assert 0 < positive < ROWS


def test_every_loss_that_both_have_is_recorded_and_the_rows_tell_them_apart():
    kinds = {one["type"] for one in RECORDED["losses"]}
    assert kinds == {
        *("sigmoid", "aot_unpaired", "robust", "hinge", "ipo", "sppo_hard"),
        *("apo_zero", "apo_down", "sigmoid+sft", "cpo", "simpo", "orpo"),
    }
    columns = torch.tensor([one["of_rows"] for one in RECORDED["losses"]])
    apart = (columns[:, None] - columns).abs().amax(-1)
    apart.fill_diagonal_(1.0)
    assert float(apart.min()) > 0.05


def test_ipo_of_sums_is_another_loss_than_trls_of_means():
    (recorded,) = (one for one in RECORDED["losses"] if one["type"] == "ipo" and one["beta"] == 1.0)
    sums = ipo_loss(recorded_logps("policy"), recorded_logps("reference"), beta=1.0)
    assert float((sums - torch.tensor(recorded["of_rows"])).abs().min()) > 0.01
