"""The KL estimators against the true gradient, by enumeration of every output of a small table model."""

import itertools

import pytest
import torch
from softpref.objectives import effective_sample_size, kl_loss, kl_per_token, reward_to_go


class Table:
    """An autoregressive model that keeps the logits of every prefix; `end` may stop a completion early."""

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

    def chances(self):
        return self.logps(self.completions).exp().detach()

    def gradient(self, value):
        return torch.autograd.grad(value, self.logits, retain_graph=True)[0].flatten()

    def true_gradient(self):
        logps = self.logps(self.completions)
        reference = self.logps(self.completions, self.reference)
        return self.gradient((logps.exp() * (logps - reference)).sum())

    def loss(self, completions, kl_gradient, **options):
        return kl_loss(
            self.token_kl(completions),
            self.token_logps(completions),
            torch.tensor([len(completion) for completion in completions]),
            kl_gradient=kl_gradient,
            **options,
        )

    def expected_gradient(self, kl_gradient):
        """Of one sampled completion: Σ_y π(y) ∇ loss(y)."""
        losses = torch.cat([self.loss([completion], kl_gradient) for completion in self.completions])
        return self.gradient((self.chances() * losses).sum())


@pytest.fixture(params=[None, 0], ids=["fixed length", "ends early"])
def table(request):
    return Table(4, 3, end=request.param)


def test_the_table_model_is_a_distribution(table):
    assert float(table.chances().sum()) == pytest.approx(1, rel=1e-12)


def test_full_is_the_true_gradient_in_expectation(table):
    expected, true = table.expected_gradient("full"), table.true_gradient()
    assert float((expected - true).norm() / true.norm()) < 1e-9
    assert float(torch.cosine_similarity(expected, true, dim=0)) >= 0.999


def test_token_is_the_gradient_with_prefixes_held_fixed_which_is_not_the_true_one(table):
    # Σ over prefixes of P(prefix reached), held fixed, times KL of the next token
    reached = torch.tensor(
        [
            sum(
                float(chance)
                for chance, completion in zip(table.chances(), table.completions, strict=True)
                if completion[: len(prefix)] == prefix
            )
            for prefix in table.prefixes
        ],
        dtype=torch.float64,
    )
    held = table.gradient((reached * kl_per_token(table.logits, table.reference)).sum())
    expected, true = table.expected_gradient("token"), table.true_gradient()
    torch.testing.assert_close(expected, held, rtol=1e-10, atol=1e-12)
    assert 0.1 < float((expected - true).norm() / true.norm()) < 0.9
    assert 0.5 < float(torch.cosine_similarity(expected, true, dim=0)) < 0.99


@pytest.mark.parametrize("kl_gradient", ["token", "full"])
def test_the_value_is_the_kl_in_expectation(table, kl_gradient):
    losses = torch.cat([table.loss([completion], kl_gradient) for completion in table.completions])
    logps = table.logps(table.completions)
    true = (logps.exp() * (logps - table.logps(table.completions, table.reference))).sum()
    assert (table.chances() * losses).sum().item() == pytest.approx(true.item(), rel=1e-12)


def test_the_baseline_of_the_others_leaves_the_expectation_unchanged():
    table = Table(3, 3, end=0)
    chances = table.chances()
    expected = sum(
        chances[i] * chances[j] * table.loss([table.completions[i], table.completions[j]], "full").mean()
        for i, j in itertools.product(range(len(chances)), repeat=2)
    )
    torch.testing.assert_close(table.gradient(expected), table.true_gradient(), rtol=1e-9, atol=1e-11)


def test_the_baseline_of_the_others_lowers_the_variance(table):
    generator = torch.Generator().manual_seed(3)
    single = [table.gradient(table.loss([c], "full").sum()) for c in table.completions]
    chances, true = table.chances(), table.true_gradient()
    with_baseline, without = [], []
    for _ in range(300):
        drawn = torch.multinomial(chances, 8, replacement=True, generator=generator).tolist()
        gradient = table.gradient(table.loss([table.completions[i] for i in drawn], "full").mean())
        with_baseline.append(((gradient - true) ** 2).sum())
        without.append(((torch.stack([single[i] for i in drawn]).mean(0) - true) ** 2).sum())
    assert float(torch.stack(with_baseline).mean()) < 0.9 * float(torch.stack(without).mean())


def test_parts_of_a_step_with_the_totals_of_the_whole_have_the_gradient_of_the_whole(table):
    drawn = [table.completions[i] for i in (0, 5, 11, 2, 8)]
    lengths = torch.tensor([len(completion) for completion in drawn])
    total = reward_to_go(table.token_kl(drawn), lengths).sum(0)
    whole = table.gradient(table.loss(drawn, "full").sum())
    options = {"to_go_total": total, "sequences": len(drawn)}
    parts = sum(
        table.gradient(table.loss(part, "full", **options).sum())
        for part in (drawn[:1], drawn[1:3], drawn[3:])
    )
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)


def test_reward_to_go_sums_what_comes_after_each_token():
    lengths = torch.tensor([3, 1, 2])
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], requires_grad=True)
    to_go = reward_to_go(values, lengths)
    assert to_go.tolist() == [[6, 4, 0], [0, 0, 0], [32, 0, 0]]
    assert not to_go.requires_grad


def test_token_kl_equals_brute_force_and_is_nothing_between_equals():
    generator = torch.Generator().manual_seed(1)
    logits, reference = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) * 3
    p, q = logits.softmax(-1), reference.softmax(-1)
    by_hand = [
        sum(float(p[t, v]) * float((p[t, v] / q[t, v]).log()) for v in range(7)) for t in range(len(p))
    ]
    assert kl_per_token(logits, reference).tolist() == pytest.approx(by_hand, rel=1e-12)
    assert float(kl_per_token(logits, logits + 3).abs().max()) < 1e-12


def test_effective_sample_size_of_closed_cases():
    assert float(effective_sample_size(torch.full((5,), -700.0))) == pytest.approx(1.0)
    assert float(effective_sample_size(torch.tensor([900.0, 0.0, 0.0, 0.0]))) == pytest.approx(0.25)
    weights = torch.tensor([1.0, 2.0, 3.0])
    assert float(effective_sample_size(weights.log())) == pytest.approx(36 / (3 * 14))


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="'token' or 'full'"):
        kl_loss(torch.ones(1), torch.zeros(1), torch.tensor([1]), kl_gradient="k3")
