"""How different a model's answers to one prompt are: all of them, and the good ones. Functions of texts.

Classical measures of words (distinct-n, self-BLEU) call random words the most diverse of all, and short texts
more diverse than long ones. So texts are first cut to one length (`at_length`), and `good_diversity` counts
variety among answers that are as good as the reference's usual ones alone.
"""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from softpref.evaluation.metrics import words
from softpref.evaluation.quality import scores_of
from softpref.intervals import DEFAULT_BOOTSTRAP, Bootstrap, over_prompts
from softpref.records.evaluation import DrawnText
from softpref.records.figures import Figure

SAME = 0.8
"""Likeness of n-grams from which two answers count as the same one."""

Equivalence = Callable[[str, str], bool]


def variety(
    by_prompt: Mapping[str, Sequence[float]], bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> dict[str, Figure]:
    """The figures of what `variety_by_prompt` found."""
    units = {"vendi_score": "answers", "distinct_answers": "answers", "compression_ratio": "ratio"}
    return {
        name: over_prompts(values, units.get(name, "fraction"), bootstrap)
        for name, values in by_prompt.items()
    }


def variety_by_prompt(
    samples: Sequence[Sequence[DrawnText]], reference: Sequence[Sequence[DrawnText]]
) -> dict[str, list[float]]:
    """Of each prompt `vendi_score`, `distinct_answers`, `mode_share`, `compression_ratio`, `good_diversity`.

    Texts are cut to the lower quartile of the lengths of the reference's samples, in words and marks; good is
    a sample that scores at least as high as the median of the reference's on its prompt.

    Args:
        samples, reference: of the model that is measured, and of its reference, by prompt.
    """
    lengths = [len(words(text.text)) for group in reference for text in group]
    length = int(np.quantile(lengths, 0.25)) if lengths else 0
    found: dict[str, list[float]] = {}
    for group, theirs in zip(samples, reference, strict=True):
        texts = at_length([text.text for text in group], length)
        alike = likeness(texts)
        values = {
            "vendi_score": vendi_score(alike),
            "distinct_answers": float(distinct_answers(texts)),
            "mode_share": mode_share(texts),
            "compression_ratio": compression_ratio(texts),
        }
        scored = scores_of([group, theirs])
        if scored is not None:
            scores, usual = scored
            values["good_diversity"] = good_diversity(alike, scores, float(np.median(usual)))
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def at_length(texts: Sequence[str], length: int) -> list[str]:
    """Each text's first `length` words and marks, in lower case, with single spaces between."""
    return [" ".join(words(text)[:length]) for text in texts]


def likeness(texts: Sequence[str]) -> np.ndarray:
    """`[n, n]` in [0, 1]: cosine of the counts of words and word pairs; 1 between equal texts.

    An empty text is like an empty one alone.
    """
    counts = []
    for text in texts:
        tokens = words(text)
        counts.append(Counter([*tokens, *itertools.pairwise(tokens)]) or Counter([""]))
    places: dict[object, int] = {}
    for count in counts:
        for gram in count:
            places.setdefault(gram, len(places))
    table = np.zeros((len(texts), len(places)))
    for row, count in zip(table, counts, strict=True):
        row[[places[gram] for gram in count]] = list(count.values())
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    return np.clip(table @ table.T, 0.0, 1.0)


def vendi_score(alike: np.ndarray) -> float:
    """The effective number of different answers, 1 to n: exp of the entropy of the eigenvalues of K / n.

    Friedman and Dieng, "The Vendi Score" (2023). NaN for no text.

    Args:
        alike: `[n, n]`, positive semi-definite with ones on its diagonal.
    """
    if not len(alike):
        return float("nan")
    values = np.linalg.eigvalsh(alike / len(alike))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def compression_ratio(texts: Sequence[str]) -> float:
    """Bytes of all texts over those of their compressed form: the greater, the more they repeat each other.

    Shaib et al., "Standardizing the Measurement of Text Diversity" (2024). NaN where there is no text.
    """
    whole = "\n".join(texts).encode()
    return len(whole) / len(zlib.compress(whole, 9)) if whole.strip() else float("nan")


def distinct_answers(texts: Sequence[str], same: Equivalence | None = None) -> int:
    """How many classes of answers that say the same there are: distinct_k of NoveltyBench
    (Zhang et al. 2025).

    Each text joins the first class whose first member is equivalent to it.

    Args:
        same: whether two texts say the same; by default, whether their n-grams are alike to `SAME`.
    """
    return len(_classes(texts, same))


def mode_share(texts: Sequence[str], same: Equivalence | None = None) -> float:
    """The share of the most frequent answer: 1 for a model that has collapsed on one. NaN for no text."""
    return max(map(len, _classes(texts, same))) / len(texts) if texts else float("nan")


def good_diversity(alike: np.ndarray, scores: Sequence[float], least: float) -> float:
    """Unlikeness of two answers where both are good, 0 where one is not: the mean over all pairs, 0 to 1.

    Effective semantic diversity of Shypula et al., "Evaluating the Diversity and Quality of LLM Generated
    Content" (2025). NaN for fewer than two texts.

    Args:
        alike: `[n, n]`.
        scores: `[n]`, of a judge.
        least: from which score on an answer is good.
    """
    count = len(alike)
    if count < 2:
        return float("nan")
    good = np.asarray(scores, dtype=np.float64) >= least
    both = np.outer(good, good)
    np.fill_diagonal(both, False)
    return float(((1 - alike) * both).sum() / (count * (count - 1)))


def _classes(texts: Sequence[str], same: Equivalence | None) -> list[list[int]]:
    """Indices of the texts by class."""
    classes: list[list[int]] = []
    alike = likeness(texts) if same is None else None
    for index, text in enumerate(texts):
        for members in classes:
            first = members[0]
            if same(texts[first], text) if same else alike is not None and alike[first, index] >= SAME:
                members.append(index)
                break
        else:
            classes.append([index])
    return classes
