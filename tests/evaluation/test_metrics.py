"""Metrics against brute force and closed forms."""

import math
from collections import Counter

import evaluate
import numpy as np
import pytest
from softpref.evaluation import metrics
from softpref.evaluation.metrics import (
    DiversityMetric,
    HealthMetric,
    PerplexityMetric,
    PreferenceMetric,
    SampleMetric,
    WinRateMetric,
    repetition,
)
from softpref.intervals import Bootstrap, interval

pytestmark = pytest.mark.fast


def compute(metric, **columns):
    return metric(keep_in_memory=True).compute(**columns)


def test_metrics_are_evaluate_metrics_that_need_no_network(monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("a metric opened a connection")

    monkeypatch.setattr("socket.socket.connect", no_network)
    metric = PerplexityMetric(keep_in_memory=True)
    assert isinstance(metric, evaluate.Metric)
    assert metric.compute(logp=[-1.0], tokens=[1], prompt=["p"])["perplexity"].value == pytest.approx(math.e)


def test_accuracy_counts_ties_half_rankings_by_pairs_and_best_of_n_against_the_best():
    figures = compute(
        PreferenceMetric,
        scores=[[2.0, 1.0], [0.0, 0.0], [3.0, 1.0, 2.0], [1.0, 5.0, 0.0]],
        kind=["pairwise", "pairwise", "ranking", "best_of_n"],
        probability=[None, None, None, None],
        prompt=["a", "b", "c", "d"],
    )
    accuracy, margin = figures["preference_accuracy"], figures["preference_margin"]
    # right: 1; ½; 2 of 3; 1 of 2
    assert accuracy.value == pytest.approx((1 + 0.5 + 2 + 1) / 7)
    assert margin.value == pytest.approx((1 + 0 + 2 + 1 - 1 - 4 + 1) / 7)
    assert (accuracy.n, accuracy.prompts) == (7, 4)


def test_soft_labels_count_towards_their_majority():
    figures = compute(
        PreferenceMetric,
        scores=[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]],
        kind=["pairwise"] * 3,
        probability=[0.9, 0.2, 0.5],
        prompt=["a", "b", "c"],
    )
    assert figures["preference_accuracy"].value == 0.5
    assert figures["preference_accuracy"].n == 2  # a label of ½ has no side


def test_win_rate_is_the_mean_over_all_pairs_of_samples():
    policy, reference = [[0.3, -1.0], [2.0, 2.0]], [[0.0, 0.5], [2.0, 2.0]]
    figures = compute(WinRateMetric, policy=policy, reference=reference)
    brute = np.mean(
        [
            1 / (1 + math.exp(b - a))
            for ours, theirs in zip(policy, reference, strict=True)
            for a in ours
            for b in theirs
        ]
    )
    assert figures["win_rate"].value == pytest.approx(brute)
    assert figures["expected_reward"].value == pytest.approx(np.mean(policy))
    assert figures["reference_expected_reward"].value == pytest.approx(np.mean(reference))


def test_equal_samples_win_half():
    assert compute(WinRateMetric, policy=[[1.0], [5.0]], reference=[[1.0], [5.0]])["win_rate"].value == 0.5


def test_sample_means_are_over_samples_and_their_intervals_over_prompts():
    for times in (4, 5):  # of two prompts
        figures = compute(
            SampleMetric,
            kl=times * [[1.0, 3.0], [5.0, 7.0]],
            entropy=times * [[2.0, 2.0], [2.0, 2.0]],
            length=times * [[4.0, 6.0], [8.0, 10.0]],
        )
        assert figures["kl_sequence"].value == 4.0
        assert (figures["kl_sequence"].n, figures["kl_sequence"].prompts) == (4 * times, 2 * times)
        known = times == 5  # an interval takes ten prompts
        assert figures["entropy_sequence"][:3] == ((2.0, 2.0, 2.0) if known else (2.0, None, None))
        assert figures["kl_token"].value == pytest.approx(16 / 28)


