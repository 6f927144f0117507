"""A known reward of a text, read off its words: what the storyteller's experts like, or your own."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from softpref.disk import DAMAGED, in_brief
from softpref.errors import DataError

_WORD, _END = re.compile(r"[^\W\d_]+"), re.compile(r"[.!?]+")
_FURTHEST = 5.0  # grades from `grade` that count, so that no text is good or bad without bounds


@dataclasses.dataclass(frozen=True)
class TextReward:
    """A reward in nats, `warmth` plus `ease` plus `brevity`, that anyone can recompute from the text.

    Args:
        warmth: word, in lower case, to what a text gains by having it, however often.
        ease: what a text gains for each grade that its Automated Readability Index (Smith and Senter 1967),
            4.71 letters per word + 0.5 words per sentence − 21.43, is below `grade`; at most 5 grades count.
        grade: school grade at which `ease` gives nothing.
        brevity: what a text gains for each word that it has less than `usual`, and loses for each that it has
            more; at most as many words count as are usual.
        usual: number of words at which `brevity` gives nothing.
    """

    warmth: dict[str, float]
    ease: float = 0.0
    grade: float = 0.0
    brevity: float = 0.0
    usual: float = 0.0

    def __call__(self, text: str) -> float:
        """The reward of `text` in nats; 0 where it has no word."""
        words = _WORD.findall(text.lower())
        if not words:
            return 0.0
        sentences = max(1, len(_END.findall(text)))
        index = 4.71 * sum(map(len, words)) / len(words) + 0.5 * len(words) / sentences - 21.43
        below = min(_FURTHEST, max(-_FURTHEST, self.grade - index))
        # sorted: sums of floats depend on their order, and that of a set differs between processes
        warmth = sum(self.warmth.get(word, 0.0) for word in sorted(set(words)))
        shorter = min(self.usual, max(-self.usual, self.usual - len(words)))
        return warmth + self.ease * below + self.brevity * shorter


def write_rewards(path: str | Path, rewards: Mapping[str, TextReward]) -> None:
    """Write rewards by dimension as JSON, for `read_rewards`; the one under an empty name alone."""
    described = {name: dataclasses.asdict(reward) for name, reward in rewards.items()}
    text = json.dumps(described.get("", {"dimensions": described}), indent=2)
    Path(path).write_text(text + "\n", encoding="utf-8")


def read_rewards(path: str | Path) -> dict[str, TextReward]:
    """The rewards that a JSON file describes by the fields of `TextReward`, by dimension of preference.

    Under an empty name where there is one reward.

    Raises:
        DataError: the file is not such JSON, or a value is not a finite number.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
        rewards = {
            name: TextReward(
                {str(word): float(value) for word, value in fields.pop("warmth").items()},
                **{field: float(value) for field, value in fields.items()},
            )
            for name, fields in given.get("dimensions", {"": given}).items()
        }
    except DAMAGED as error:
        raise DataError(
            f"{path}: expected warmth (word to number), ease and grade ({in_brief(error)})"
        ) from error
    for reward in rewards.values():
        numbers = (reward.ease, reward.grade, reward.brevity, reward.usual)
        if not all(map(math.isfinite, (*reward.warmth.values(), *numbers))):
            raise DataError(f"{path}: warmth, ease, grade, brevity and usual must be finite numbers")
    return rewards
