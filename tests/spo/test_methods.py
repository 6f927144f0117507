"""Each method's step is that of its formula, written out here for one completion at a time in float64."""

from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

BETA, ALPHA, ANCHOR, SMOOTHING, TDPO_ALPHA = 0.7, 0.6, 0.8, 0.2, 0.3
ROPO_ALPHA, GAMMA, NLL_WEIGHT = 3.0, 0.4, 0.5
REFERENCE_FREE = ("simpo", "cpo", "orpo")
BASELINES = (
    *("dpo", "rdpo", "ipo", "slic", "ropo", "apo_zero", "apo_down", "tdpo", "tdpo1"),
    *REFERENCE_FREE,
    "sppo",
)
VARIANTS = {  # names of these tests: a method with options
    "anchored": {"method": "spo", "anchor": ANCHOR},
    "rpo": {"method": "dpo", "nll_weight": NLL_WEIGHT},
    "extremes": {"method": "sppo", "sppo_completions": "extremes"},
    "orpo": {"method": "orpo", "nll_weight": NLL_WEIGHT},
}
OWN = {  # of a method, wherever it is trained here
    "dpo": {"label_smoothing": SMOOTHING},
    "rdpo": {"label_smoothing": SMOOTHING},
    "tdpo": {"tdpo_alpha": TDPO_ALPHA},
    "ropo": {"ropo_alpha": ROPO_ALPHA},
    "simpo": {"simpo_gamma": GAMMA},
}


def options_of(method):
    given = VARIANTS.get(method, {"method": method})
    return {**OWN.get(given["method"], {}), **given}


class Completion(NamedTuple):
    """log π, log π_ref, Σ_t KL(π_ref ‖ π), and tokens."""

    logp: torch.Tensor
    ref_logp: torch.Tensor
    divergence: torch.Tensor
    length: int


@pytest.fixture
def adapted(make_model, tokenizer):
    """A model with an adapter that has moved away from its base."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    model = get_peft_model(make_model(tokenizer, layers=2), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def one_step(make_trainer, make_model, tokenizer, adapted, watch):
    """`one_step(rows, lora, **options)`: `(trainer, model, off)` after the only step.

    Model and reference are those of the step in float64; `off()` is a context that yields the reference.
    `seeds` are those of both.
    """

    def run(rows, lora=False, seeds=(0, 5), **options):
        trainer_options = {"callbacks": [watch]}
        policy, reference = (make_model(tokenizer, layers=2, seed=seed) for seed in seeds)
        if not lora:
            trainer_options["ref_model"] = reference
        trainer = make_trainer(
            rows,
            model=adapted if lora else policy,
            trainer_options=trainer_options,
            per_device_train_batch_size=len(rows),
            train_sampling_strategy="sequential",
            max_grad_norm=0.0,
            **options,
        )
        trainer.train()
        model = watch.models[0]

        @contextmanager
        def off():
            with model.disable_adapter() if lora else nullcontext():
                yield model if lora else trainer.ref_model.double()

        return trainer, model, off

    return run


def hard_loss(method, margin, drift):
    """The loss where the first completion has won by the margin; `drift`: see `pair_loss`."""
    if method == "ipo":
        return (margin - 1 / (2 * BETA)) ** 2
    z = BETA * margin
    if method in ("dpo", "rpo"):
        return -(1 - SMOOTHING) * F.logsigmoid(z) - SMOOTHING * F.logsigmoid(-z)
    if method == "rdpo":
        return (-(1 - SMOOTHING) * F.logsigmoid(z) + SMOOTHING * F.logsigmoid(-z)) / (1 - 2 * SMOOTHING)
    if method == "slic":
        return torch.clamp(1 - z, min=0)
    if method == "ropo":
        a = ROPO_ALPHA
        return 4 * a / (1 + a) ** 2 * -F.logsigmoid(z) + 4 * a**2 / (1 + a) ** 2 * torch.sigmoid(-z)
    if method == "simpo":
        return -F.logsigmoid(z - GAMMA)
    if method == "orpo":  # β weighs it
        return -BETA * F.logsigmoid(margin)
    if method == "tdpo":
        return -F.logsigmoid(z - BETA * TDPO_ALPHA * drift)
    assert method in ("tdpo1", "cpo")
    return -F.logsigmoid(z)


def margin_of(method, first, second):
    if method == "cpo":
        return first.logp - second.logp
    if method == "simpo":
        return first.logp / first.length - second.logp / second.length
    if method == "orpo":
        return log_odds(first) - log_odds(second)
    margin = (first.logp - first.ref_logp.detach()) - (second.logp - second.ref_logp.detach())
    return margin - (second.divergence - first.divergence) if method == "tdpo1" else margin


def log_odds(one):
    mean = (one.logp / one.length).exp()
    return (mean / (1 - mean)).log()


def anchored_loss(method, won, lost):
    if method == "apo_zero":
        return 1 - torch.sigmoid(won) + torch.sigmoid(lost)
    return torch.sigmoid(won) + 1 - torch.sigmoid(won - lost)


def pair_loss(method, first, second, p, soft_labels):
    if method.startswith("apo"):
        u, v = (BETA * (one.logp - one.ref_logp.detach()) for one in (first, second))
        if soft_labels == "geometric":
            return anchored_loss(method, p * u + (1 - p) * v, (1 - p) * u + p * v)
        return p * anchored_loss(method, u, v) + (1 - p) * anchored_loss(method, v, u)
    margin = margin_of(method, first, second)
    drift = second.divergence - first.divergence.detach()  # the loser's less the winner's
    back = first.divergence - second.divergence.detach()
    if soft_labels == "geometric":
        loss = hard_loss(method, (2 * p - 1) * margin, drift)
    else:
        loss = p * hard_loss(method, margin, drift) + (1 - p) * hard_loss(method, -margin, back)
    weight = {"cpo": 1.0, "orpo": NLL_WEIGHT, "rpo": NLL_WEIGHT}.get(method, 0.0)
    return loss - weight * (p * first.logp / first.length + (1 - p) * second.logp / second.length)


def spo_loss(scores, kind, p, soft_labels):
    """Of one row's log-probabilities, best first."""
    if len(scores) == 2:
        margin = scores[0] - scores[1]
        if soft_labels == "geometric":
            return -F.logsigmoid(ALPHA * (2 * p - 1) * margin) / ALPHA
        return -(p * F.logsigmoid(ALPHA * margin) + (1 - p) * F.logsigmoid(-ALPHA * margin)) / ALPHA
    places = 1 if kind == "best_of_n" else len(scores) - 1
    return sum((ALPHA * scores[k:]).logsumexp(0) / ALPHA - scores[k] for k in range(places))


