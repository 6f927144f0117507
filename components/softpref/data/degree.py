"""Rankings made of completions by removing key content: the degree loss as preferences, without a head.

A variant of our own. It says that the whole text is better than what is left of it, through the likelihood
itself, so a policy can learn from it to write at length.
"""

from __future__ import annotations

from collections.abc import Iterator

from softpref.data.config import DataConfig
from softpref.data.rows import Preference
from softpref.key_content import texts_by_level
from softpref.records.dataset import Text


def sides(config: DataConfig) -> tuple[int, ...]:
    """Places of the completions that become rankings, among those of a row."""
    return {"both": (0, -1), "preferred": (0,), "dispreferred": (-1,)}[config.degree_on]


def degree_rankings(row: Preference, config: DataConfig) -> Iterator[Preference]:
    """`y ≻ y at level 1 ≻ … ≻ y at level K − 1` for a row's first and last completion, as `degree_on` says.

    None of a completion with fewer than K − 1 phrases, or of which nothing would be left.
    """
    for place in sides(config):
        whole = row.completions[place]
        left = texts_by_level(whole, config.degree_levels, config.degree_language)
        if left and _characters(left[-1]):
            yield Preference(row.prompt, [whole, *left], "ranking", None, row.dimension)


def _characters(text: Text) -> str:
    return (text if isinstance(text, str) else "".join(one["content"] for one in text)).strip()
