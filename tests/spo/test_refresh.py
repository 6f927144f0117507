"""Samples between two refreshes: weighted by the policy's change, drawn anew when it was too large, kept."""

import math

import pytest
import torch
from softpref.spo.gauges import WeightSums

INTERVAL, SAMPLES, STEPS, BETA = 4, 22, 8, 0.4


@pytest.fixture
def train(make_trainer, make_rows, make_model, tokenizer, watch):
    """`train(cut=1, **options)`: eight steps over all rows at once, each watched."""

    def run(*, cut=1, rows=None, **options):
        rows = make_rows(6, soft=True) if rows is None else rows
        defaults = {
            "beta": BETA,
            "sampling_interval": INTERVAL,
            "samples_per_refresh": SAMPLES,
            "per_device_train_batch_size": len(rows) // cut,
            "gradient_accumulation_steps": cut,
            "train_sampling_strategy": "sequential",
            "num_train_epochs": STEPS,
            "max_grad_norm": 0.0,
            "optim": "sgd",
            "learning_rate": 0.003,
        }
        trainer = make_trainer(
            rows,
            trainer_options={
                "callbacks": [watch],
                "ref_model": make_model(tokenizer, layers=2, seed=5),
                **options.pop("trainer_options", {}),
            },
            **{**defaults, **options},
        )
        drawn = []
        refresh = trainer.buffer._refresh

        def recorded(step):
            refresh(step)
            drawn.append((step, list(trainer.buffer._samples)))

        trainer.buffer._refresh = recorded
        trainer.train()
        return trainer, drawn

    return run


def slices(drawn, size=SAMPLES, interval=INTERVAL):
    """The samples that each step ought to consume, `(step, age, samples)`, from what each refresh drew."""
    for step, samples in drawn:
        for place in range(interval):
            first, last = size * place // interval, size * (place + 1) // interval
            yield step + place, place, samples[first:last]


def preference_loss(direct, model, rows):
    """Soft preference loss of pairs at α = 1."""
    losses = []
    for row in rows:
        first, second = (direct.token_logps(model, row["prompt"], one).sum() for one in row["completions"])
        chances = torch.stack([first, second]).log_softmax(0)
        losses.append(-row["probability"] * chances[0] - (1 - row["probability"]) * chances[1])
    return sum(losses) / len(losses)


def kl_surrogate(direct, model, reference, samples, *, discount, cap=None, weighted=True):
    """`(loss, mean KL estimate, sequence weights)`: a loss whose gradient is the estimator's, token by token.

    A token at place t counts w_t = Π_{u<t} π/π_old, at most `cap`, and `discount` times less for each place
    that it lies behind another. Its baseline is the mean over the other samples of what they have behind t.
    """
    kls, logps, prefixes, tokens, totals = [], [], [], [], []
    for sample in samples:
        policy = direct.distributions(model, sample.prompt, sample.completion)
        with torch.no_grad():
            other = direct.distributions(reference, sample.prompt, sample.completion)
        kls.append((policy.exp() * (policy - other)).sum(-1))
        logps.append(policy[range(len(sample.completion)), sample.completion])
        changes = [
            math.exp(now.item() - then) for now, then in zip(logps[-1], sample.token_logps, strict=True)
        ]
        products = [math.prod(changes[:t]) if weighted else 1.0 for t in range(len(changes))]
        prefixes.append([min(product, cap or math.inf) for product in products])
        tokens.append(changes if weighted else [1.0] * len(changes))
        totals.append(math.prod(changes))
    behind = [
        [
            sum(discount ** (s - t) * ws[s] * ks[s].item() for s in range(t + 1, len(ws)))
            for t in range(len(samples[0].completion) + 64)
        ]
        for ws, ks in zip(prefixes, kls, strict=True)
    ]
    loss, value = torch.zeros((), dtype=torch.float64), 0.0
    for i, sample in enumerate(samples):
        for t in range(len(sample.completion)):
            loss = loss + prefixes[i][t] * kls[i][t]
            value += prefixes[i][t] * kls[i][t].item()
            if discount:
                others = [behind[j][t] for j in range(len(samples)) if j != i]
                baseline = sum(others) / len(others) if others else 0.0
                loss = loss + logps[i][t] * (behind[i][t] - prefixes[i][t] * tokens[i][t] * baseline)
    return loss / len(samples), value / len(samples), totals


def ess(weights):
    return sum(weights) ** 2 / sum(weight**2 for weight in weights) / len(weights)


