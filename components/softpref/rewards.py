"""A known reward of a text, read off its words: what the storyteller's experts like, or your own."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

from softpref.disk import DAMAGED, in_brief
from softpref.errors import DataError

_WORD, _END = re.compile(r"[^\W\d_]+"), re.compile(r"[.!?]+")
_FURTHEST = 5.0  # grades from `grade` that count, so that no text is good or bad without bounds


@dataclasses.dataclass(frozen=True)
class TextReward:
    """A reward in nats, `warmth` plus `ease`, that anyone can recompute from the text.

    Args:
        warmth: word, in lower case, to what a text gains by having it, however often.
        ease: what a text gains for each grade that its Automated Readability Index (Smith and Senter 1967),
            4.71 letters per word + 0.5 words per sentence − 21.43, is below `grade`; at most 5 grades count.
        grade: school grade at which `ease` gives nothing.
    """

    warmth: dict[str, float]
    ease: float = 0.0
    grade: float = 0.0

    def __call__(self, text: str) -> float:
        """The reward of `text` in nats; 0 where it has no word."""
        words = _WORD.findall(text.lower())
        if not words:
            return 0.0
        sentences = max(1, len(_END.findall(text)))
        index = 4.71 * sum(map(len, words)) / len(words) + 0.5 * len(words) / sentences - 21.43
        below = min(_FURTHEST, max(-_FURTHEST, self.grade - index))
        # sorted: sums of floats depend on their order, and that of a set differs between processes
        return sum(self.warmth.get(word, 0.0) for word in sorted(set(words))) + self.ease * below

    def write(self, path: str | Path) -> None:
        """Write it as JSON, for `read_reward`."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")


def read_reward(path: str | Path) -> TextReward:
    """The reward that a JSON file describes by the fields of `TextReward`.

    Raises:
        DataError: the file is not such JSON, or a value is not a finite number.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
        warmth = {str(word): float(value) for word, value in given.pop("warmth").items()}
        reward = TextReward(warmth, **{name: float(value) for name, value in given.items()})
    except DAMAGED as error:
        raise DataError(
            f"{path}: expected warmth (word to number), ease and grade ({in_brief(error)})"
        ) from error
    if not all(map(math.isfinite, (*warmth.values(), reward.ease, reward.grade))):
        raise DataError(f"{path}: warmth, ease and grade must be finite numbers")
    return reward
