"""What models say, and exact figures, against enumeration and closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from softpref.errors import ConfigError
from softpref.evaluation.exact import (
    Objective,
    draw_groups,
    entropy,
    exact_figures,
    exact_prompt,
    optimum,
    pair_probabilities,
    softmax_frontier,
    trained_objective,
    why_unknown,
)
from softpref.evaluation.measure import divergences, draw
from softpref.evaluation.models import check_same_vocabulary
from softpref.judges.outcomes import Outcomes
from softpref.lm.sampling import Sample
from softpref.lm.scoring import score_sequences
from softpref.objectives import dpo_loss, ipo_loss, ordered_pairs, preference_loss
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.fast


def llama(seed, vocabulary=5):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.4,
        )
    ).eval()


PROMPT, PAD = [3, 4, 3], 0


def score(model, completions, prompt=PROMPT, **options):
    return score_sequences(model, [(prompt, completion) for completion in completions], **options).numpy()


def test_shared_prompt_gives_the_same_scores_as_whole_sequences():
    model = llama(0)
    completions = [list(c) for n in (1, 2, 4) for c in itertools.product(range(3), repeat=n)]
    shared = score(model, completions, batch_size=7)
    whole = score(model, completions, plain=True)
    np.testing.assert_allclose(shared, whole, atol=1e-5)


def test_kl_and_entropy_estimates_have_the_true_values_as_their_expectation():
    """Over every sequence of three tokens, weighted by its probability, nothing is left to chance."""
    policy, reference = llama(0), llama(1)
    sequences = [list(c) for c in itertools.product(range(5), repeat=3)]
    ours, theirs = score(policy, sequences), score(reference, sequences)
    samples = [Sample(PROMPT, c, 0.0, True) for c in sequences]
    found = divergences(policy, reference, samples, batch_size=50)
    weights = np.exp(ours)
    assert weights.sum() == pytest.approx(1.0, abs=1e-5)
    assert weights @ found.kl == pytest.approx(weights @ (ours - theirs), abs=1e-5)
    assert weights @ found.entropy == pytest.approx(-(weights @ ours), abs=1e-5)
    np.testing.assert_allclose(found.surprisal, -theirs, atol=1e-5)


def test_samples_follow_the_models_own_distribution_and_the_seed():
    model = llama(0)
    options = {"max_new_tokens": 1, "stop_ids": [1], "batch_size": 500}
    groups = draw(model, [PROMPT, [2]], 2000, seed=7, **options)
    assert [len(group) for group in groups] == [2000, 2000]
    counts = np.bincount([sample.completion[0] for sample in groups[1]], minlength=5) / 2000
    truth = np.exp(score(model, [[token] for token in range(5)], prompt=[2]))
    assert np.abs(counts - truth).max() < 4 * math.sqrt(0.25 / 2000)
    assert draw(model, [PROMPT, [2]], 2000, seed=7, **options) == groups


def test_models_of_different_vocabularies_are_refused():
    with pytest.raises(ConfigError, match="5 tokens, the reference 6"):
        check_same_vocabulary(llama(0), llama(0, vocabulary=6))


REWARDS = np.array([0.0, 1.0, -0.5, 2.0])
OUTCOMES = Outcomes(["a", "b", "c", "d"], REWARDS, np.full(4, 0.25))
REFERENCE = np.log(np.array([0.4, 0.3, 0.2, 0.1]) * 0.9)  # nine tenths of the mass on the set


def softmax(values):
    return np.exp(values - values.max()) / np.exp(values - values.max()).sum()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_a_policy_at_the_optimum_has_no_divergence_from_it(alpha):
    target = softmax(REWARDS / alpha)
    policy = np.log(target * 0.8)
    found = exact_prompt(OUTCOMES, policy, REFERENCE, Objective("spo", alpha, beta=0.0))
    figures = exact_figures([found])
    assert figures["kl_optimum_to_policy"].value == pytest.approx(0.0, abs=1e-9)
    assert figures["entropy"].value == pytest.approx(-(target @ np.log(target)))
    assert figures["optimum_entropy"].value == pytest.approx(figures["entropy"].value)
    assert figures["expected_reward"].value == pytest.approx(target @ REWARDS)
    assert figures["mass_on_set"].value == pytest.approx(0.8)


def test_the_optimum_of_dpo_is_the_tilted_reference():
    found = exact_prompt(OUTCOMES, REFERENCE, REFERENCE, Objective("dpo", beta=0.5))
    tilted = softmax(REFERENCE + REWARDS / 0.5)
    np.testing.assert_allclose(np.exp(found.optimum), tilted)
    divergence = tilted @ (np.log(tilted) - np.log(np.exp(REFERENCE) / 0.9))
    assert exact_figures([found])["kl_optimum_to_policy"].value == pytest.approx(divergence)


@pytest.mark.parametrize("anchor", [0.5, 1.0])
def test_the_optimum_of_an_anchored_spo_is_the_tilted_base(anchor):
    found = exact_prompt(OUTCOMES, REFERENCE, REFERENCE, Objective("spo", 0.5, 0.0, anchor=anchor))
    np.testing.assert_allclose(np.exp(found.optimum), softmax(anchor * REFERENCE + REWARDS / 0.5))
    tied = exact_prompt(OUTCOMES, REFERENCE, REFERENCE, Objective("spo", 0.5, 10.0, anchor=anchor))
    assert np.exp(tied.optimum) @ (tied.optimum - tied.reference) < 0.01


def test_dpo_with_a_kl_term_has_the_optimum_of_spo_with_anchor_one():
    """Of α = β, whose loss is DPO's over β: the KL term then weighs β times as much beside it."""
    dpo = exact_prompt(OUTCOMES, REFERENCE, REFERENCE, Objective("dpo", beta=0.5, kl_beta=0.2))
    spo = exact_prompt(OUTCOMES, REFERENCE, REFERENCE, Objective("spo", 0.5, 0.4, anchor=1.0))
    np.testing.assert_allclose(dpo.optimum, spo.optimum, atol=1e-9)
    alone = exact_prompt(OUTCOMES, REFERENCE, REFERENCE, Objective("dpo", beta=0.5))
    assert np.abs(dpo.optimum - alone.optimum).max() > 0.05


