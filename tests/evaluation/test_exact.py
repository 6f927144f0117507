"""What models say, and exact figures, against enumeration and closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from softpref.errors import ConfigError
from softpref.evaluation.exact import entropy, exact_figures, exact_prompt, has_optimum
from softpref.evaluation.measure import check_same_vocabulary, divergences, draw, score, score_outcomes
from softpref.judges import Outcomes
from softpref.lm.sampling import Sample
from transformers import LlamaConfig, LlamaForCausalLM


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


def test_shared_prompt_gives_the_same_scores_as_whole_sequences():
    model = llama(0)
    completions = [list(c) for n in (1, 2, 4) for c in itertools.product(range(3), repeat=n)]
    shared = score_outcomes(model, PROMPT, completions, pad_id=PAD, batch_size=7)
    whole = score(model, [(PROMPT, c) for c in completions], pad_id=PAD, batch_size=16)
    np.testing.assert_allclose(shared, whole, atol=1e-5)


def test_kl_and_entropy_estimates_have_the_true_values_as_their_expectation():
    """Over every sequence of three tokens, weighted by its probability, nothing is left to chance."""
    policy, reference = llama(0), llama(1)
    sequences = [list(c) for c in itertools.product(range(5), repeat=3)]
    ours = score(policy, [(PROMPT, c) for c in sequences], pad_id=PAD, batch_size=64)
    theirs = score(reference, [(PROMPT, c) for c in sequences], pad_id=PAD, batch_size=64)
    samples = [Sample(PROMPT, c, 0.0, True) for c in sequences]
    found = divergences(policy, reference, samples, pad_id=PAD, batch_size=50)
    weights = np.exp(ours)
    assert weights.sum() == pytest.approx(1.0, abs=1e-5)
    assert weights @ found.kl == pytest.approx(weights @ (ours - theirs), abs=1e-5)
    assert weights @ found.entropy == pytest.approx(-(weights @ ours), abs=1e-5)


def test_samples_follow_the_models_own_distribution_and_the_seed():
    model = llama(0)
    options = {"max_new_tokens": 1, "stop_ids": [1], "pad_id": PAD, "batch_size": 500}
    groups = draw(model, [PROMPT, [2]], 2000, seed=7, **options)
    assert [len(group) for group in groups] == [2000, 2000]
    counts = np.bincount([sample.completion[0] for sample in groups[1]], minlength=5) / 2000
    truth = np.exp(score(model, [([2], [token]) for token in range(5)], pad_id=PAD, batch_size=8))
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
    found = exact_prompt(OUTCOMES, policy, REFERENCE, method="spo", alpha=alpha, beta=0.0)
    figures = exact_figures([found])
    assert figures["kl_optimum_to_policy"].value == pytest.approx(0.0, abs=1e-9)
    assert figures["entropy"].value == pytest.approx(-(target @ np.log(target)))
    assert figures["optimum_entropy"].value == pytest.approx(figures["entropy"].value)
    assert figures["expected_reward"].value == pytest.approx(target @ REWARDS)
    assert figures["mass_on_set"].value == pytest.approx(0.8)


def test_the_optimum_of_dpo_is_the_tilted_reference():
    found = exact_prompt(OUTCOMES, REFERENCE, REFERENCE, method="dpo", alpha=1.0, beta=0.5)
    tilted = softmax(REFERENCE + REWARDS / 0.5)
    np.testing.assert_allclose(np.exp(found.optimum), tilted)
    divergence = tilted @ (np.log(tilted) - np.log(np.exp(REFERENCE) / 0.9))
    assert exact_figures([found])["kl_optimum_to_policy"].value == pytest.approx(divergence)


def test_regularisation_pulls_the_optimum_of_spo_towards_the_reference():
    free, tied, bound = (
        exact_prompt(OUTCOMES, REFERENCE, REFERENCE, method="spo", alpha=1.0, beta=beta)
        for beta in (0.0, 0.1, 10.0)
    )
    distance = [np.exp(p.optimum) @ (p.optimum - p.reference) for p in (free, tied, bound)]
    assert distance[0] > distance[1] > distance[2] >= 0
    assert distance[2] < 0.01


def test_an_unknown_optimum_has_no_figures_but_the_policy_has():
    assert not has_optimum("ipo", 1.0, 0.1)
    assert not has_optimum("spo", 0.0, 0.1)
    figures = exact_figures([exact_prompt(OUTCOMES, REFERENCE, REFERENCE, method="ipo", alpha=1.0, beta=0.1)])
    assert figures["kl_optimum_to_policy"].value is None
    assert figures["optimum_entropy"].value is None
    assert figures["mass_on_set"].value == pytest.approx(0.9)


def test_entropy_of_a_uniform_distribution_is_the_logarithm_of_its_size():
    assert entropy(np.log(np.full(7, 1 / 7))) == pytest.approx(math.log(7))
