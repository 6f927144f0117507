"""The KL estimators against the true gradient, by enumeration of every output of a small table model."""

import itertools
import math

import numpy as np
import pytest
import torch
from softpref.objectives import (
    kl_loss,
    kl_per_token,
    prefix_ratios,
    reward_to_go,
)

pytestmark = pytest.mark.fast


class Table:
    """An autoregressive model that keeps the logits of every prefix; `end` may stop a completion early.

    `logits` are the policy's, `reference` the reference's, `old` those of an earlier policy, which drew the
    stale samples: each `[prefixes, vocabulary]`.
    """

    def __init__(self, vocabulary, length, *, end=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.prefixes = [
            prefix
            for t in range(length)
            for prefix in itertools.product(range(vocabulary), repeat=t)
            if end not in prefix
        ]
        self.index = {prefix: i for i, prefix in enumerate(self.prefixes)}
        shape = (len(self.prefixes), vocabulary)
        self.logits = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(True)
        self.reference = torch.randn(shape, generator=generator, dtype=torch.float64)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.old = self.logits.detach() + 0.5 * noise
        self.completions = [
            (*prefix, token)
            for prefix in self.prefixes
            for token in range(vocabulary)
            if token == end or len(prefix) == length - 1
        ]

    def rows(self, completions):
        return [self.index[completion[:t]] for completion in completions for t in range(len(completion))]

    def token_kl(self, completions):
        rows = self.rows(completions)
        return kl_per_token(self.logits[rows], self.reference[rows])

    def token_logps(self, completions, logits=None):
        logits = self.logits if logits is None else logits
        tokens = [token for completion in completions for token in completion]
        return logits[self.rows(completions)].log_softmax(-1)[range(len(tokens)), tokens]

    def logps(self, completions, logits=None):
        parts = self.token_logps(completions, logits).split([len(c) for c in completions])
        return torch.stack([part.sum() for part in parts])

    def chances(self, logits=None):
        return self.logps(self.completions, logits).exp().detach()

    def draw(self, count, generator, logits=None):
        places = torch.multinomial(self.chances(logits), count, replacement=True, generator=generator)
        return [self.completions[i] for i in places.tolist()]

    def gradient(self, value):
        return torch.autograd.grad(value, self.logits, retain_graph=True)[0].flatten()

    def kl_by_hand(self, logits):
        """Σ_y π(y) log(π(y) / π_ref(y)) in numpy, by enumeration."""
        logps, ref_logps = (
            each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in (logits, self.reference.numpy())
        )
        total = 0.0
        for completion in self.completions:
            steps = [(self.index[completion[:t]], token) for t, token in enumerate(completion)]
            logp, ref_logp = (sum(each[step] for step in steps) for each in (logps, ref_logps))
            total += math.exp(logp) * (logp - ref_logp)
        return total

    def true_gradient(self):
        """Of that KL, by central differences."""
        logits, width = self.logits.detach().numpy(), 1e-4
        gradient = np.empty_like(logits)
        for place in np.ndindex(*logits.shape):
            step = np.zeros_like(logits)
            step[place] = width
            gradient[place] = (self.kl_by_hand(logits + step) - self.kl_by_hand(logits - step)) / (2 * width)
        return torch.from_numpy(gradient.flatten())

    def loss(self, completions, kl_gradient, *, stale=False, **options):
        if stale:
            options["old_token_logps"] = self.token_logps(completions, self.old)
        return kl_loss(
            self.token_kl(completions),
            self.token_logps(completions),
            torch.tensor([len(completion) for completion in completions]),
            kl_gradient=kl_gradient,
            **options,
        )

    def expected_loss(self, kl_gradient, *, drawn_by=None, **options):
        """Of one sampled completion: Σ_y π(y) loss(y), π being the policy or one that drew stale samples."""
        losses = torch.cat([self.loss([one], kl_gradient, **options) for one in self.completions])
        return (self.chances(drawn_by) * losses).sum()

    def expected_gradient(self, kl_gradient, **options):
        return self.gradient(self.expected_loss(kl_gradient, **options))


TABLES = {name: Table(4, 3, end=end) for name, end in (("fixed length", None), ("ends early", 0))}
TRUE = {name: table.true_gradient() for name, table in TABLES.items()}


@pytest.fixture(params=TABLES)
def name(request):
    return request.param


@pytest.fixture
def table(name):
    return TABLES[name]


@pytest.fixture
def true(name):
    return TRUE[name]


def error(gradient, true):
    return float((gradient - true).norm() / true.norm())


def cosine(gradient, true):
    return float(torch.cosine_similarity(gradient, true, dim=0))


def test_the_table_model_is_a_distribution(table):
    assert float(table.chances().sum()) == pytest.approx(1, rel=1e-12)
    assert float(table.chances(table.old).sum()) == pytest.approx(1, rel=1e-12)


def test_full_is_the_true_gradient_in_expectation(table, true):
    expected = table.expected_gradient("full")
    assert error(expected, true) < 1e-6
    assert cosine(expected, true) >= 0.999


def test_full_of_weighted_samples_of_an_earlier_policy_is_the_true_gradient_too(table, true):
    weighted = table.expected_gradient("full", drawn_by=table.old, stale=True)
    assert error(weighted, true) < 1e-6
    without_weights = table.expected_gradient("full", drawn_by=table.old)
    assert error(without_weights, true) > 0.1


def test_token_is_the_gradient_with_prefixes_held_fixed_which_is_not_the_true_one(table, true):
    # Σ over prefixes of P(prefix reached), held fixed, times KL of the next token
    reached = torch.zeros(len(table.prefixes), dtype=torch.float64)
    for chance, completion in zip(table.chances(), table.completions, strict=True):
        reached[table.rows([completion])] += chance
    held = table.gradient((reached * kl_per_token(table.logits, table.reference)).sum())
    expected = table.expected_gradient("token")
    torch.testing.assert_close(expected, held, rtol=1e-10, atol=1e-12)
    assert 0.3 < error(expected, true) < 0.9
    assert 0.5 < cosine(expected, true) < 0.98
    stale = table.expected_gradient("token", drawn_by=table.old, stale=True)
    torch.testing.assert_close(stale, held, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
@pytest.mark.parametrize("discount", [0.0, 0.3, 0.8, 1.0])
def test_between_token_and_full_what_comes_later_counts_less(table, discount, stale):
    """Σ_t ∇KL_t + Σ_t ∇log π(y_t) Σ_{s>t} λ^{s−t} KL_s in expectation, written out token by token."""
    expected = torch.zeros((), dtype=torch.float64)
    for chance, completion in zip(table.chances(), table.completions, strict=True):
        kls, logps = table.token_kl([completion]), table.token_logps([completion])
        for t in range(len(completion)):
            later = sum(discount ** (s - t) * kls[s].item() for s in range(t + 1, len(completion)))
            expected = expected + chance * (kls[t] + logps[t] * later)
    options = {"drawn_by": table.old, "stale": True} if stale else {}
    found = table.expected_gradient(discount, **options)
    torch.testing.assert_close(found, table.gradient(expected), rtol=1e-10, atol=1e-12)


def test_zero_is_token_and_one_is_full(table):
    drawn = [table.completions[i] for i in (0, 5, 11, 2, 8)]
    gradients = {
        name: table.gradient(table.loss(drawn, name).mean()) for name in ("token", "full", 0, 1, 0.5)
    }
    torch.testing.assert_close(gradients[0], gradients["token"], rtol=0, atol=0)
    torch.testing.assert_close(gradients[1], gradients["full"], rtol=0, atol=0)
    for end in (0, 1):
        assert error(gradients[0.5], gradients[end]) > 0.01
    values = [table.loss(drawn, name) for name in ("token", 0.5, "full")]
    torch.testing.assert_close(values[1], values[0], rtol=1e-12, atol=0)


def test_the_larger_lambda_the_less_bias_and_the_more_variance(table, true):
    biases, variances = [], []
    for discount in (0.0, 0.4, 0.8, 1.0):
        chances = table.chances()
        single = torch.stack([table.gradient(table.loss([one], discount).sum()) for one in table.completions])
        mean = chances @ single
        biases.append(error(mean, true))
        variances.append(float(chances @ ((single - mean) ** 2).sum(1)))
    assert biases == sorted(biases, reverse=True)
    assert variances == sorted(variances)
    assert biases[-1] < 1e-6 < biases[-2]


def test_token_has_the_expected_gradient_of_half_the_squared_log_ratios(table):
    # "k2", ½ Σ_t log²(π/π_ref)(y_t) of the sampled tokens alone
    ratios = [
        table.token_logps([one]) - table.token_logps([one], table.reference) for one in table.completions
    ]
    k2 = torch.stack([0.5 * (ratio**2).sum() for ratio in ratios])
    expected = table.gradient((table.chances() * k2).sum())
    torch.testing.assert_close(table.expected_gradient("token"), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kl_gradient", ["token", 0.7, "full"])
def test_the_value_is_the_kl_in_expectation_of_fresh_and_of_weighted_samples(table, kl_gradient):
    true = table.kl_by_hand(table.logits.detach().numpy())
    assert table.expected_loss(kl_gradient).item() == pytest.approx(true, rel=1e-12)
    stale = table.expected_loss(kl_gradient, drawn_by=table.old, stale=True)
    assert stale.item() == pytest.approx(true, rel=1e-12)
    unweighted = table.expected_loss(kl_gradient, drawn_by=table.old)
    assert unweighted.item() != pytest.approx(true, rel=0.01)


@pytest.mark.parametrize("kl_gradient", ["full", 0.6])
@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
def test_the_baseline_of_the_others_leaves_the_expectation_unchanged(stale, kl_gradient):
    # every pair of completions that may be drawn together
    table = TABLES["ends early"]
    chances = table.chances(table.old if stale else None)
    pairs = list(itertools.product(range(len(chances)), repeat=2))
    losses = torch.stack(
        [
            table.loss([table.completions[i], table.completions[j]], kl_gradient, stale=stale).mean()
            for i, j in pairs
        ]
    )
    weights = torch.tensor([float(chances[i] * chances[j]) for i, j in pairs], dtype=torch.float64)
    without = TRUE["ends early"] if kl_gradient == "full" else table.expected_gradient(kl_gradient)
    assert error(table.gradient((weights * losses).sum()), without) < 1e-6


@pytest.mark.parametrize("cap", [None, 1.2])
def test_the_baseline_adds_no_bias_to_truncated_weights(cap):
    table = Table(3, 3, end=0)
    options = {"stale": True, "max_importance_ratio": cap}
    chances = table.chances(table.old)
    with_baseline = sum(
        chances[i]
        * chances[j]
        * table.loss([table.completions[i], table.completions[j]], "full", **options).mean()
        for i, j in itertools.product(range(len(chances)), repeat=2)
    )
    without = table.expected_gradient("full", drawn_by=table.old, **options)
    torch.testing.assert_close(table.gradient(with_baseline), without, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
def test_the_baseline_of_the_others_lowers_the_variance(table, true, stale):
    generator = torch.Generator().manual_seed(3)
    single = {one: table.gradient(table.loss([one], "full", stale=stale).sum()) for one in table.completions}
    with_baseline, without = [], []
    for _ in range(300):
        drawn = table.draw(8, generator, table.old if stale else None)
        gradient = table.gradient(table.loss(drawn, "full", stale=stale).mean())
        with_baseline.append(((gradient - true) ** 2).sum())
        without.append(((torch.stack([single[one] for one in drawn]).mean(0) - true) ** 2).sum())
    assert float(torch.stack(with_baseline).mean()) < 0.9 * float(torch.stack(without).mean())


def sampled_gradients(table, kl_gradient, *, drawn_by=None, **options):
    """Gradients of 500 steps of 64 completions each, `[500, parameters]`."""
    generator = torch.Generator().manual_seed(1)
    steps = [table.draw(64, generator, drawn_by) for _ in range(500)]
    return torch.stack([table.gradient(table.loss(drawn, kl_gradient, **options).mean()) for drawn in steps])


def standard_errors_off(gradients, true):
    """How far the mean lies from the truth in each parameter, in standard errors of the mean."""
    standard_errors = gradients.std(0) / len(gradients) ** 0.5
    return ((gradients.mean(0) - true) / standard_errors.clamp_min(1e-12)).abs()


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
def test_sampled_full_gradients_have_the_true_one_as_their_mean(stale):
    table, true = TABLES["ends early"], TRUE["ends early"]
    gradients = sampled_gradients(table, "full", drawn_by=table.old if stale else None, stale=stale)
    assert float(standard_errors_off(gradients, true).max()) <= 3
    assert cosine(gradients.mean(0), true) >= 0.999


@pytest.mark.parametrize(
    ("kl_gradient", "stale"), [("full", True), ("token", False)], ids=["no weights", "token"]
)
def test_so_do_neither_stale_samples_without_weights_nor_the_token_estimator(kl_gradient, stale):
    table, true = TABLES["ends early"], TRUE["ends early"]
    gradients = sampled_gradients(table, kl_gradient, drawn_by=table.old if stale else None)
    assert float(standard_errors_off(gradients, true).max()) > 10
    assert cosine(gradients.mean(0), true) < 0.99


def test_truncation_bounds_the_weights_and_its_bias_lies_between_none_and_that_of_no_weights(table, true):
    lengths = torch.tensor([len(one) for one in table.completions])
    now, old = table.token_logps(table.completions), table.token_logps(table.completions, table.old)
    assert float(prefix_ratios(now, old, lengths).max()) > 2
    errors = []
    for cap in (None, 2.0, 1.5, 1.2):
        weights = prefix_ratios(now, old, lengths, max_ratio=cap)
        assert cap is None or float(weights.max()) <= cap * (1 + 1e-12)
        gradient = table.expected_gradient("full", drawn_by=table.old, stale=True, max_importance_ratio=cap)
        errors.append(error(gradient, true))
    without_weights = error(table.expected_gradient("full", drawn_by=table.old), true)
    assert errors[0] < 1e-6 < errors[1] < errors[2] < errors[3] < without_weights


@pytest.mark.parametrize(("kl_gradient", "discount"), [("full", 1.0), (0.6, 0.6)])
@pytest.mark.parametrize("options", [{}, {"stale": True}, {"stale": True, "max_importance_ratio": 1.1}])
def test_parts_of_a_step_with_the_totals_of_the_whole_have_the_gradient_of_the_whole(
    table, options, kl_gradient, discount
):
    drawn = [table.completions[i] for i in (0, 5, 11, 2, 8)]
    lengths = torch.tensor([len(completion) for completion in drawn])
    weights = 1.0
    if options:
        now, old = table.token_logps(drawn), table.token_logps(drawn, table.old)
        weights = prefix_ratios(now, old, lengths, max_ratio=options.get("max_importance_ratio"))
    total = reward_to_go(weights * table.token_kl(drawn), lengths, discount).sum(0)
    whole = table.loss(drawn, kl_gradient, **options)
    parts = [
        table.loss(part, kl_gradient, to_go_total=total, sequences=len(drawn), **options)
        for part in (drawn[:1], drawn[1:3], drawn[3:])
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-14)
    for i, value in enumerate(torch.cat(parts)):
        torch.testing.assert_close(table.gradient(value), table.gradient(whole[i]), rtol=1e-12, atol=1e-14)


def test_samples_of_the_policy_itself_weigh_one(table):
    drawn = [table.completions[i] for i in (3, 7, 1, 9)]
    own = table.token_logps(drawn).detach()
    for kl_gradient in ("token", "full"):
        fresh = table.loss(drawn, kl_gradient)
        weighted = table.loss(drawn, kl_gradient, old_token_logps=own, max_importance_ratio=2.0)
        torch.testing.assert_close(weighted, fresh, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            table.gradient(weighted.sum()), table.gradient(fresh.sum()), rtol=1e-12, atol=1e-14
        )


def test_prefix_ratios_are_products_over_the_tokens_before_and_carry_no_gradient():
    lengths = torch.tensor([3, 1, 4])
    now = torch.tensor([0.5, 0.2, 0.9, 0.3, 0.8, 0.4, 0.1, 0.6]).log().requires_grad_(True)
    old = torch.tensor([0.25, 0.4, 0.3, 0.9, 0.2, 0.1, 0.8, 0.2]).log()
    ratios = prefix_ratios(now, old, lengths)
    assert ratios.tolist() == pytest.approx([1, 2, 1, 1, 1, 4, 16, 2])
    assert not ratios.requires_grad
    truncated = prefix_ratios(now, old, lengths, max_ratio=3.0)
    assert truncated.tolist() == pytest.approx([1, 2, 1, 1, 1, 3, 3, 2])


def test_prefix_ratios_of_long_completions_are_exact_in_fp32_beside_one_that_has_become_impossible():
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([1000, 3, 700, 1000])
    old = -5 * torch.rand(int(lengths.sum()), generator=generator)
    now = old + 0.02 * torch.randn(len(old), generator=generator)
    now[:1000] -= 5
    expected = torch.cat(
        [
            torch.cat([torch.zeros(1, dtype=torch.float64), part.cumsum(0)[:-1]]).exp()
            for part in (now.double() - old.double()).split(lengths.tolist())
        ]
    )
    found = prefix_ratios(now, old, lengths)
    torch.testing.assert_close(found.double(), expected, rtol=5e-5, atol=1e-6)


def test_reward_to_go_sums_what_comes_after_each_token():
    lengths = torch.tensor([3, 1, 2])
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], requires_grad=True)
    to_go = reward_to_go(values, lengths)
    assert to_go.tolist() == [[6, 4, 0], [0, 0, 0], [32, 0, 0]]
    assert not to_go.requires_grad
    assert reward_to_go(values, lengths, 0.5).tolist() == [[2, 2, 0], [0, 0, 0], [16, 0, 0]]
    assert reward_to_go(values, lengths, 0.0).tolist() == [[0, 0, 0]] * 3


@pytest.mark.parametrize("discount", [0.5, 0.95, 1.0])
def test_reward_to_go_of_long_completions_is_exact_in_fp32(discount):
    generator = torch.Generator().manual_seed(4)
    lengths = torch.tensor([700, 1, 513, 1024])
    values = torch.rand(int(lengths.sum()), generator=generator)
    found = reward_to_go(values, lengths, discount).double()
    for row, part in zip(found, values.double().split(lengths.tolist()), strict=True):
        behind = 0.0
        for t in reversed(range(len(part))):
            assert float(row[t]) == pytest.approx(behind, rel=1e-5)
            behind = discount * (float(part[t]) + behind)
        assert not row[len(part) :].any()


def test_token_kl_equals_brute_force_and_is_nothing_between_equals():
    generator = torch.Generator().manual_seed(1)
    logits, reference = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) * 3
    p, q = logits.softmax(-1), reference.softmax(-1)
    by_hand = [
        sum(float(p[t, v]) * float((p[t, v] / q[t, v]).log()) for v in range(7)) for t in range(len(p))
    ]
    assert kl_per_token(logits, reference).tolist() == pytest.approx(by_hand, rel=1e-12)
    assert float(kl_per_token(logits, logits + 3).abs().max()) < 1e-12


def test_token_kl_of_extreme_logits_is_finite_and_that_of_float64():
    logits = torch.tensor([[0.0, -1e5, 3.0], [1e5, 0.0, -1e5], [5.0, 5.0, 5.0]], requires_grad=True)
    reference = torch.tensor([[-1e4, 0.0, 1.0], [0.0, 7.0, 1e5], [0.0, -1e5, 0.0]])
    found = kl_per_token(logits, reference)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    double = logits.detach().double().requires_grad_(True)
    expected = kl_per_token(double, reference.double())
    (expected_gradient,) = torch.autograd.grad(expected.sum(), double)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    # p (log p/q − KL) of a certain token: the difference of two numbers of 1e5, each rounded
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-6, atol=1e-2)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("unknown", ["k3", -0.1, 1.5, math.nan])
def test_an_unknown_estimator_is_refused(unknown):
    with pytest.raises(ValueError, match=r"'token', 'full' or a number in \[0, 1\]"):
        kl_loss(torch.ones(1), torch.zeros(1), torch.tensor([1]), kl_gradient=unknown)