@pytest.mark.parametrize("objective", [Objective("spo", 0.5, 0.4), Objective("dpo", beta=0.5, kl_beta=0.2)])
def test_without_a_kl_term_its_strength_does_not_move_the_optimum(objective):
    none, zero = (
        exact_prompt(OUTCOMES, REFERENCE, REFERENCE, objective._replace(**change)).optimum
        for change in ({"kl_on": "none"}, {"beta": 0.0} if objective.method == "spo" else {"kl_beta": 0.0})
    )
    np.testing.assert_array_equal(none, zero)
    tied = exact_prompt(OUTCOMES, REFERENCE, REFERENCE, objective).optimum
    assert np.abs(tied - none).max() > 0.01


def test_regularisation_pulls_the_optimum_of_spo_towards_the_reference():
    free, tied, bound = (
        exact_prompt(OUTCOMES, REFERENCE, REFERENCE, Objective("spo", 1.0, beta)) for beta in (0.0, 0.1, 10.0)
    )
    distance = [np.exp(p.optimum) @ (p.optimum - p.reference) for p in (free, tied, bound)]
    assert distance[0] > distance[1] > distance[2] >= 0
    assert distance[2] < 0.01


def test_an_unknown_optimum_has_no_figures_but_the_policy_has():
    figures = exact_figures([exact_prompt(OUTCOMES, REFERENCE, REFERENCE, Objective("slic", beta=0.1))])
    assert figures["kl_optimum_to_policy"].value is None
    assert figures["optimum_entropy"].value is None
    assert figures["mass_on_set"].value == pytest.approx(0.9)


SPO = {"method": "spo", "alpha": 1.0, "beta": 0.1}
LISTS = {"kinds": {"best_of_n": 9}, "completions_per_row": {"4": 9}}
RANKINGS = {"kinds": {"ranking": 9}, "completions_per_row": {"4": 9}}