@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize(("kl_gradient", "discount"), [("token", 0), ("full", 1), (0.7, 0.7)])
@pytest.mark.parametrize("cap", [None, math.inf, 1.02])
def test_each_step_takes_the_estimators_gradient_of_its_slice(
    train, direct, watch, logs_of, cap, kl_gradient, discount, cut
):
    trainer, drawn = train(cut=cut, kl_gradient=kl_gradient, max_importance_ratio=cap)
    assert [step for step, _ in drawn] == [0, 4]
    rows, reference = trainer.train_dataset.rows, trainer.ref_model.double()
    consumed, all_weights = list(slices(drawn)), []
    logs = logs_of(trainer)
    assert [log["sampling/age"] for log in logs] == [age for _, age, _ in consumed]
    for step, _, samples in consumed:
        if cut > 1 and step not in (2, 3):  # one fresh, one stale slice show how a step is cut
            continue
        model = watch.models[step]
        kl, value, weights = kl_surrogate(
            direct,
            model,
            reference,
            samples,
            discount=discount,
            cap=cap,
            weighted=cap is not None,
        )
        loss = preference_loss(direct, model, rows) + BETA * kl
        direct.agree(watch.gradients[step], direct.gradient(model, loss), 3e-4)
        assert logs[step]["kl/sequence"] == pytest.approx(value, rel=1e-3, abs=1e-4)
        assert logs[step]["sampling/ess"] == pytest.approx(ess(weights), rel=1e-3)
        all_weights += weights
    assert min(all_weights) < 0.7  # weights that matter
    assert max(all_weights) > 1.1  # and that a cap of 1.02 cuts


@pytest.mark.parametrize("cut", [1, 3])
def test_what_exceeds_the_limit_of_the_reverse_divergence_is_added(train, direct, watch, logs_of, cut):
    limit = 3.0
    trainer, drawn = train(cut=cut, reverse_kl_limit=limit)
    rows, reference, logs = trainer.train_dataset.rows, trainer.ref_model.double(), logs_of(trainer)
    divergences = []
    for step, _, samples in list(slices(drawn))[:3]:
        model = watch.models[step]
        kl, value, _ = kl_surrogate(direct, model, reference, samples, discount=0, weighted=False)
        excess = torch.zeros((), dtype=torch.float64)
        for sample in samples:
            policy, other = (
                direct.distributions(one, sample.prompt, sample.completion) for one in (model, reference)
            )
            for p, q in zip(policy, other.detach(), strict=True):
                divergence = sum(q[v].exp() * (q[v] - p[v]) for v in range(len(q)))
                divergences.append(divergence.item())
                if divergence > limit:
                    excess = excess + divergence - limit
        loss = preference_loss(direct, model, rows) + BETA * (kl + excess / len(samples))
        direct.agree(watch.gradients[step], direct.gradient(model, loss), 3e-4)
        assert logs[step]["kl/reverse_excess"] == pytest.approx(excess.item() / len(samples), rel=1e-3)
        assert logs[step]["kl/sequence"] == pytest.approx(value, rel=1e-3)  # without it
    assert min(divergences) < 0.8 * limit
    assert max(divergences) > 1.2 * limit


def test_a_policy_that_is_sure_of_what_the_reference_never_gives_comes_back_under_a_limit(
    train, make_model, tokenizer, logs_of
):
    kl = {}
    for limit in (None, 2.0):
        policy = make_model(tokenizer, layers=2, seed=5)  # the reference's weights
        head = torch.nn.Linear(policy.lm_head.in_features, policy.lm_head.out_features)
        head.weight.data.copy_(policy.lm_head.weight.data)
        head.bias.data.zero_()[tokenizer.convert_tokens_to_ids("h")] = 40.0
        policy.lm_head = head
        trainer, _ = train(
            model=policy, reverse_kl_limit=limit, beta=10.0, learning_rate=0.001, num_train_epochs=40
        )
        kl[limit] = [log["kl/sequence"] for log in logs_of(trainer)]
    assert min(kl[None]) > 30  # eight tokens, of some five nats each
    assert kl[2.0][:4] == pytest.approx(kl[None][:4])  # of the same samples
    assert max(kl[2.0][-8:]) < 15


def test_samples_know_what_the_policy_that_drew_them_thought(train, direct, watch):
    _, drawn = train()
    for step, samples in drawn:
        for sample in samples[:6]:
            logps = direct.token_logps(watch.models[step], sample.prompt, sample.completion)
            assert sample.token_logps == pytest.approx(logps.tolist(), abs=1e-4)