def test_health_is_of_samples_and_surprise_of_their_tokens():
    # the interval's ends are those where one of ten prompts is of the one kind, which are binomial quantiles
    figures = compute(
        HealthMetric,
        length=5 * [[4.0, 6.0], [8.0, 10.0]],
        truncated=5 * [[1.0, 0.0], [0.0, 0.0]],
        repetition=5 * [[0.5, 0.0], [0.0, 0.1]],
        surprisal=5 * [[8.0, 12.0], [4.0, 4.0]],
    )
    assert figures["truncated_fraction"].value == 0.25
    assert figures["repetition"].value == pytest.approx(0.15)
    assert figures["cross_entropy"].value == pytest.approx(28 / 28)
    assert figures["cross_entropy"].low == pytest.approx((20 + 9 * 8) / (10 + 9 * 18))
    assert figures["cross_entropy"].high == pytest.approx((9 * 20 + 8) / (9 * 10 + 18))


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0.0),
        ([1, 1, 1], 0.0),
        ([1, 2, 3, 4, 5, 6], 0.0),
        ([1, 1, 1, 1, 1, 1], 2 / 3),  # three 4-grams, all the same
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1 / 6),
        ([1, 2, 3, 4, 5] * 20, 1 - 5 / 97),
    ],
)
def test_repetition_is_the_share_of_4_grams_that_were_there_before(tokens, share):
    assert repetition(tokens) == pytest.approx(share)


def test_perplexity_is_per_token_over_all_completions():
    figures = compute(PerplexityMetric, logp=[-2.0, -6.0], tokens=[1, 3], prompt=["a", "b"])
    assert figures["perplexity"].value == pytest.approx(math.exp(8 / 4))


def test_distinct_counts_ngrams_within_a_prompt():
    figures = compute(DiversityMetric, completions=[["a b", "a c"], ["x y", "x y"]])
    assert figures["distinct_1"].value == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert figures["distinct_2"].value == pytest.approx((2 / 2 + 1 / 2) / 2)


def brute_self_bleu(texts):
    """The definition, one text at a time: BLEU-4, closest reference length, zero counts 0.1."""
    scores = []
    for i, text in enumerate(texts):
        references = [other for j, other in enumerate(texts) if j != i]
        logs, unigrams = 0.0, 0
        for order in range(1, 5):
            grams = [Counter(zip(*(t[k:] for k in range(order)), strict=False)) for t in [text, *references]]
            matched = sum(min(n, max(r[g] for r in grams[1:])) for g, n in grams[0].items())
            unigrams = matched if order == 1 else unigrams
            logs += math.log((matched or 0.1) / max(1, sum(grams[0].values()))) / 4
        length = min((abs(len(r) - len(text)), len(r)) for r in references)[1]
        penalty = 1.0 if len(text) >= length else math.exp(1 - length / len(text))
        scores.append(penalty * math.exp(logs) if unigrams else 0.0)
    return sum(scores) / len(scores)


def test_self_bleu_equals_its_definition():
    random = np.random.default_rng(3)
    for _ in range(30):
        texts = [["abcde"[k] for k in random.integers(5, size=random.integers(1, 9))] for _ in range(6)]
        assert metrics.self_bleu(texts) == pytest.approx(brute_self_bleu(texts))


def test_self_bleu_of_equal_texts_is_one_and_of_strangers_nothing():
    assert metrics.self_bleu([list("abcdef")] * 3) == pytest.approx(1.0)
    assert metrics.self_bleu([list("abcd"), list("efgh")]) == 0.0


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """With ten prompts and correlated samples, where resampling rows would cover far less."""
    random = np.random.default_rng(5)
    prompts = np.repeat(np.arange(10), 20)
    hits, naive_hits = 0, 0
    for trial in range(300):
        values = random.normal(size=10)[prompts] + random.normal(size=200)
        figure = interval(values, prompts, bootstrap=Bootstrap(400, 0.9, trial))
        naive = interval(values, np.arange(200), bootstrap=Bootstrap(400, 0.9, trial))
        hits += figure.low <= 0 <= figure.high
        naive_hits += naive.low <= 0 <= naive.high
    assert 0.84 <= hits / 300 <= 0.96
    assert naive_hits / 300 < 0.7


def test_interval_of_many_prompts_is_that_of_the_normal_theory():
    values = np.random.default_rng(6).normal(size=3000)
    figure = interval(values, np.arange(3000), bootstrap=Bootstrap(2000, 0.95, 0))
    error = values.std(ddof=1) / math.sqrt(3000)
    assert figure.value - figure.low == pytest.approx(1.96 * error, rel=0.08)
    assert figure.high - figure.value == pytest.approx(1.96 * error, rel=0.08)


def test_few_prompts_have_no_interval_and_unknown_values_have_no_figure():
    assert interval([1.0, 2.0], ["p", "p"])[:3] == (1.5, None, None)
    assert interval(range(9), range(9))[:3] == (4.0, None, None)
    assert interval(range(10), range(10)).low < 4.5 < interval(range(10), range(10)).high
    assert interval([float("nan")], ["p"])[:4] == (None, None, None, 0)