@pytest.mark.parametrize(
    ("metadata", "stats", "reason"),
    [
        (SPO, {}, ""),
        (SPO, LISTS, ""),
        (SPO, RANKINGS, ""),
        (SPO | {"preference_kind": "best_of_n"}, RANKINGS, ""),
        (SPO | {"preference_kind": "ranking"}, LISTS, "best_of_n were read as ranking"),
        (SPO, RANKINGS | {"completions_per_row": {"9": 9}}, "more than 6"),
        (SPO | {"beta": 0.0}, RANKINGS | {"completions_per_row": {"9": 9}}, ""),
        (SPO, {"kinds": {"ranking": 4, "pairwise": 5}}, "several kinds"),
        (SPO | {"beta": 0.0}, {"kinds": {"ranking": 4, "pairwise": 5}}, ""),
        (SPO | {"row_counts": {"train": {"left_out": 3}}}, {}, "rows were left out of training"),
        (SPO | {"row_counts": {"train": {"weighted": 9}}}, {}, "rows have weights of their own"),
        (SPO | {"alpha": 0.0}, {}, "softness 0"),
        (SPO | {"weight_exponent": 0.5}, {}, "row weights"),
        (SPO | {"weight_exponent": 0.5, "beta": 0.0}, {}, ""),
        (SPO | {"kl_on": "data"}, {}, "along the dataset's own completions"),
        (SPO | {"kl_on": "data", "beta": 0.0}, {}, ""),
        (SPO | {"kl_on": "none", "weight_exponent": 0.5}, {}, ""),
        ({"method": "dpo", "beta": 0.1, "kl_on": "data"}, {}, ""),
        ({"method": "dpo", "beta": 0.1, "kl_beta": 0.1, "kl_on": "data"}, {}, "along the dataset's own"),
        ({"method": "ipo", "beta": 0.1, "kl_beta": 0.1}, {}, "a KL term beside ipo's loss"),
        ({"method": "ipo", "beta": 0.1, "kl_beta": 0.1, "kl_on": "none"}, {}, ""),
        (SPO | {"soft_labels": "geometric"}, {}, "geometric"),
        (SPO | {"soft_labels": "geometric"}, {"labels": {"hard": 9, "soft": 0}}, ""),
        (SPO | {"rounds": 3}, {}, "training saw more than the preferences"),
        (SPO | {"train_on": "samples"}, {}, "training saw more than the preferences"),
        (SPO | {"train_on": "samples", "rounds": 3, "beta": 0.0}, {}, ""),
        (SPO | {"train_on": "samples", "beta": 0.0, "judge": "bradley-terry"}, {}, "learned judge"),
        (SPO | {"judge": "bradley-terry"}, {}, ""),
        (SPO | {"train_on": "self_play", "beta": 0.0}, {}, "self-play"),
        (
            SPO | {"soft_labels": "geometric", "rounds": 2, "beta": 0.0},
            {"labels": {"hard": 9, "soft": 0}},
            "geometric",
        ),
        (SPO | {"extrapolation": 0.5}, {}, "extrapolated"),
        (SPO, {"left_out": {"tie": 3}}, "left out"),
        (SPO, {"config": {"votes": 5, "labels": "hard"}}, "majorities"),
        (SPO, {"config": {"votes": 5, "labels": "soft"}}, ""),
        (SPO | {"dataset_hash": "a"}, {"dataset_hash": "b"}, "another dataset"),
        ({"method": "dpo", "beta": 0.1}, RANKINGS, ""),
        ({"method": "dpo", "beta": 0.1}, LISTS, "do not follow Bradley-Terry"),
        ({"method": "dpo", "beta": 0.1, "label_smoothing": 0.1}, {}, "smoothing"),
        ({"method": "dpo", "beta": 0.1, "nll_weight": 0.1}, {}, "the likelihood beside the loss"),
        ({"method": "dpo", "beta": 0.1, "nll_weight": None}, {}, ""),
        ({"method": "ropo", "beta": 0.1}, {}, "no solution"),
        ({"method": "rdpo", "beta": 0.1}, {}, ""),
        ({"method": "rdpo", "beta": 0.1, "label_smoothing": 0.1}, {}, "smoothing"),
        ({"method": "ipo", "beta": 0.1}, {}, ""),
        ({"method": "ipo", "beta": 0.1, "label_smoothing": 0.1}, RANKINGS, ""),
        ({"method": "ipo", "beta": 0.1, "rounds": 2}, {}, "training saw more than the preferences"),
        ({"method": "ipo", "beta": 0.1}, LISTS, "do not follow Bradley-Terry"),
        ({"method": "sppo", "beta": 0.1}, {}, "'sppo' has no solution"),
        ({}, {}, "'' has no solution"),
    ],
)
def test_the_optimum_is_known_where_theory_says_so(metadata, stats, reason):
    found = why_unknown(trained_objective(metadata, stats))
    assert (reason in found) if reason else found == ""


