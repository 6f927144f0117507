"""The story world: very short stories whose every possible text and expert reward are known.

A prompt asks for a story about a hero with a trait. A story fills four slots with six options each, so a
prompt has 6⁴ = 1,296 stories. Experts judge a story by how well it suits the trait and the hero, with a
known reward; their preferences follow Bradley-Terry, their rankings Plackett-Luce. A trained model can
therefore be compared with theory by enumeration.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

from softpref.judges.outcomes import Outcomes

_TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
_SLOTS: list[list[str]] = [*_TABLES["slots"].values()]
_TASTE: dict[str, list[list[float]]] = _TABLES["taste"]
_HOME = {hero: place for place, heroes in enumerate(_TABLES["heroes"]) for hero in heroes}
STORIES = math.prod(map(len, _SLOTS))  # of one prompt
# How often writers take each option of a slot: they have habits, but every story can occur. They lean
# slightly towards what suits the prompt, as people do; experts lean further.
_HABIT = np.array([0.24, 0.20, 0.18, 0.15, 0.13, 0.10])
_LEANING = 0.3
_HOME_BONUS = 0.5  # nats that experts give for seeing a hero at home
# Experts judge two slots together: they like what stays a secret to happen at night.
_SECRET_AT_NIGHT = 0.6


class World(ABC):
    """Draws of preferences and demonstrations whose expert reward is known.

    Attributes:
        prompts: each is drawn equally often.
    """

    prompts: list[str]

    @abstractmethod
    def story(self, prompt: str, random: np.random.Generator) -> str:
        """Draw a completion as writers write."""

    @abstractmethod
    def _candidates(
        self, prompt: str, count: int, random: np.random.Generator
    ) -> tuple[list[str], np.ndarray]:
        """Draw distinct completions, one after another as writers write, with their rewards in nats."""

    def _pair(self, prompt: str, random: np.random.Generator) -> tuple[list[str], np.ndarray]:
        return self._candidates(prompt, 2, random)

    def preferences(self, rows: int, seed: int, votes: int = 1) -> Iterator[dict[str, object]]:
        """Draw pairs of distinct completions, judged by experts under Bradley-Terry.

        Args:
            rows: how many pairs.
            votes: experts per pair; 1 gives hard labels, more give vote shares, 0 gives the exact
                `probability` that the first wins in place of votes.
        """
        random = np.random.default_rng(seed)
        for _ in range(rows):
            prompt = self._prompt(random)
            (a, b), rewards = self._pair(prompt, random)
            row = {"prompt": prompt, "completion_a": a, "completion_b": b}
            probability = 1.0 / (1.0 + np.exp(-(rewards[0] - rewards[1])))
            if votes:
                votes_a = int(random.binomial(votes, probability))
                yield {**row, "votes_a": votes_a, "votes_b": votes - votes_a}
            else:
                yield {**row, "probability": float(probability)}

    def rankings(
        self, rows: int, seed: int, size: int, *, only_best: bool = False
    ) -> Iterator[dict[str, object]]:
        """Draw sets of distinct completions, ordered by one expert: `prompt` and `completions`, best first.

        The expert orders them by Plackett-Luce: the first is a completion with probability in proportion to
        exp(reward), the next likewise among the rest. For two completions, this is Bradley-Terry.

        Args:
            rows: how many sets.
            size: completions per set.
            only_best: give the expert's favourite alone; the others follow as they were drawn, and `best`
                is 0.
        """
        random = np.random.default_rng(seed)
        for _ in range(rows):
            prompt = self._prompt(random)
            completions, rewards = self._candidates(prompt, size, random)
            # rewards with Gumbel noise, sorted, are in Plackett-Luce order
            order = np.argsort(-(rewards + random.gumbel(size=size))).tolist()
            if only_best:
                order = [order[0], *(place for place in range(size) if place != order[0])]
            row: dict[str, object] = {
                "prompt": prompt,
                "completions": [completions[place] for place in order],
            }
            yield {**row, "best": 0} if only_best else row

    def demonstrations(self, rows: int, seed: int) -> Iterator[dict[str, object]]:
        """Draw completions as writers write them, as SFT data: `prompt` and `completion`."""
        random = np.random.default_rng(seed)
        for _ in range(rows):
            prompt = self._prompt(random)
            yield {"prompt": prompt, "completion": self.story(prompt, random)}

    def _prompt(self, random: np.random.Generator) -> str:
        return self.prompts[random.integers(len(self.prompts))]


class StoryWorld(World):
    """Prompts, one for each hero and trait, and their stories."""

    def __init__(self) -> None:
        self._subjects = {
            f"Write a very short story about a {trait} {hero}.\n": (trait, hero)
            for hero, trait in itertools.product(_HOME, _TASTE)
        }
        self._outcomes: dict[str, Outcomes] = {}
        self.prompts = list(self._subjects)

    def outcomes(self, prompt: str) -> Outcomes:
        """Every story of `prompt` with its reward and the probability of being drawn."""
        if prompt not in self._outcomes:
            trait, hero = self._subjects[prompt]
            choices = list(itertools.product(*(range(len(slot)) for slot in _SLOTS)))
            rewards = np.array([_reward(trait, hero, choice) for choice in choices])
            weights = _HABIT[np.array(choices)].prod(axis=1) * np.exp(_LEANING * rewards)
            self._outcomes[prompt] = Outcomes(
                completions=[_story(hero, choice) for choice in choices],
                rewards=rewards,
                weights=weights / weights.sum(),
            )
        return self._outcomes[prompt]

    def story(self, prompt: str, random: np.random.Generator) -> str:
        completions, _, weights = self.outcomes(prompt)
        return completions[random.choice(len(weights), p=weights)]

    def _candidates(
        self, prompt: str, count: int, random: np.random.Generator
    ) -> tuple[list[str], np.ndarray]:
        completions, rewards, weights = self.outcomes(prompt)
        drawn = random.choice(len(weights), count, replace=False, p=weights)
        return [completions[story] for story in drawn], rewards[drawn]

    def _pair(self, prompt: str, random: np.random.Generator) -> tuple[list[str], np.ndarray]:
        completions, rewards, weights = self.outcomes(prompt)
        a = b = random.choice(len(weights), p=weights)
        while a == b:
            b = random.choice(len(weights), p=weights)
        return [completions[a], completions[b]], rewards[[a, b]]


def _story(hero: str, choice: tuple[int, ...]) -> str:
    when, went, found, ending = (slot[option] for slot, option in zip(_SLOTS, choice, strict=True))
    return f"{when}, the {hero} {went} and {found}. {ending}"


def _reward(trait: str, hero: str, choice: tuple[int, ...]) -> float:
    reward = sum(taste[option] for taste, option in zip(_TASTE[trait], choice, strict=True))
    reward += _HOME_BONUS * (choice[1] == _HOME[hero])
    at_night, in_secret = choice[0] in (1, 5), choice[3] == 3
    return reward + _SECRET_AT_NIGHT * (at_night and in_secret)
