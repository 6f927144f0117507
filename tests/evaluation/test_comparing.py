"""Figures of a judge that compares and gives no scores."""

import numpy as np
import pytest
from softpref.errors import ConfigError
from softpref.evaluation.comparing import compare_samples
from softpref.evaluation.diversity import variety_by_prompt
from softpref.evaluation.measure import by_prompt
from softpref.evaluation.quality import length_controlled_win_rate, quality
from softpref.intervals import interval
from softpref.judges.protocol import TellingJudge, Verdict, verdicts_of
from softpref.judges.reliability import agreement
from softpref.records.evaluation import DrawnText

pytestmark = pytest.mark.fast

NAN = float("nan")


class Told(TellingJudge):
    """Says what it was told of the first text, and of others that it has ended."""

    name, description, fingerprint = "told", "", ""

    def __init__(self, known):
        self.known, self.asked, self.usage, self.ended = known, [], {}, "it has gone home"

    def verdicts(self, prompts, first, second):
        self.asked += list(zip(prompts, first, second, strict=True))
        return [self.known.get(text, Verdict(NAN)) for text in first]


def drawn(*texts):
    return [DrawnText(text, None, False, tokens=len(text)) for text in texts]


SAMPLES = [drawn("a", "bbb", "c"), drawn("dd", "e", "f")]
REFERENCE = [drawn("1", "2", "3"), drawn("4", "5", "6")]
KNOWN = {
    "a": Verdict(0.9, (0.9, 0.9), "A / B"),
    "bbb": Verdict(0.5, (0.8, 0.2)),
    "dd": Verdict(0.25, (0.3, 0.2), unread=0),
    "e": Verdict(0.5, None, unread=1),
}


def test_the_nth_sample_meets_the_nth_of_the_reference_all_first_ones_first():
    judge = Told(KNOWN)
    judged, figures, warnings = compare_samples(judge, ["p", "q"], SAMPLES, REFERENCE, 2)
    assert judge.asked == [("p", "a", "1"), ("q", "dd", "4"), ("p", "bbb", "2"), ("q", "e", "5")]
    assert [[text.win for text in group] for group in judged] == [[0.9, 0.5, None], [0.25, 0.5, None]]
    assert judged[0][0].reason == "A / B"
    assert figures["win_rate"] == interval([0.9, 0.25, 0.5, 0.5], [0, 1, 0, 1], unit="probability")
    assert figures["win_rate"].value == pytest.approx(np.mean([0.9, 0.5, 0.25, 0.5]))
    # alike, against each other, alike; the fourth was not read in both orders
    assert figures["position_consistency"].value == pytest.approx(2 / 3)
    assert (figures["position_consistency"].n, figures["win_rate"].n) == (3, 4)
    assert warnings == [
        "1 of the judge's answers about pairs of samples could not be read; each counts as a tie."
    ]


def test_what_was_not_judged_is_left_out_and_said():
    judge = Told({name: KNOWN[name] for name in ("a", "bbb")})
    judged, figures, warnings = compare_samples(judge, ["p", "q"], SAMPLES, REFERENCE, 0)
    assert len(judge.asked) == 6
    assert figures["win_rate"].value == pytest.approx(0.7)
    assert (figures["win_rate"].n, figures["win_rate"].prompts) == (2, 1)
    assert warnings == [
        "The judge left 4 of 6 pairs of samples unjudged: it has gone home. Its figures come from the others "
        "alone."
    ]
    assert by_prompt(judged, REFERENCE, {}) == {"win_rate": [pytest.approx(0.7), None]}


def test_figures_that_need_scores_are_absent_and_others_come_from_what_was_judged():
    judged, _, _ = compare_samples(Told(KNOWN), ["p", "q"], SAMPLES, REFERENCE, 2)
    figures = quality(judged, REFERENCE)
    assert set(figures) == {"length_controlled_win_rate"}
    assert figures["length_controlled_win_rate"] == length_controlled_win_rate(
        [[0.9, 0.5], [0.25, 0.5]], [[1, 3], [2, 1]], [[1, 1], [1, 1]]
    )
    assert set(variety_by_prompt(judged, REFERENCE)) == {
        "vendi_score", "distinct_answers", "mode_share", "compression_ratio",
    }  # fmt: skip
    nothing = quality(SAMPLES, REFERENCE)["length_controlled_win_rate"]
    assert (nothing.value, nothing.n) == (None, 0)


class Alike(Told):
    """Says the same of two texts whichever comes first; `known` is of the one that is not `other`."""

    def verdicts(self, prompts, first, second):
        self.asked += list(zip(prompts, first, second, strict=True))
        found = []
        for one, other in zip(first, second, strict=True):
            verdict = self.known.get(one if other == "other" else other, Verdict(NAN))
            found.append(
                verdict if other == "other" else verdict._replace(probability=1 - verdict.probability)
            )
        return found


def test_agreement_with_people_counts_majorities_and_leaves_ties_out():
    """Right of x over y (0.9), wrong of a pair that people liked the other way, half of its own tie."""
    known = {"x": Verdict(0.9), "y": Verdict(0.9), "z": Verdict(0.5), "u": Verdict(0.9)}
    shares = [("x", None), ("y", 0.2), ("z", 1.0), ("u", 0.5), ("unknown", 1.0)]
    rows = [
        {"prompt": f"p{place}", "completions": [text, "other"], "kind": "pairwise", "probability": share}
        for place, (text, share) in enumerate(shares)
    ]
    judge = Alike(known)
    found, warnings = agreement(judge, rows)
    accuracy = found["accuracy"]
    assert accuracy.value == pytest.approx((1 + 0 + 0.5) / 3)
    assert accuracy.n == 3
    assert [{*texts} - {"other"} for _, *texts in judge.asked] == [{"x"}, {"y"}, {"z"}, {"unknown"}]
    assert "left 1 of 4 held-out preferences unjudged" in warnings[0]
    few = Alike(known)
    agreement(few, rows, most=2)
    assert len(few.asked) == 2


def test_a_judge_that_always_names_the_first_agrees_by_chance_alone():
    class First(Told):
        def verdicts(self, prompts, first, second):
            return [Verdict(1.0) for _ in first]

    rows = [
        {"prompt": f"p{i}", "completions": ["better", "worse"], "kind": "pairwise", "probability": None}
        for i in range(400)
    ]
    found, _ = agreement(First({}), rows)
    assert found["accuracy"].low < 0.5 < found["accuracy"].high


@pytest.mark.parametrize("chances", [[0.5], [0.5, 1.5], [[0.5, 0.5]] * 2])
def test_answers_that_are_no_probabilities_are_refused(chances):
    class Broken:
        name = "broken"

        def probabilities(self, prompts, first, second):
            return chances

    with pytest.raises(ConfigError, match="the judge 'broken' was asked to compare 2 pairs"):
        verdicts_of(Broken(), ["p", "q"], ["a", "b"], ["c", "d"])
