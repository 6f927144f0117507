"""The storyteller: short stories in natural language, too many to enumerate, of a known reward.

A prompt begins a story; a story goes on for two to six sentences, so that completions differ in length as
those of real data do. The experts' reward depends only on the text. Preferences follow Bradley-Terry,
rankings Plackett-Luce. What a trained model should do is therefore known here too, by importance sampling
from its reference. Asked for dimensions, experts judge the same stories by `warmth`, the reward otherwise,
and by `brevity`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

from softpref.data.story_world import World
from softpref.rewards import TextReward

REWARD = TextReward(
    warmth={
        **dict.fromkeys(("hugged", "kind", "thanked", "gentle", "loved", "together", "helped"), 1.2),
        **dict.fromkeys(("smiled", "laughed", "happy", "shared", "friends", "warm", "sang", "proud"), 0.8),
        **dict.fromkeys(("sunny", "pretty", "soft", "danced", "brave", "sweet"), 0.4),
        **dict.fromkeys(("rainy", "old", "tired", "quiet", "lost", "dark"), -0.4),
        **dict.fromkeys(("cried", "sad", "afraid", "cold", "broke", "alone", "lonely", "fell"), -0.8),
        **dict.fromkeys(("angry", "shouted", "mean", "stole", "hurt", "lied", "hated"), -1.2),
    },
    ease=0.3,
    grade=2.0,
)
"""What experts like: warm words, and words that are easy to read."""
DIMENSIONS = {"warmth": REWARD, "brevity": TextReward({}, brevity=0.1, usual=28)}
"""What they judge by, one after another, where there are dimensions."""

_MIDDLE = (0.1, 0.3, 0.3, 0.2, 0.1)  # how often a story has 0, 1, 2, 3, 4 sentences between first and last
_FALLING = 0.85  # how much rarer each form or word of a list is than the one before it
_GRAMMAR = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
_ANIMALS: dict[str, str] = _GRAMMAR["animals"]  # and where each lives
_PRONOUNS: dict[str, str] = _GRAMMAR["names"]  # of each name
_SENTENCES: dict[str, list[str]] = _GRAMMAR["sentences"]
_WORDS: dict[str, list[str]] = _GRAMMAR["words"]
_SLOT = re.compile(r"\{(\w+)\}")


class Storyteller(World):
    """Prompts, one for each trait, animal and name, and stories in natural language.

    Args:
        dimensions: of `DIMENSIONS`.
    """

    def __init__(self, dimensions: Sequence[str] = ()) -> None:
        self.dimensions = dimensions
        self._subjects = {
            f"Once upon a time a {trait} {animal} called {name} lived {home}.": (name, animal, home)
            for trait in _GRAMMAR["traits"]
            for animal, home in _ANIMALS.items()
            for name in _PRONOUNS
        }
        self._cumulative = {
            size: np.cumsum(_FALLING ** np.arange(size)) / np.sum(_FALLING ** np.arange(size))
            for size in range(1, 16)
        }
        self.prompts = list(self._subjects)

    def story(self, prompt: str, random: np.random.Generator) -> str:
        """Draw one completion of `prompt`, as writers write; it begins with a space."""
        name, animal, _ = self._subjects[prompt]
        she = _PRONOUNS[name]
        her = {"she": "her", "he": "his"}[she]
        fixed = {"name": name, "she": she, "her": her, "helper": self._one([*_ANIMALS], random, animal)}
        middle = int(np.searchsorted(np.cumsum(_MIDDLE), random.random()))
        kinds = ["began", *("found" if i % 2 == 0 else "met" for i in range(middle)), "ended"]
        return "".join(f" {self._fill(self._one(_SENTENCES[kind], random), fixed, random)}" for kind in kinds)

    def _candidates(
        self, prompt: str, count: int, random: np.random.Generator
    ) -> tuple[list[str], np.ndarray]:
        stories: dict[str, None] = {}
        while len(stories) < count:
            stories[self.story(prompt, random)] = None
        if not self.dimensions:
            return list(stories), np.array([REWARD(story) for story in stories])
        rewards = [[DIMENSIONS[name](story) for story in stories] for name in self.dimensions]
        return list(stories), np.array(rewards)

    def _one(self, options: Sequence[str], random: np.random.Generator, but: str = "") -> str:
        while (
            option := options[int(np.searchsorted(self._cumulative[len(options)], random.random()))]
        ) == but:
            pass
        return option

    def _fill(self, text: str, fixed: Mapping[str, str], random: np.random.Generator) -> str:
        """Put words into the slots of `text`; a slot with a capital gives its word one."""

        def word(match: re.Match[str]) -> str:
            slot = match[1].lower()
            found = (
                fixed[slot] if slot in fixed else self._fill(self._one(_WORDS[slot], random), fixed, random)
            )
            return found[:1].upper() + found[1:] if match[1] != slot else found

        return _SLOT.sub(word, text)