FIVE = Outcomes(list("abcde"), np.array([0.0, 1.0, -0.5, 2.0, 0.7]), np.array([0.35, 0.25, 0.2, 0.15, 0.05]))
REFERENCE_OF_FIVE = np.log(np.array([0.3, 0.3, 0.2, 0.15, 0.05]))


def sequential(shares, order):
    """Probability of taking `order` one after another, in proportion to `shares` of what is left."""
    left, probability = shares.sum(), 1.0
    for place in order:
        probability *= shares[place] / left
        left -= shares[place]
    return probability


def rows_of_three():
    """Every row of three of `FIVE`, drawn by weight and ranked by Plackett-Luce, with its probability."""
    for drawn in itertools.permutations(range(5), 3):
        for order in itertools.permutations(range(3)):
            ranked = [drawn[place] for place in order]
            appeal = np.exp(FIVE.rewards[list(drawn)])
            yield ranked, sequential(FIVE.weights, drawn) * sequential(appeal, order)


def brute_force(loss):
    """The distribution over `FIVE` that minimises `loss(logps)`, by plain descent on its logits."""
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=400, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(logits.log_softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(0).numpy()


def test_sets_are_drawn_one_after_another_by_weight():
    groups = draw_groups(FIVE.weights, 20_000, 3, np.random.default_rng(0))
    orders = list(itertools.permutations(range(5), 3))
    seen = [int((groups == order).all(axis=1).sum()) for order in orders]
    assert sum(seen) == 20_000
    expected = 20_000 * np.array([sequential(FIVE.weights, order) for order in orders])
    assert chisquare(seen, expected).pvalue > 0.01


def test_pair_probabilities_are_those_of_the_draws():
    exact = {size: np.zeros((5, 5)) for size in (2, 4)}
    for size, table in exact.items():
        for order in itertools.permutations(range(5), size):
            for i, j in itertools.combinations(order, 2):
                table[i, j] += sequential(FIVE.weights, order)
    np.testing.assert_allclose(pair_probabilities(FIVE.weights), exact[2], atol=1e-12)
    groups = draw_groups(FIVE.weights, 20_000, 4, np.random.default_rng(0))
    np.testing.assert_allclose(pair_probabilities(FIVE.weights, groups), exact[4], atol=0.02)
    assert pair_probabilities(FIVE.weights, groups).sum() == pytest.approx(6)
    never = groups[
        ~(groups == 4).any(axis=1)
    ]  # an outcome that no sampled set holds has its pairs all the same
    assert pair_probabilities(FIVE.weights, never)[:4, 4].min() > 0


@pytest.mark.parametrize("kind", ["best_of_n", "ranking"])
def test_the_optimum_of_spo_on_lists_is_that_of_every_row_they_can_hold(kind):
    ranked, probabilities = zip(*rows_of_three(), strict=True)
    places, chances = torch.tensor(ranked), torch.tensor(probabilities)
    reference = torch.tensor(REFERENCE_OF_FIVE)
    sizes = torch.full((len(places),), 3)

    def loss(logps):
        losses = preference_loss(logps[places].reshape(-1), sizes, alpha=0.5, kind=kind)
        return chances @ losses + 0.3 * (logps.exp() @ (logps - reference))

    expected = brute_force(loss)
    objective = Objective("spo", 0.5, 0.3, kind=kind, group_size=3)
    found = exact_prompt(FIVE, REFERENCE_OF_FIVE, REFERENCE_OF_FIVE, objective)
    np.testing.assert_allclose(np.exp(found.optimum), expected, atol=4e-3)
    other = Objective("spo", 0.5, 0.3, kind={"ranking": "best_of_n"}.get(kind, "ranking"), group_size=3)
    wrong = exact_prompt(FIVE, REFERENCE_OF_FIVE, REFERENCE_OF_FIVE, other)
    assert np.abs(np.exp(wrong.optimum) - expected).max() > 0.01


@pytest.mark.parametrize(("method", "pair_loss"), [("dpo", dpo_loss), ("ipo", ipo_loss)])
def test_the_optimum_of_a_baseline_on_rankings_is_that_of_all_their_pairs(method, pair_loss):
    ranked, probabilities = zip(*rows_of_three(), strict=True)
    places, chances = torch.tensor(ranked).reshape(-1), torch.tensor(probabilities)
    pairs, _ = ordered_pairs(torch.full((len(ranked),), 3), "ranking")
    ours = places[pairs]
    reference = torch.tensor(REFERENCE_OF_FIVE)

    def loss(logps):
        losses = pair_loss(logps[ours], reference[ours], beta=0.5)
        return chances @ losses.view(-1, 3).sum(1)

    objective = Objective(method, beta=0.5, kind="ranking", group_size=3)
    found = exact_prompt(FIVE, REFERENCE_OF_FIVE, REFERENCE_OF_FIVE, objective)
    np.testing.assert_allclose(np.exp(found.optimum), brute_force(loss), atol=2e-3)


def test_no_policy_has_more_entropy_than_the_softmax_frontier_at_its_reward():
    random = np.random.default_rng(0)
    prompts = [
        exact_prompt(OUTCOMES, np.log(random.dirichlet(np.ones(4))), REFERENCE, Objective()) for _ in range(3)
    ]
    frontier = np.array(softmax_frontier(prompts))
    assert frontier[0] == pytest.approx([REWARDS.mean(), math.log(4)], abs=1e-6)
    assert frontier[-1] == pytest.approx([REWARDS.max(), 0.0], abs=1e-3)
    assert (np.diff(frontier[:, 0]) > -1e-6).all()
    assert (np.diff(frontier[:, 1]) < 1e-6).all()
    for alpha in (0.5, 1.0, 3.0):
        soft = softmax(REWARDS / alpha)
        assert np.interp(soft @ REWARDS, *frontier.T) == pytest.approx(entropy(np.log(soft)), abs=2e-3)
    tried = 0
    for _ in range(200):
        policy = random.dirichlet(np.ones(4))
        if policy @ REWARDS > REWARDS.mean():
            tried += 1
            assert entropy(np.log(policy)) <= np.interp(policy @ REWARDS, *frontier.T) + 2e-3
    assert tried > 50


def test_entropy_of_a_uniform_distribution_is_the_logarithm_of_its_size():
    assert entropy(np.log(np.full(7, 1 / 7))) == pytest.approx(math.log(7))


# Several dimensions of preference, one after another

LONG, SHORT = np.array([0.4, -1.1, 0.9, 0.2, -0.3]), np.array([-0.7, 0.5, 0.1, 1.2, -0.4])
START = np.log([0.3, 0.1, 0.25, 0.15, 0.2])
RANKED = {"long": LONG, "short": SHORT}


def in_rounds(method, strengths, *, weight=0.7, order=("long", "short"), **options):
    """The optimum after two rounds, of these softnesses (of `spo`) or β."""
    name = "alpha" if method == "spo" else "beta"
    first, last = (
        Objective(method=method, dimension=dimension, **{name: strength}, **options)
        for dimension, strength in zip(order, strengths, strict=True)
    )
    objective = last._replace(weights=(weight,), earlier=(first,))
    return optimum(LONG + SHORT, START, FIVE.weights, objective, dimensions=RANKED)


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_rounds_of_dpo_end_at_the_composed_exponent(weight):
    found = in_rounds("dpo", (0.8, 1.3), weight=weight)
    composed = (1 / 0.8 + weight / 1.3) * LONG + SHORT / 1.3
    assert np.exp(found) == pytest.approx(softmax(START + composed), abs=1e-9)


def test_the_order_of_rounds_matters_unless_their_strengths_make_up_for_it():
    weight, back = 0.7, 0.4
    ended = np.exp(in_rounds("dpo", (0.8, 1.3), weight=weight))
    swapped = np.exp(in_rounds("dpo", (0.8, 1.3), weight=weight, order=("short", "long")))
    assert np.abs(swapped - ended).max() > 0.05
    of_long, of_short = 1 / 0.8 + weight / 1.3, 1 / 1.3  # the exponents
    strengths = (1 / (of_short - back * of_long), 1 / of_long)
    made_up = np.exp(in_rounds("dpo", strengths, weight=back, order=("short", "long")))
    assert made_up == pytest.approx(ended, abs=1e-9)


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_rounds_of_spo_without_a_kl_term_end_at_the_weighted_softmax(weight):
    found = in_rounds("spo", (0.8, 1.3), weight=weight, kl_on="none")
    assert np.exp(found) == pytest.approx(softmax((SHORT + weight * LONG) / 1.3), abs=1e-9)


def test_expected_reward_of_the_first_dimension_rises_with_its_weight_by_its_variance():
    weights = np.linspace(0, 2, 201)
    found = [np.exp(in_rounds("dpo", (0.8, 1.3), weight=weight)) for weight in weights]
    rewards = np.array([policy @ LONG for policy in found])
    variances = np.array([policy @ LONG**2 - (policy @ LONG) ** 2 for policy in found])
    slopes = np.gradient(rewards, weights)
    assert slopes[1:-1] == pytest.approx(variances[1:-1] / 1.3, rel=1e-3)
    assert (np.diff(rewards) > 0).all()


def test_rounds_with_a_kl_term_minimise_loss_and_divergence_together():
    """By brute force: gradient descent in float64 on the two rounds' own losses over all pairs."""
    alphas, beta, weight = (0.8, 1.3), 0.15, 0.7
    pairs = pair_probabilities(FIVE.weights)
    pairs = torch.as_tensor((pairs + pairs.T) / (pairs + pairs.T).sum())
    before, learned = torch.as_tensor(START), torch.zeros(5, dtype=torch.float64)
    for alpha, reward, factor in zip(alphas, (LONG, SHORT), (0.0, weight), strict=True):
        chances = torch.sigmoid(torch.as_tensor(reward[:, None] - reward))
        offset = factor * learned
        logits = before.clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-15)

        def loss(logits=logits, alpha=alpha, offset=offset, chances=chances, before=before, opt=optimizer):
            opt.zero_grad()
            logps = logits.log_softmax(0)
            z = alpha * logps - offset
            margins = z[:, None] - z
            value = -(pairs * 2 * chances * torch.nn.functional.logsigmoid(margins)).sum() / alpha
            value = value + beta * (logps.exp() * (logps - before)).sum()
            value.backward()
            return value

        optimizer.step(loss)
        before = logits.detach().log_softmax(0)
        learned = alpha * before - offset
    found = in_rounds("spo", alphas, weight=weight, beta=beta)
    assert np.exp(found) == pytest.approx(before.exp().numpy(), abs=1e-5)


