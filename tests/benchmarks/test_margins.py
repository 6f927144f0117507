"""The saturation of pairs by base measure, from planted log-probabilities."""

import numpy as np

from tests.benchmarks.margins import margins, table


def test_what_length_explains_is_no_margin_under_a_base_of_length():
    lengths = np.array([[10, 4], [3, 9], [5, 5], [8, 1]])
    found = margins(-2.5 * lengths, lengths)
    assert found.nats_per_token == 2.5
    assert np.allclose(found.by_length, 0)
    assert found.plain.tolist() == [-15, 15, 0, -17.5]
    assert "| 1 | 75% | 0% | 0% |" in table(found)
    assert "| 0.25 | 0% | 0% | 0% |" in table(found)


def test_what_length_does_not_explain_stays():
    lengths = np.array([[4, 4], [7, 7], [4, 2]])
    logps = np.array([[-30.0, -10.0], [-10.0, -4.0], [-2.0, -2.0]])
    found = margins(logps, lengths)
    assert found.nats_per_token == 0
    assert found.by_length.tolist() == found.plain.tolist() == [-20, -6, 0]
    assert "| 0.5 | 33% | 33% | 0% |" in table(found)