def row_loss(method, row, logps, ref_logps, divergences, soft_labels):
    """Of the row as it was given, or of `extremes` as it is trained on."""
    p, size = row["probability"], len(logps)
    if method in ("spo", "anchored"):
        base = ANCHOR * ref_logps.detach() if method == "anchored" else 0
        return spo_loss(logps - base, row["kind"], p, soft_labels)
    ratios = logps - ref_logps.detach()
    if method in ("sppo", "extremes"):
        wins = row["win_probabilities"]
        return sum((ratio - (win - 0.5) / BETA) ** 2 for ratio, win in zip(ratios, wins, strict=True))
    lengths = [len(one) for one in row["completions"]]
    each = [Completion(*one) for one in zip(logps, ref_logps, divergences, lengths, strict=True)]
    better = range(size - 1) if row["kind"] == "ranking" else [0]
    pairs = [(each[i], each[j]) for i in better for j in range(i + 1, size)]
    return sum(pair_loss(method, *pair, p, soft_labels) for pair in pairs) / len(pairs)


def scored(direct, model, off, row):
    """log π, log π_ref and D = Σ_t KL(π_ref ‖ π) of each completion of a row."""
    logps, ref_logps, divergences = [], [], []
    for completion in row["completions"]:
        policy = direct.distributions(model, row["prompt"], completion)
        with off() as reference, torch.no_grad():
            old = direct.distributions(reference, row["prompt"], completion)
        tokens = range(len(completion))
        logps.append(policy[tokens, completion].sum())
        ref_logps.append(old[tokens, completion].sum())
        divergences.append((old.exp() * (old - policy)).sum())
    return torch.stack(logps), torch.stack(ref_logps), torch.stack(divergences)


def rows_for(make_rows, method, data):
    if data == "pairs":
        return make_rows(5, soft=True)
    rows = make_rows(7, sizes=(2, 4, 3), soft=True)
    if method not in ("sppo", "extremes"):
        rows[2]["kind"] = "best_of_n"
        rows[4]["kind"] = "best_of_n"
    return rows