def test_a_lineage_says_what_was_trained():
    spo = {"method": "spo", "alpha": 0.5, "beta": 0.0, "kl_on": "none", "soft_labels": "linear"}
    lineage = [
        {**spo, "dimension": "long", "dimension_weights": [], "dataset_hash": "a"},
        {**spo, "alpha": 2.0, "dimension": "short", "dimension_weights": [0.25], "dataset_hash": "a"},
    ]
    metadata = {**spo, "alpha": 2.0, "lineage": lineage, "dataset_hash": "a"}
    stats = {"dataset_hash": "a", "dimensions": {"long": 5, "short": 5}, "kinds": {"pairwise": 10}}
    objective = trained_objective(metadata, stats)
    assert (objective.dimension, objective.weights, objective.alpha) == ("short", (0.25,), 2.0)
    assert [(one.dimension, one.alpha) for one in objective.earlier] == [("long", 0.5)]
    assert why_unknown(objective) == ""
    lineage[0]["soft_labels"] = "geometric"
    assert why_unknown(trained_objective(metadata, stats)).startswith("round 1 (long): geometric")
    lineage[0]["dataset_hash"] = "b"
    assert "an earlier round was trained on another dataset" in why_unknown(
        trained_objective(metadata, stats)
    )
    alike = trained_objective({**spo, "dataset_hash": "a"}, stats)
    assert why_unknown(alike) == "rows of several dimensions were trained on alike"


def test_figures_have_the_expected_reward_of_every_dimension():
    outcomes = FIVE._replace(rewards=LONG + SHORT, dimensions=RANKED)
    objective = Objective(method="dpo", beta=0.5, dimension="short")
    figures = exact_figures([exact_prompt(outcomes, START, START, objective)])
    for name, reward in RANKED.items():
        assert figures[f"expected_reward/{name}"].value == pytest.approx(np.exp(START) @ reward)
        best = softmax(START + SHORT / 0.5)
        assert figures[f"optimum_expected_reward/{name}"].value == pytest.approx(best @ reward)
    assert figures["expected_reward"].value == pytest.approx(np.exp(START) @ (LONG + SHORT))