DRIFTING = {"learning_rate": 0.02, "sampling_interval": 4, "samples_per_refresh": 64}


def test_adaptive_refresh_draws_anew_at_the_step_after_a_small_ess(train, logs_of):
    trainer, drawn = train(**DRIFTING, refresh="adaptive", min_ess=0.7, num_train_epochs=12)
    logs = logs_of(trainer)
    fallen = [i for i, log in enumerate(logs) if log["sampling/ess"] < 0.7]
    assert fallen
    begun = 0
    for i, log in enumerate(logs):
        if i and (logs[i - 1]["sampling/ess"] < 0.7 or i - begun == 4):
            begun = i
        assert log["sampling/age"] == i - begun, i
    assert {log["sampling/age"] for log in logs} > {0, 1}  # not merely at every step
    assert any(i + 1 - step < 4 for step, _ in drawn for i in fallen if i >= step)  # nor only when due
    assert [step for step, _ in drawn] == [i for i, log in enumerate(logs) if log["sampling/age"] == 0]


def test_fixed_refresh_keeps_its_interval_whatever_the_ess(train, logs_of):
    trainer, drawn = train(**DRIFTING, min_ess=0.5, num_train_epochs=12)
    assert min(log["sampling/ess"] for log in logs_of(trainer)) < 0.5
    assert [step for step, _ in drawn] == [0, 4, 8]
    assert [log["sampling/age"] for log in logs_of(trainer)] == [0, 1, 2, 3] * 3


def test_a_drift_beyond_all_numbers_is_a_small_ess_and_no_perfect_one(train, logs_of):
    # so far that every weight of the old samples vanishes: alike in fp32, far apart in truth
    trainer, drawn = train(learning_rate=16.0, refresh="adaptive", num_train_epochs=3)
    assert logs_of(trainer)[1]["logps/chosen"] < -100
    assert logs_of(trainer)[1]["sampling/ess"] < 0.5
    assert [step for step, _ in drawn] == [0, 2]