def rewards_of(method, row, logps, ref_logps):
    if method in ("spo", "anchored"):
        return ALPHA * (logps - (ANCHOR * ref_logps if method == "anchored" else 0))
    lengths = torch.tensor([len(one) for one in row["completions"]])
    if method == "orpo":
        mean = (logps / lengths).exp()
        return (mean / (1 - mean)).log()
    if method in REFERENCE_FREE:
        return BETA * (logps / lengths if method == "simpo" else logps)
    return BETA * (logps - ref_logps)


@pytest.mark.parametrize("lora", [False, True], ids=["model", "adapter"])
@pytest.mark.parametrize("data", ["pairs", "groups"])
@pytest.mark.parametrize("method", ["spo", "anchored", *BASELINES, "rpo", "extremes"])
def test_loss_and_gradient_are_the_formulas(one_step, make_rows, direct, watch, logs_of, method, data, lora):
    # groups take geometric labels, pairs of the adapter too: each way meets each kind of reference
    soft_labels = "linear" if (data == "pairs") != lora else "geometric"
    options = {"soft_labels": soft_labels} if method not in ("sppo", "extremes") else {}
    trainer, model, off = one_step(
        rows_for(make_rows, method, data),
        lora,
        alpha=ALPHA,
        beta=0.0 if method in ("spo", "anchored") else BETA,
        **options_of(method),
        **options,
    )
    rows = trainer.train_dataset.rows
    values = [scored(direct, model, off, row) for row in rows]
    loss = sum(
        row_loss(method, row, *value, soft_labels) for row, value in zip(rows, values, strict=True)
    ) / len(rows)
    log = logs_of(trainer)[0]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert log["loss/preference"] == pytest.approx(loss.item(), rel=1e-4)
    direct.agree(watch.gradients[0], direct.gradient(model, loss))
    if lora:
        assert trainer.ref_model is None

    chosen, rejected = [], []  # a best-of-n row tells its others not apart: their mean is what it rejects
    for row, (logps, ref_logps, _) in zip(rows, values, strict=True):
        rewards = rewards_of(method, row, logps, ref_logps)
        chosen.append(rewards[0])
        rejected.append(rewards[1:] if row["kind"] == "best_of_n" else rewards[-1:])
    margins = [best - others.mean() for best, others in zip(chosen, rejected, strict=True)]
    wins = [(best > others).double().mean() for best, others in zip(chosen, rejected, strict=True)]
    for name, expected in {
        "chosen": chosen,
        "rejected": [others.mean() for others in rejected],
        "margins": margins,
        "accuracies": wins,
        "saturated": [
            ((best - others).abs() > 5).double().mean() for best, others in zip(chosen, rejected, strict=True)
        ],
    }.items():
        mean = torch.stack(expected).mean().item()
        assert log[f"rewards/{name}"] == pytest.approx(mean, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("alpha", [0.0, 4.0])
def test_other_softness_too(one_step, make_rows, direct, watch, alpha):
    trainer, model, off = one_step(make_rows(4, sizes=(3,)), alpha=alpha, beta=0.0)
    loss = 0.0
    for row in trainer.train_dataset.rows:
        logps = scored(direct, model, off, row)[0]
        for suffix in (logps, logps[1:]):
            loss = loss + (
                suffix.mean() - suffix[0] if alpha == 0 else (alpha * suffix).logsumexp(0) / alpha - suffix[0]
            )
    direct.agree(watch.gradients[0], direct.gradient(model, loss / 4))


@pytest.mark.parametrize("weight_scores", ["sequence", "token"])
@pytest.mark.parametrize("cut", [1, 3])
def test_weights_are_symmetric_constant_and_of_mean_one(
    make_trainer, make_rows, direct, watch, weight_scores, cut
):
    gamma = 0.4
    trainer = make_trainer(
        make_rows(6, sizes=(2, 3), soft=True),
        alpha=ALPHA,
        beta=0.0,
        weight_exponent=gamma,
        weight_scores=weight_scores,
        per_device_train_batch_size=6 // cut,
        gradient_accumulation_steps=cut,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        trainer_options={"callbacks": [watch]},
    )
    trainer.train()
    losses, weights = [], []
    for row in trainer.train_dataset.rows:
        tokens = [direct.token_logps(watch.models[0], row["prompt"], one) for one in row["completions"]]
        logps = torch.stack([values.sum() for values in tokens])
        means = torch.stack([values.mean() for values in tokens])
        losses.append(spo_loss(logps, row["kind"], row["probability"], "linear"))
        weights.append((logps if weight_scores == "sequence" else means).exp().sum().item() ** gamma)
    mean = sum(weights) / len(weights)
    loss = sum(weight / mean * one for weight, one in zip(weights, losses, strict=True)) / len(losses)
    assert max(weights) > 1.5 * min(weights)
    direct.agree(watch.gradients[0], direct.gradient(watch.models[0], loss))


@pytest.mark.parametrize("soft", [False, True])
def test_anchor_one_without_a_kl_term_is_dpo(one_step, make_rows, watch, logs_of, soft):
    """With β = α: in value up to 1/α, and in gradient."""
    rows = make_rows(6, soft=soft)
    dpo, _, _ = one_step(rows, method="dpo", beta=ALPHA)
    spo, _, _ = one_step(rows, alpha=ALPHA, anchor=1.0, beta=0.0)
    ours, theirs = logs_of(spo)[0], logs_of(dpo)[0]
    assert ALPHA * ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    torch.testing.assert_close(ALPHA * watch.gradients[1], watch.gradients[0], rtol=1e-4, atol=1e-6)
    for name in ("margins", "accuracies", "saturated"):
        assert ours[f"rewards/{name}"] == pytest.approx(theirs[f"rewards/{name}"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", [*BASELINES, "kto", "rpo", "extremes"])
def test_the_kl_term_beside_a_baseline_is_that_of_spo(one_step, make_rows, watch, logs_of, method):
    rows = make_rows(6)
    one_step(rows, **options_of(method), beta=BETA)
    both, _, _ = one_step(rows, **options_of(method), beta=BETA, kl_beta=0.4)
    one_step(rows, beta=0.0)
    spo, _, _ = one_step(rows, beta=0.4)
    alone, added, bare, regularised = watch.gradients
    assert float((regularised - bare).norm()) > 1e-2
    torch.testing.assert_close(added - alone, regularised - bare, rtol=1e-3, atol=1e-4)
    assert logs_of(both)[0]["kl/sequence"] == pytest.approx(logs_of(spo)[0]["kl/sequence"], rel=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["model", "adapter"])
@pytest.mark.parametrize("options", [{}, {"plain_forward": True}, {"reference_cache": "cache"}])
@pytest.mark.parametrize("method", ["spo", "anchored", "dpo", "tdpo", "sppo", "simpo"])
def test_on_data_the_kl_term_goes_along_the_completions_of_the_rows(
    one_step, make_rows, direct, watch, logs_of, tmp_path, monkeypatch, method, options, lora
):
    """Over the whole vocabulary at each token; its mean over a row's completions, and over rows."""
    monkeypatch.chdir(tmp_path)
    rows = rows_for(make_rows, method, "groups")
    for number, row in enumerate(rows):
        row["weight"] = float(number % 3)  # what a row weighs is no matter of the KL term
    strength = {"beta": 0.4} if method in ("spo", "anchored") else {"beta": BETA, "kl_beta": 0.4}
    trainer, model, off = one_step(
        rows,
        lora,
        alpha=ALPHA,
        kl_on="data",
        **options_of(method),
        **strength,
        **options,
    )
    assert trainer.buffer is None
    assert trainer._engine is None
    preference, kl = [], []
    for row in trainer.train_dataset.rows:
        logps, ref_logps, divergences = scored(direct, model, off, row)
        preference.append(row["weight"] * row_loss(method, row, logps, ref_logps, divergences, "linear"))
        along = []
        for completion in row["completions"]:
            policy = direct.distributions(model, row["prompt"], completion)
            with off() as reference, torch.no_grad():
                old = direct.distributions(reference, row["prompt"], completion)
            along.append((policy.exp() * (policy - old)).sum())
        kl.append(sum(along) / len(along))
    loss, kl = sum(preference) / len(rows), sum(kl) / len(rows)
    log = logs_of(trainer)[0]
    assert log["kl/data"] == pytest.approx(kl.item(), rel=1e-4)
    assert log["loss/preference"] == pytest.approx(loss.item(), rel=1e-4)
    assert log["loss"] == pytest.approx((loss + 0.4 * kl).item(), rel=1e-4)
    assert 0.4 * kl > 0.05  # far more than what is forgiven
    direct.agree(watch.gradients[0], direct.gradient(model, loss + 0.4 * kl))
    assert not [name for name in log if name.startswith(("kl/sequence", "sampling/", "completions/"))]


@pytest.mark.parametrize("method", ["spo", "dpo"])
def test_no_kl_term_is_that_of_no_strength(make_trainer, make_rows, weights, logs_of, method):
    zero = {"beta": 0.0} if method == "spo" else {"beta": BETA, "kl_beta": 0.0}
    none = {"beta": 0.4} if method == "spo" else {"beta": BETA, "kl_beta": 0.4}
    ends, logs = [], []
    for options in (zero, {**none, "kl_on": "none"}, none):
        trainer = make_trainer(make_rows(8), method=method, num_train_epochs=2, **options)
        trainer.train()
        ends.append(weights(trainer.model))
        logs.append([(log["loss"], log["grad_norm"]) for log in logs_of(trainer)])
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)
    assert logs[1] == logs[0]
    assert float((ends[2] - ends[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("options", [{"rounds": 2}, {"rounds": 2, "round_reference": "previous"}])
def test_in_rounds_the_kl_term_on_data_is_to_the_initial_model(
    make_trainer, make_rows, direct, watch, logs_of, model, options
):
    """Along the completions that the policy has drawn, whatever the loss takes as its reference."""
    rows, seen = make_rows(6), []
    trainer = make_trainer(
        rows,
        method="dpo",
        beta=BETA,
        kl_beta=0.4,
        kl_on="data",
        per_device_train_batch_size=6,
        learning_rate=0.05,
        max_grad_norm=0.0,
        cut_rows="keep",
        trainer_options={"judge": _Alphabet(), "callbacks": [watch]},
        **options,
    )
    begin = trainer.rounds.begin
    trainer.rounds.begin = lambda number: (begin(number), seen.append(list(trainer.rounds.rows)))
    trainer.train()
    assert len(seen) == len(watch.models) == 2
    initial = model.double()
    for drawn, policy, log in zip(seen, watch.models, logs_of(trainer), strict=True):
        kl = 0.0
        with torch.no_grad():
            for row in drawn:
                for completion in row["completions"]:
                    now = direct.distributions(policy, row["prompt"], completion)
                    old = direct.distributions(initial, row["prompt"], completion)
                    kl += float((now.exp() * (now - old)).sum()) / len(row["completions"])
        assert log["kl/data"] == pytest.approx(kl / len(drawn), rel=1e-3, abs=1e-6)
    assert logs_of(trainer)[1]["kl/data"] > 1e-3


@pytest.mark.parametrize("options", [{}, {"rounds": 2, "round_reference": "previous"}, {"rounds": 2}])
def test_an_anchor_takes_its_base_from_where_baselines_have_their_reference(
    make_trainer, make_rows, make_model, tokenizer, logs_of, tmp_path, options
):
    """SPO with anchor 1 and DPO with β = α take the same steps: from a cache too, and in rounds."""
    if not options:
        options = {"reference_cache": str(tmp_path / "cache")}
    judged = {"judge": _Alphabet()} if "rounds" in options else {}
    losses = []
    for own in ({"method": "dpo", "beta": ALPHA}, {"alpha": ALPHA, "anchor": 1.0, "beta": 0.0}):
        trainer = make_trainer(
            make_rows(6),
            model=make_model(tokenizer, layers=2, spread=0.1),
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=0.01 if "method" in own else 0.01 * ALPHA,
            per_device_train_batch_size=6,
            num_train_epochs=2,
            cut_rows="keep",
            output=f"run-{own.get('method', 'spo')}",
            trainer_options=judged,
            **own,
            **options,
        )
        trainer.train()
        scale = 1 if "method" in own else ALPHA
        losses.append([scale * log["loss"] for log in logs_of(trainer)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len({round(loss, 4) for loss in losses[0]}) > 1


def unpaired(rows):
    """Each completion a row of its own, in an order that has no pairs next to each other."""
    every = [
        {"prompt": row["prompt"], "completion": one, "label": place == 0}
        for row in rows
        for place, one in enumerate(row["completions"])
    ]
    return every[::2] + every[1::2][::-1]


def desirable(row):
    """The share of a row's decided pairs that each completion wins."""
    size, p = len(row["completions"]), row["probability"]
    if size == 1:
        return [p]
    if size == 2:
        return [p, 1 - p]
    if row["kind"] == "best_of_n":
        return [1.0] + [0.0] * (size - 1)
    return [(size - 1 - place) / (size - 1) for place in range(size)]


def kto_by_hand(direct, model, off, rows):
    """The mean loss of rows that are one step, and the drift that it is relative to."""

    def log_ratio(prompt, completion):
        with off() as reference, torch.no_grad():
            old = direct.token_logps(reference, prompt, completion).sum()
        return direct.token_logps(model, prompt, completion).sum() - old

    with torch.no_grad():
        others = [
            log_ratio(rows[i - 1]["prompt"], one) for i, row in enumerate(rows) for one in row["completions"]
        ]
    drift, losses = float(sum(others) / len(others)), []
    for row in rows:
        each = []
        for one, d in zip(row["completions"], desirable(row), strict=True):
            gain = BETA * (log_ratio(row["prompt"], one) - max(0.0, drift))
            each.append(0.8 * d * (1 - torch.sigmoid(gain)) + 1.5 * (1 - d) * torch.sigmoid(gain))
        losses.append(sum(each) / len(each))
    return sum(losses) / len(losses), drift


KTO = {"method": "kto", "beta": BETA, "desirable_weight": 0.8, "undesirable_weight": 1.5}


@pytest.mark.parametrize("lora", [False, True], ids=["model", "adapter"])
@pytest.mark.parametrize("data", ["pairs", "groups", "unpaired"])
def test_kto_is_its_formula_relative_to_the_drift_on_mismatched_prompts(
    one_step, make_rows, direct, watch, logs_of, data, lora
):
    rows = unpaired(make_rows(4)) if data == "unpaired" else rows_for(make_rows, "kto", data)
    trainer, model, off = one_step(rows, lora, seeds=(5, 0), **KTO)
    kept = trainer.train_dataset.rows
    loss, drift = kto_by_hand(direct, model, off, kept)
    assert drift > 0.05  # else it is cut off at 0
    log = logs_of(trainer)[0]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-4)
    direct.agree(watch.gradients[0], direct.gradient(model, loss))
    if data == "unpaired":
        rewards = {True: [], False: []}
        for row in kept:
            logps, ref_logps, _ = scored(direct, model, off, row)
            rewards[row["probability"] == 1] += (BETA * (logps - ref_logps)).tolist()
        for name, label in (("chosen", True), ("rejected", False)):
            mean = sum(rewards[label]) / len(rewards[label])
            assert log[f"rewards/{name}"] == pytest.approx(mean, rel=1e-3, abs=1e-4)
        assert "rewards/margins" not in log
        assert "rewards/accuracies" not in log


@pytest.mark.parametrize("cut", [1, 2, 6])
def test_the_drift_of_kto_is_that_of_the_step_however_it_is_cut(
    make_trainer, make_model, tokenizer, make_rows, direct, watch, cut
):
    """And an evaluation's is that of each of its batches."""
    rows = make_rows(6, sizes=(2, 3), seed=4)
    trainer = make_trainer(
        rows,
        model=make_model(tokenizer, layers=2, seed=5),
        per_device_train_batch_size=6 // cut,
        per_device_eval_batch_size=6,
        gradient_accumulation_steps=cut,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        trainer_options={
            "callbacks": [watch],
            "ref_model": make_model(tokenizer, layers=2),
            "eval_dataset": rows,
        },
        **KTO,
    )
    evaluated = trainer.evaluate()
    trainer.train()

    @contextmanager
    def off():
        yield trainer.ref_model.double()

    loss, drift = kto_by_hand(direct, watch.models[0], off, trainer.train_dataset.rows)
    assert drift > 0.05
    direct.agree(watch.gradients[0], direct.gradient(watch.models[0], loss))
    assert evaluated["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_kto_learns_from_labels_of_single_completions(make_trainer, make_rows):
    rows = unpaired(make_rows(6, seed=3))
    trainer = make_trainer(
        rows, num_train_epochs=15, per_device_train_batch_size=6, **{**KTO, "undesirable_weight": 0.8}
    )
    before = trainer.predict(rows).predictions["rewards"][:, 0]
    trainer.train()
    after = trainer.predict(rows).predictions["rewards"][:, 0]
    gains = torch.tensor(after - before)
    good = torch.tensor([row["label"] for row in rows])
    assert float(gains[good].min()) > float(gains[~good].max())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "ab", "completion": "c"}, "training row 1: needs label"),
        ({"prompt": "ab", "completion": "c", "label": 0.5}, "label must be true of a desirable completion"),
        ({"completion": "c", "label": True}, "training row 1: needs prompt"),
    ],
)
def test_a_single_completion_that_says_too_little_is_refused(make_trainer, row, message):
    from softpref.errors import DataError

    with pytest.raises(DataError, match=message):
        make_trainer([{"prompt": "ab", "completion": "d", "label": False}, row], **KTO)


def test_kto_needs_two_rows_at_once(make_trainer, make_rows):
    from softpref.errors import ConfigError

    with pytest.raises(ConfigError, match="gradient_accumulation_steps must be at least 2"):
        make_trainer(make_rows(4), per_device_train_batch_size=1, **KTO)


@pytest.mark.parametrize("method", REFERENCE_FREE)
@pytest.mark.parametrize("cache", [False, True])
def test_what_needs_no_reference_loads_none(
    make_trainer, make_rows, monkeypatch, tmp_path, weights, method, cache
):
    """Nor copies or scores one, unless the KL term asks for it."""
    scored = []
    monkeypatch.setattr("softpref.spo.trainer.score_sequences", lambda *given, **options: scored.append(1))
    options = {"reference_cache": str(tmp_path / "cache")} if cache else {}
    held_out = make_rows(3, seed=2)
    trainer = make_trainer(
        make_rows(6), trainer_options={"eval_dataset": held_out}, beta=BETA, **options_of(method), **options
    )
    before = weights(trainer.model)
    trainer.train()
    assert trainer.ref_model is None
    assert not scored
    assert not (tmp_path / "cache").exists()
    assert float((weights(trainer.model) - before).abs().max()) > 1e-3
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_rewards/margins"]))
    regularised = make_trainer(make_rows(6), beta=BETA, kl_beta=0.1, output="kl", **options_of(method))
    assert regularised.ref_model is not None


def test_wins_of_a_row_are_over_its_others_and_of_its_extremes_over_all(make_trainer, make_rows):
    rows = make_rows(2, sizes=(2, 4), soft=True)
    whole, ends = (
        make_trainer(rows, beta=BETA, **options_of(method), output=method).train_dataset.rows
        for method in ("sppo", "extremes")
    )
    p = rows[0]["probability"]
    assert whole[0]["win_probabilities"] == pytest.approx([p, 1 - p])
    assert whole[1]["win_probabilities"] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert ends[0]["win_probabilities"] == pytest.approx([(p + 0.5) / 2, (1.5 - p) / 2])
    assert ends[1]["win_probabilities"] == pytest.approx([3.5 / 4, 0.5 / 4])
    assert ends[1]["completions"] == [whole[1]["completions"][0], whole[1]["completions"][3]]
    assert ends[1]["kind"] == "pairwise"


@pytest.mark.parametrize("method", ["spo", "anchored", "dpo", "ipo", "apo_zero", "simpo", "orpo"])
def test_offsets_of_rows_move_the_margins_of_the_loss(make_trainer, make_rows, logs_of, method):
    """One for all completions of a row changes nothing of a margin; others are another loss, and reward."""
    losses, margins = [], []
    for offsets in (None, [2.0, 2.0, 2.0], [1.0, 0.0, -0.5]):
        trainer = make_trainer(
            make_rows(4, sizes=(3,)),
            beta=0.0 if method in ("spo", "anchored") else BETA,
            per_device_train_batch_size=4,
            **options_of(method),
        )
        for row in trainer.train_dataset.rows if offsets else ():
            row["offsets"] = offsets
        trainer.train()
        (log,) = logs_of(trainer)
        losses.append(log["loss"])
        margins.append(log["rewards/margins"])
    if method != "apo_zero":  # its anchor is 0 for each completion
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert abs(losses[2] - losses[0]) > 0.01
    assert margins[1] == pytest.approx(margins[0], abs=1e-5)
    assert margins[2] == pytest.approx(margins[0] - 1.5, abs=1e-5)


class _Alphabet:
    """Likes what comes late in the alphabet."""

    name = description = fingerprint = "alphabet"

    def probabilities(self, prompts, first, second):
        return [0.9 if a > b else 0.1 if a < b else 0.5 for a, b in zip(first, second, strict=True)]
