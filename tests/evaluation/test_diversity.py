"""Measures of variety: closed forms, and models whose variety is known."""

import numpy as np
import pytest
from softpref.evaluation.diversity import (
    at_length,
    compression_ratio,
    distinct_answers,
    good_diversity,
    likeness,
    mode_share,
    vendi_score,
)
from softpref.evaluation.metrics import distinct, self_bleu, words

pytestmark = pytest.mark.fast

WORDS = "the a old brave small green fox owl river house saw found kept lost near under bright"


def sentence(random):
    """One of some thousands of sentences, all of one grammar."""
    pick = random.choice
    subject, thing = (
        pick(["fox", "owl", "girl", "king", "bear", "crow"]),
        pick(["stone", "cloud", "lamp", "boat"]),
    )
    first, second = pick(["old", "brave", "small", "kind"]), pick(["green", "bright", "lost", "warm"])
    verb, place = (
        pick(["found", "kept", "saw", "lost"]),
        pick(["the river", "a house", "the hill", "her door"]),
    )
    return f"the {first} {subject} {verb} a {second} {thing} near {place} and was glad of it ."


@pytest.fixture
def planted():
    """Eight models' worth of samples by kind, with a judge's scores: 1 for a sentence, 0 for noise."""
    random = np.random.default_rng(0)
    one = sentence(random)
    swaps = {"glad": ["glad", "pleased"], "near": ["near", "by"]}

    def paraphrased():
        return " ".join(random.choice(swaps.get(word, [word])) for word in one.split())

    texts = {
        "collapsed": [one] * 16,
        "paraphrasing": [paraphrased() for _ in range(16)],
        "diverse": [sentence(random) for _ in range(16)],
        "random": [" ".join(random.permutation(WORDS.split() * 3)[:18]) for _ in range(16)],
    }
    return texts, {kind: [0.0 if kind == "random" else 1.0] * 16 for kind in texts}


def test_variety_among_good_answers_ranks_planted_models_right_and_words_alone_do_not(planted):
    texts, scores = planted
    good = {kind: good_diversity(likeness(group), scores[kind], least=0.5) for kind, group in texts.items()}
    assert good["random"] == 0.0
    assert good["collapsed"] == pytest.approx(0.0, abs=1e-9)
    assert good["collapsed"] < good["paraphrasing"] < 0.3 < good["diverse"]
    # the classical measures prefer noise
    tokens = {kind: [words(text) for text in group] for kind, group in texts.items()}
    assert distinct(tokens["random"], 2) > distinct(tokens["diverse"], 2)
    assert self_bleu(tokens["random"]) < self_bleu(tokens["diverse"])


def test_effective_number_of_answers_is_one_when_collapsed_and_all_when_nothing_is_shared(planted):
    texts, _ = planted
    assert vendi_score(likeness(texts["collapsed"])) == pytest.approx(1.0)
    apart = [f"{letter}1 {letter}2" for letter in "abcdefgh"]
    assert vendi_score(likeness(apart)) == pytest.approx(8.0)
    assert vendi_score(likeness(apart + apart)) == pytest.approx(8.0)
    scores = [vendi_score(likeness(texts[kind])) for kind in ("collapsed", "paraphrasing", "diverse")]
    assert scores == sorted(scores)
    assert scores[2] > 2 * scores[1]


def test_classes_of_answers_and_the_share_of_the_most_frequent(planted):
    texts, _ = planted
    assert distinct_answers(texts["collapsed"]) == 1
    assert mode_share(texts["collapsed"]) == 1.0
    assert distinct_answers(texts["paraphrasing"]) <= 2
    assert distinct_answers(texts["diverse"]) > 10
    assert distinct_answers(["yes", "no", "Yes!"], same=lambda a, b: a[0].lower() == b[0].lower()) == 2
    assert mode_share(["yes", "no", "no", "no"]) == 0.75


def test_compression_tells_repeated_texts_from_various_ones(planted):
    texts, _ = planted
    assert (
        compression_ratio(texts["collapsed"])
        > compression_ratio(texts["paraphrasing"])
        > compression_ratio(texts["diverse"])
    )


def test_texts_are_compared_at_one_length():
    assert at_length(["One, two three four.", "One"], 3) == ["one , two", "one"]


def test_likeness_is_one_for_equal_texts_and_nought_without_a_shared_word():
    alike = likeness(["a b c", "A b c", "d e", ""])
    assert np.allclose(np.diag(alike), 1)
    assert alike[0, 1] == pytest.approx(1)
    assert alike[0, 2] == alike[2, 3] == 0
    # three words and two pairs of five are shared: cosine of (1, 1, 1, 1, 1) and (1, 1, 0, 1, 0) …
    assert likeness(["a b c", "a b"])[0, 1] == pytest.approx(3 / np.sqrt(5 * 3))


def test_too_few_texts_have_no_figure():
    assert np.isnan(vendi_score(likeness([])))
    assert np.isnan(good_diversity(likeness(["a"]), [1.0], 0.0))
    assert np.isnan(compression_ratio([""]))
    assert np.isnan(mode_share([]))
