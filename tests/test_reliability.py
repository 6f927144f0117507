"""How far a judge can be trusted: its agreement with people, beside that of length, by brute force."""

import numpy as np
import pytest
from softpref.fitness import distrust
from softpref.judges.bradley_terry import BradleyTerryJudge
from softpref.judges.protocol import ScoringJudge
from softpref.judges.reliability import agreement, decided_pairs
from softpref.judges.texts import preference_pairs
from softpref.records.evaluation import Evaluation, JudgedBy

from tests.evaluations import evaluation

pytestmark = pytest.mark.fast

NOUNS = ["sea", "owl", "fox", "bell", "road", "hill"]


class Vowels(ScoringJudge):
    """Likes the letter a."""

    name = "vowels"

    def scores(self, prompts, completions):
        return np.array([text.count("a") for text in completions], float)


def row(prompt, *completions, kind="pairwise", probability=None):
    return {"prompt": prompt, "completions": [*completions], "kind": kind, "probability": probability}


ROWS = [
    row("p", "aa", "bbbb"),  # the judge agrees, length does not
    row("p", "bbbb", "a", probability=0.7),  # it disagrees, length agrees
    row("q", "ab", "aab", probability=0.2),  # the majority is with the second: both agree
    row("q", "a", "b", probability=0.5),  # nobody's majority: left out
    row("q", "cc", "dd"),  # ties of both
    row("r", "aaa", "aa", "bbbbb", kind="ranking"),
    row("s", "a", "bb", "c", kind="best_of_n"),
]
JUDGE = [1, 0, 1, 0.5, 1, 1, 1, 1, 1]
LONGER = [0, 1, 1, 0.5, 1, 0, 0, 0, 0.5]


def test_pairs_count_to_their_majority():
    assert decided_pairs(ROWS) == [
        *(("p", "aa", "bbbb"), ("p", "bbbb", "a"), ("q", "aab", "ab"), ("q", "cc", "dd")),
        *(("r", "aaa", "aa"), ("r", "aaa", "bbbbb"), ("r", "aa", "bbbbb")),
        *(("s", "a", "bb"), ("s", "a", "c")),
    ]


def test_agreement_and_that_of_length_are_shares_of_pairs():
    found = agreement(Vowels(), ROWS)[0]
    assert found["accuracy"].value == pytest.approx(np.mean(JUDGE))
    assert found["longer_accuracy"].value == pytest.approx(np.mean(LONGER))
    assert found["length_accuracy"].value == pytest.approx(1 - np.mean(LONGER))  # "shorter"
    difference = np.array(JUDGE) - (1 - np.array(LONGER))
    assert found["over_length"].value == pytest.approx(difference.mean())
    assert found["accuracy"].n == 9
    assert found["accuracy"].prompts == 4


def test_the_difference_is_taken_pair_by_pair_and_resampled_by_prompt():
    """A judge that agrees with length on every pair differs from it by nothing at all."""

    class Long(Vowels):
        def scores(self, prompts, completions):
            return np.array([len(text) for text in completions], float)

    rows = [row(f"p{i}", *(("aaa", "a") if i % 4 else ("a", "aaa"))) for i in range(40)]
    over = agreement(Long(), rows)[0]["over_length"]
    assert (over.value, over.low, over.high) == (0.0, 0.0, 0.0)
    # rows of one prompt are one observation: with all rows of one kind in one prompt the interval is wide
    few = [row(f"p{i % 12}", *(("aaa", "b") if i % 4 else ("b", "aaa"))) for i in range(120)]
    alone = [row(f"p{i}", *(("aaa", "b") if i % 4 else ("b", "aaa"))) for i in range(120)]
    widths = [
        one.high - one.low for one in (agreement(Vowels(), rows)[0]["accuracy"] for rows in (few, alone))
    ]
    assert widths[0] > 2 * widths[1]


def test_without_a_decided_pair_nothing_is_known():
    assert agreement(Vowels(), [])[0] == {}
    assert agreement(Vowels(), ROWS[3:4])[0] == {}
    assert "is unknown" in distrust(JudgedBy("vowels", "", **agreement(Vowels(), [])[0]))


def of_length(prompts, random):
    for prompt in prompts:
        for _ in range(8):
            short, long = sorted((" ".join(random.choice(NOUNS, size)) for size in (2, 5)), key=len)
            if len(short) < len(long):
                yield row(prompt, long, short)


def of_a_lexicon(prompts, random):
    for prompt in prompts:
        for _ in range(8):
            fill = [" ".join(random.choice(NOUNS, random.integers(1, 6))) for _ in range(2)]
            yield row(prompt, f"kind {fill[0]}", f"rude {fill[1]}")


@pytest.mark.parametrize(("planted", "trusted"), [(of_length, False), (of_a_lexicon, True)])
def test_a_judge_of_length_alone_is_marked_and_one_of_words_is_not(planted, trusted):
    random = np.random.default_rng(0)
    judge = BradleyTerryJudge(preference_pairs(planted([f"p{i}" for i in range(30)], random)))
    judged = JudgedBy(judge.name, "", **agreement(judge, planted([f"q{i}" for i in range(20)], random))[0])
    assert judged.accuracy.low > 0.8
    assert (judged.over_length.low > 0) is trusted
    assert bool(distrust(judged)) is not trusted
    if not trusted:
        assert "If length is what people want, no judge is needed" in distrust(judged)


def test_evaluations_keep_these_figures_and_older_ones_without_them_are_read(tmp_path):
    judged = JudgedBy("vowels", "", **agreement(Vowels(), ROWS)[0])
    written = evaluation(judge=judged._asdict())
    written.write(tmp_path)
    again = Evaluation.read(tmp_path)
    assert again.judge == judged
    assert again.values("eval/")["eval/judge/over_length"] == judged.over_length.value
    old = evaluation(judge={"name": "bradley-terry", "accuracy": {"value": 0.8}})
    assert old.judge.over_length is None
