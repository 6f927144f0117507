"""RAKE against scores by hand, and what a text keeps at each level."""

import re
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from softpref.errors import ConfigError
from softpref.key_content import (
    STOP_WORDS,
    _candidates,
    check_language,
    key_phrases,
    texts_by_level,
    without,
)

pytestmark = pytest.mark.fast

# candidates: "linear systems" twice, "fast solvers", "linear solvers", "good"
# freq: linear 3, systems 2, fast 1, solvers 2, good 1; deg: linear 6, systems 4, fast 2, solvers 4, good 1
# so each word of a pair scores 2, every pair 4, and "good" 1: ties by first occurrence
FIRST = "Fast solvers of linear systems, and the Linear solvers are good for linear systems."
# candidates: "deep red wine", "red", "wine", "cheese"
# freq: deep 1, red 2, wine 2, cheese 1; deg: deep 3, red 3 + 1, wine 3 + 1, cheese 1
# deep 3, red 2, wine 2, cheese 1: "deep red wine" 7, then "wine" 2 and "red" 2 as they occur, "cheese" 1
SECOND = "A deep red wine; the wine is red.\nCheese"
# zoo has a degree of 1 + 5 and occurs twice: "red wine box cat zoo" 4 * 5 + 3, "fig tree" 2 + 2, "zoo" 3;
# by the mean of its words "fig tree" would have 2, and by degree alone "zoo" 6
THIRD = "Zoo, very: red wine box cat zoo; fig tree"
# cat 2, box 8/3, fig 7/3: "box box fig" 23/3, then "cat box" and "fig fig", both 14/3, as they occur;
# in floating-point numbers the sum of "fig fig" is the greater one
FOURTH = "Cat box, fig fig; box box fig"


@pytest.mark.parametrize(
    ("text", "ranked"),
    [
        (FIRST, ["fast solvers", "linear systems", "linear solvers", "good"]),
        (SECOND, ["deep red wine", "wine", "red", "cheese"]),
        (THIRD, ["red wine box cat zoo", "fig tree", "zoo"]),
        (FOURTH, ["box box fig", "cat box", "fig fig"]),
        ("What is it?", []),
        ("Don’t: it’s the state-of-the-art.", ["state-of-the-art"]),
    ],
)
def test_phrases_are_ranked_as_by_hand(text, ranked):
    assert key_phrases(text) == ranked


def test_scores_are_degree_over_frequency_summed_over_a_phrase():
    """By the definition, written out; a word that occurs twice in a phrase counts twice."""
    text = "a b c, a x, c d e f and d"
    stop = STOP_WORDS["en"]
    phrases = [["b", "c"], ["x"], ["c", "d", "e", "f"], ["d"]]  # "a" is a stop word
    assert "a" in stop
    words = [word for phrase in phrases for word in phrase]
    scores = {}
    for phrase in phrases:
        scores[" ".join(phrase)] = sum(
            Fraction(sum(len(one) * one.count(word) for one in phrases), words.count(word)) for word in phrase
        )
    assert scores == {"b c": 2 + 3, "x": 1, "c d e f": 3 + Fraction(5, 2) + 4 + 4, "d": Fraction(5, 2)}
    assert key_phrases(text) == sorted(scores, key=scores.__getitem__, reverse=True)


def test_what_is_removed_goes_wherever_it_occurs_and_spaces_that_meet_become_one():
    assert without(FIRST, {"linear systems"}) == "Fast solvers of , and the Linear solvers are good for ."
    assert without("cats are cats", {"cats"}) == " are "
    assert without("the  big cats  are", {"big cats"}) == "the are"
    assert without("so  it is,  then, cats", {"cats"}) == "so  it is,  then, "  # elsewhere nothing changes
    assert without("cats\n\tdogs", {"cats", "dogs"}) == "\n\t"
    assert without("the cat, cats", {"cat"}) == "the , cats"


def test_levels_of_messages_are_those_of_all_their_words():
    told = [
        {"role": "assistant", "content": "Red wine"},
        {"role": "assistant", "content": "with cheese, red"},
    ]
    assert texts_by_level(told, 3) == [
        [{"role": "assistant", "content": ""}, {"role": "assistant", "content": "with cheese, "}],
        [{"role": "assistant", "content": ""}, {"role": "assistant", "content": "with , "}],
    ]
    assert told[0]["content"] == "Red wine"


def test_a_text_of_too_few_phrases_has_no_levels():
    assert len(texts_by_level("Wine, bread and cheese", 4)) == 3
    assert texts_by_level("Wine, bread, wine and bread", 4) == []


def test_another_language_is_refused_by_name():
    with pytest.raises(ConfigError, match="degree_language must be en, got 'de'"):
        check_language("de")


PIECES = [
    "the",
    "and",
    "is",
    "Wine",
    "wine",
    "cheese",
    "red",
    "don't",
    "state-of",
    "é",
    "7",
    "_",
    "'",
    "-",
    "’",
]
PIECES += [" ", "  ", " ", "\n", "\t", ", ", ". ", "*", '"', "\u00a0"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        (FIRST, [f" of , and the {left} for ." for left in ("Linear solvers are good", "are good", "are")]),
        (SECOND, ["A ; the is red.\nCheese", "A ; the is .\nCheese", "A ; the is .\n"]),
    ],
)
def test_levels_are_these_on_every_platform(text, levels):
    assert texts_by_level(text, 4) == levels


def test_no_stop_word_and_no_punctuation_ever_vanishes():
    """As an eye reads the text, without the product's own notion of a phrase."""
    text = "Well, an old oak (of the park) isn't as tall -- or so they say -- as that: a fir, a very big fir!"
    texts = texts_by_level(text, 6)
    assert len(texts) == 5
    for one in texts:
        words = re.findall(r"[a-z']+", one.lower())
        content = ("old", "oak", "park", "tall", "say", "fir", "big")
        stops = " ".join(word for word in words if word not in content)
        assert stops == "well an of the isn't as or so they as that a a very"
        assert re.sub(r"[\w\s']", "", one) == ",()----:,!"


@given(TEXTS, st.integers(2, 6))
def test_each_level_keeps_less_and_all_keep_stop_words_and_punctuation(text, levels):
    found = texts_by_level(text, levels)
    phrases = key_phrases(text)
    assert bool(found) == (len(phrases) >= levels - 1)
    names = [[" ".join(word[0] for word in run).lower() for run in _candidates(one, "en")] for one in found]
    kept = [{name.replace("’", "'") for name in one} for one in names]
    for level, (more, less) in enumerate(zip([{*phrases}, *kept], kept, strict=False), 1):
        assert less <= more
        gone = -(-level * len(phrases) // (levels - 1))
        assert less == {*phrases[gone:]}
    for one in found:
        assert _grammar(one) == _grammar(text)
    if found:
        assert len({*found}) == len(found)
        assert text not in found
        assert not kept[-1]


def _grammar(text):
    """What is left of a text without its phrases and its spaces: stop words and punctuation, in order."""
    place, left = 0, []
    for run in _candidates(text, "en"):
        left.append(text[place : run[0].start()])
        place = run[-1].end()
    return "".join("".join([*left, text[place:]]).split(" "))


def test_levels_are_the_same_in_another_process():
    code = f"from softpref.key_content import *; print(texts_by_level({SECOND!r}, 4))"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs == [f"{texts_by_level(SECOND, 4)}\n"] * 2
