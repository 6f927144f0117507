"""What is measured of a policy, as `evaluate.Metric` classes that load without a network. Runs no model.

Every figure comes with a bootstrap interval that resamples *prompts*: samples and preference rows of one
prompt are alike, and resampling them one by one would claim more certainty than there is.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, TypeVar

import datasets
import evaluate
import numpy as np

from softpref.intervals import DEFAULT_BOOTSTRAP, Bootstrap, interval, over_prompts
from softpref.judges.protocol import sigmoid
from softpref.records.dataset import Text
from softpref.records.figures import Figure, Figures

Token = TypeVar("Token")
_Rows = Sequence[Sequence[float]]  # one per prompt, a value per sample

_SMOOTHING = 0.1  # in place of a zero n-gram count in BLEU: Chen and Cherry (2014), method 1
_BLEU_ORDER = 4
_REPEATED_ORDER = 4
_TEXT, _NUMBER = datasets.Value("string"), datasets.Value("float64")
_NUMBERS = datasets.Sequence(_NUMBER)


class _Metric(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """What all metrics here tell `evaluate` of themselves, and how they are computed."""

    _features: ClassVar[dict[str, object]]

    @classmethod
    def figures(cls, bootstrap: Bootstrap, **columns: object) -> Figures:
        """Figures by name, of the columns that `_compute` takes."""
        found: Figures = cls(keep_in_memory=True).compute(bootstrap=bootstrap, **columns)
        return found

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="",
            features=datasets.Features(self._features),
        )


class PreferenceMetric(_Metric):
    """Does the policy rank held-out completions as people did?

    `preference_accuracy` is the share of ordered pairs whose preferred completion has the higher
    log-probability, a tie counting ½; `preference_margin` the mean of their difference, in nats. A ranking
    gives all its ordered pairs, a best-of-n row the best against each other. A soft label counts towards its
    majority's side, with the same weight as any other; a label of exactly ½ has no side and is left out.
    Scores are log-probabilities of a row's completions, best first.
    """

    _features: ClassVar = {"scores": _NUMBERS, "kind": _TEXT, "probability": _NUMBER, "prompt": _TEXT}

    def _compute(
        self,
        *,
        scores: Sequence[Sequence[float]],
        kind: Sequence[str],
        probability: Sequence[float | None],
        prompt: Sequence[str],
        bootstrap: Bootstrap = DEFAULT_BOOTSTRAP,
    ) -> Figures:
        margins: list[float] = []
        prompts: list[str] = []
        for values, name, share, key in zip(scores, kind, probability, prompt, strict=True):
            row = np.asarray(values, dtype=np.float64)
            side = 1.0
            if len(row) == 2 and share is not None and not np.isnan(share):
                if share == 0.5:
                    continue
                side = 1.0 if share > 0.5 else -1.0
            if name == "ranking":
                better, worse = np.triu_indices(len(row), 1)
                differences = row[better] - row[worse]
            else:
                differences = side * (row[0] - row[1:])
            margins.extend(differences.tolist())
            prompts.extend([key] * len(differences))
        array = np.asarray(margins)
        right = (array > 0) + 0.5 * (array == 0)
        return {
            "preference_accuracy": interval(right, prompts, unit="probability", bootstrap=bootstrap),
            "preference_margin": interval(array, prompts, unit="nats", bootstrap=bootstrap),
        }


class WinRateMetric(_Metric):
    """Does a judge prefer the policy's completions to the reference's, and how highly does it rate both?

    `win_rate` is the probability that the judge prefers a policy sample to a reference sample of the same
    prompt, σ(score difference) averaged over all pairs of samples; equal scores count ½. `expected_reward`
    and `reference_expected_reward` are mean scores in nats, known up to a constant.
    """

    _features = dict.fromkeys(("policy", "reference"), _NUMBERS)

    def _compute(
        self, *, policy: _Rows, reference: _Rows, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
    ) -> Figures:
        wins, pairs = [], []
        for ours, theirs in zip(policy, reference, strict=True):
            difference = np.asarray(ours, dtype=np.float64)[:, None] - np.asarray(theirs, dtype=np.float64)
            wins.append(sigmoid(difference).sum())
            pairs.append(difference.size)
        prompts = np.arange(len(wins))
        win_rate = interval(wins, prompts, weights=pairs, unit="probability", bootstrap=bootstrap)
        return {
            "win_rate": win_rate._replace(n=sum(len(row) for row in policy)),
            "expected_reward": _by_prompt(policy, "nats", bootstrap),
            "reference_expected_reward": _by_prompt(reference, "nats", bootstrap),
        }


class SampleMetric(_Metric):
    """Means over the policy's own samples.

    `kl_sequence` estimates KL(policy ‖ reference) by Σ_t KL_t, and `entropy_sequence` the policy's entropy by
    Σ_t H_t, both over the whole vocabulary at each sampled prefix, in nats; `kl_token` is the former per
    token; `completion_length` counts tokens, end token included.
    """

    _features = dict.fromkeys(("kl", "entropy", "length"), _NUMBERS)

    def _compute(
        self, *, kl: _Rows, entropy: _Rows, length: _Rows, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
    ) -> Figures:
        return {
            "kl_sequence": _by_prompt(kl, "nats", bootstrap),
            "kl_token": _by_prompt(kl, "nats per token", bootstrap, length),
            "entropy_sequence": _by_prompt(entropy, "nats", bootstrap),
            "completion_length": _by_prompt(length, "tokens", bootstrap),
        }


class HealthMetric(_Metric):
    """Does a model still write whole, plausible texts? Of the policy's samples, and again of the reference's.

    `truncated_fraction` is the share that met the length limit before an end; `repetition` how much of a
    sample repeats itself, see the function; `cross_entropy` the samples' surprisal under the reference per
    token, in nats: the logarithm of their perplexity. Of the reference's own samples it is its entropy.
    """

    _features = dict.fromkeys(("length", "truncated", "repetition", "surprisal"), _NUMBERS)

    def _compute(
        self,
        *,
        length: _Rows,
        truncated: _Rows,
        repetition: _Rows,
        surprisal: _Rows,
        bootstrap: Bootstrap = DEFAULT_BOOTSTRAP,
    ) -> Figures:
        return {
            "truncated_fraction": _by_prompt(truncated, "probability", bootstrap),
            "repetition": _by_prompt(repetition, "fraction", bootstrap),
            "cross_entropy": _by_prompt(surprisal, "nats per token", bootstrap, length),
        }


class DiversityMetric(_Metric):
    """How different are the completions of one prompt? Words and marks are compared, in lower case.

    Per prompt, then averaged: `distinct_1` and `distinct_2` are the distinct n-grams over all n-grams of its
    completions (Li et al. 2016), `self_bleu` the mean BLEU-4 of each completion against the others (Zhu et
    al. 2018), 1 when all are equal. All depend on how many completions a prompt has.
    """

    _features: ClassVar = {"completions": datasets.Sequence(_TEXT)}

    def _compute(
        self, *, completions: Sequence[Sequence[str]], bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
    ) -> Figures:
        rows = [[words(text) for text in texts] for texts in completions]
        values = {
            "distinct_1": [distinct(texts, 1) for texts in rows],
            "distinct_2": [distinct(texts, 2) for texts in rows],
            "self_bleu": [self_bleu(texts) for texts in rows],
        }
        return {name: over_prompts(found, "fraction", bootstrap) for name, found in values.items()}


class PerplexityMetric(_Metric):
    """Perplexity per token of the policy on the best held-out completions: exp(−Σ logp / Σ tokens)."""

    _features: ClassVar = {"logp": _NUMBER, "tokens": datasets.Value("int64"), "prompt": _TEXT}

    def _compute(
        self,
        *,
        logp: Sequence[float],
        tokens: Sequence[int],
        prompt: Sequence[str],
        bootstrap: Bootstrap = DEFAULT_BOOTSTRAP,
    ) -> Figures:
        surprisal, unit = -np.asarray(logp, dtype=np.float64), "per token"
        figure = interval(surprisal, prompt, weights=tokens, unit=unit, transform=np.exp, bootstrap=bootstrap)
        return {"perplexity": figure}


def words(text: str) -> list[str]:
    """Words and punctuation marks of a text, lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def repetition(tokens: Sequence[int]) -> float:
    """The share of a completion's 4-grams of tokens that it has had before: seq-rep-4 of Welleck et al. 2020.

    0 where none repeats, also for fewer than four tokens; towards 1 for one sentence over and over.
    """
    grams = _ngrams(tokens, _REPEATED_ORDER)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Sequence[Sequence[str]], order: int) -> float:
    """Distinct n-grams over all n-grams of tokenized texts; NaN when there is none."""
    grams = [gram for text in texts for gram in _ngrams(text, order)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def self_bleu(texts: Sequence[Sequence[str]]) -> float:
    """Mean BLEU-4 of each tokenized text against all others as references; NaN for fewer than two.

    As NLTK's `sentence_bleu` with smoothing method 1. Linear in the number of texts: for each n-gram the two
    highest counts tell the clip limit of every text, since the limit is the highest count among the *others*.
    """
    if len(texts) < 2:
        return float("nan")
    lengths = np.array([len(text) for text in texts])
    log_precision = np.zeros(len(texts))
    no_unigram = np.zeros(len(texts), dtype=bool)
    for order in range(1, _BLEU_ORDER + 1):
        counts = [Counter(_ngrams(text, order)) for text in texts]
        highest: dict[tuple[str, ...], tuple[int, int]] = {}  # highest count, second highest count
        for count in counts:
            for gram, times in count.items():
                first, second = highest.get(gram, (0, 0))
                highest[gram] = (times, first) if times >= first else (first, max(second, times))
        for index, count in enumerate(counts):
            matched = 0
            for gram, times in count.items():
                first, second = highest[gram]
                matched += min(times, second if times == first else first)
            total = max(1, sum(count.values()))
            if order == 1 and matched == 0:
                no_unigram[index] = True
            log_precision[index] += np.log((matched or _SMOOTHING) / total) / _BLEU_ORDER
    scores = np.exp(log_precision)
    for index, length in enumerate(lengths):
        others = np.delete(lengths, index)
        closest = others[np.lexsort((others, np.abs(others - length)))[0]]
        if length == 0 or no_unigram[index]:
            scores[index] = 0.0
        elif length < closest:
            scores[index] *= np.exp(1 - closest / length)
    return float(scores.mean())


def prompt_key(prompt: Text) -> str:
    """One string for a prompt, text or messages, by which equal prompts are told."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def _by_prompt(rows: _Rows, unit: str, bootstrap: Bootstrap, weights: _Rows | None = None) -> Figure:
    """Mean of all values, or their sum over that of the weights, with the row as prompt."""
    prompts = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    flat = None if weights is None else _flat(weights)
    return interval(_flat(rows), prompts, weights=flat, unit=unit, bootstrap=bootstrap)


def _flat(rows: _Rows) -> np.ndarray:
    return np.concatenate([np.asarray(row, dtype=np.float64) for row in rows]) if len(rows) else np.empty(0)


def _ngrams(tokens: Sequence[Token], order: int) -> list[tuple[Token, ...]]:
    return [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]