def test_a_run_resumed_between_a_small_ess_and_its_refresh_ends_as_the_uninterrupted_one(
    train, logs_of, weights, make_trainer, make_rows, make_model, tokenizer, tmp_path
):
    options = {
        **DRIFTING,
        "refresh": "adaptive",
        "min_ess": 0.7,
        "num_train_epochs": 8,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": None,
    }
    whole, _ = train(**options)
    logs = logs_of(whole)
    fallen = next(i for i, log in enumerate(logs) if log["sampling/ess"] < 0.7 and log["sampling/age"] < 3)
    assert logs[fallen + 1]["sampling/age"] == 0
    rows = make_rows(6, soft=True)
    again = make_trainer(
        rows,
        beta=BETA,
        per_device_train_batch_size=6,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        optim="sgd",
        trainer_options={"ref_model": make_model(tokenizer, layers=2, seed=5)},
        **options,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{fallen + 1}"))
    for ours, theirs in zip(logs_of(again), logs, strict=True):
        assert ours["sampling/age"] == theirs["sampling/age"]
    torch.testing.assert_close(weights(again.model), weights(whole.model), rtol=0, atol=0)


@pytest.mark.parametrize("kl_gradient", ["token", "full"])
@pytest.mark.parametrize("interval", [1, 2, 4])
def test_slices_of_one_refresh_are_all_of_it_once(train, direct, watch, logs_of, interval, kl_gradient):
    # nothing moves: what the slices say together is what the refresh says at once
    trainer, drawn = train(
        learning_rate=0.0,
        sampling_interval=interval,
        samples_per_refresh=20,
        num_train_epochs=interval,
        kl_gradient=kl_gradient,
    )
    ((_, samples),) = drawn
    model, reference, rows = watch.models[0], trainer.ref_model.double(), trainer.train_dataset.rows
    cut = list(slices(drawn, 20, interval))
    assert [sample for _, _, share in cut for sample in share] == samples
    surrogates = [
        kl_surrogate(direct, model, reference, share, discount=float(kl_gradient == "full"))[:2]
        for _, _, share in cut
    ]
    preference = preference_loss(direct, model, rows)
    for step, (kl, _) in enumerate(surrogates):
        expected = direct.gradient(model, preference + BETA * kl)
        direct.agree(watch.gradients[step], expected, 3e-4)
    together, value, _ = kl_surrogate(direct, model, reference, samples, discount=0)
    found = [log["kl/sequence"] for log in logs_of(trainer)]
    assert sum(found) / interval == pytest.approx(value, rel=1e-4)
    if kl_gradient == "token":  # the baselines of `full` are the slice's own
        mean = sum(watch.gradients) / interval
        direct.agree(mean, direct.gradient(model, preference + BETA * together), 3e-4)


@pytest.mark.parametrize(
    ("kl_prompts", "expected"),
    [
        ("preferences", {"a", "b"}),
        ("separate", {"g", "h"}),
        ("auto", {"a", "b", "g", "h"}),
        ("both", {"a", "b", "g", "h"}),
    ],
)
def test_the_kl_terms_prompts_are_those_asked_for_and_of_two_sets_half_from_each(
    train, tokenizer, kl_prompts, expected
):
    rows = [{"prompt": prompt, "completions": ["c", "dd"], "probability": 0.5} for prompt in "aab"]
    _, drawn = train(
        rows=rows,
        kl_prompts=kl_prompts,
        samples_per_refresh=60,
        num_train_epochs=1,
        trainer_options={"prompt_dataset": [{"prompt": "g"}, {"prompt": "h"}]},
    )
    prompts = [tokenizer.decode(sample.prompt[1:]) for sample in drawn[0][1]]
    assert set(prompts) == expected
    if "a" in expected:
        assert prompts.count("a") == 2 * prompts.count("b")
    if len(expected) == 4:
        assert prompts.count("g") == prompts.count("h") == 15
        assert len(prompts) == 60


@pytest.mark.parametrize(("interval", "micro_batches"), [(1, 1), (4, 1), (1, 3)])
def test_beta_weighs_the_mean_kl_over_each_of_two_sets_of_prompts(
    train, direct, watch, tokenizer, interval, micro_batches
):
    trainer, drawn = train(
        per_device_train_batch_size=6 // micro_batches,
        gradient_accumulation_steps=micro_batches,
        learning_rate=0.0,
        sampling_interval=interval,
        samples_per_refresh=24,
        num_train_epochs=interval,
        trainer_options={"prompt_dataset": [{"prompt": "g"}, {"prompt": "hh"}, {"prompt": "ggg"}]},
    )
    ((_, samples),) = drawn
    model, reference, rows = watch.models[0], trainer.ref_model.double(), trainer.train_dataset.rows
    further = {tuple(tokenizer("ghhggg"[i:j]).input_ids) for i, j in ((0, 1), (1, 3), (3, 6))}
    sets = [[s for s in samples if (tuple(s.prompt) in further) is own] for own in (False, True)]
    assert [len(own) for own in sets] == [12, 12]
    kls = [kl_surrogate(direct, model, reference, own, discount=0)[0] for own in sets]
    expected = direct.gradient(model, preference_loss(direct, model, rows) + BETA * sum(kls))
    direct.agree(sum(watch.gradients) / interval, expected, 3e-4)


def test_a_prompt_of_the_kl_term_that_has_no_room_is_refused_before_training(make_trainer, make_rows):
    from softpref.errors import ConfigError

    with pytest.raises(ConfigError, match="do not fit the model's 256 positions"):
        make_trainer(
            make_rows(4),
            max_prompt_length=300,
            trainer_options={"prompt_dataset": [{"prompt": "a"}, {"prompt": "ab" * 125}]},
        )


@pytest.mark.parametrize(("plain", "runs"), [(False, 2), (True, 6)])
def test_the_reference_runs_once_a_refresh(make_trainer, make_model, make_rows, tokenizer, plain, runs):
    reference, counted = make_model(tokenizer, layers=2, seed=5), []
    trainer = make_trainer(
        make_rows(48),
        sampling_interval=3,
        max_steps=6,
        plain_forward=plain,
        trainer_options={"ref_model": reference},
    )
    reference.model.embed_tokens.register_forward_pre_hook(
        lambda module, inputs: counted.append(inputs[0].numel()) if inputs[0].numel() > 20 else None
    )
    trainer.train()
    assert len(counted) == runs


def test_the_effective_sample_size_is_its_formula_however_the_weights_come():
    def gather(sums):
        return sums

    sums = WeightSums("cpu")
    assert sums.take(gather) is None
    for values, expected in [([1.0, 2.0, 3.0], 36 / (3 * 14)), ([5.0] * 4, 1.0), ([1.0, 3.0], 16 / (2 * 10))]:
        for value in values:
            sums.add(torch.tensor([value]).log())
        assert sums.take(gather) == pytest.approx(expected, rel=1e-6)
    sums.add(torch.tensor([900.0, 0.0, 0.0, 0.0]))  # whose exponentials leave every float's range
    assert sums.take(gather) == pytest.approx(0.25)
