"""The story world: very short stories whose every possible text and expert reward are known.

A prompt asks for a story about a hero with a trait. A story fills four slots with six options each, so a
prompt has 6⁴ = 1,296 stories. Experts judge a story by how well it suits the trait and the hero, with a
known reward; their preferences follow Bradley-Terry, their rankings Plackett-Luce. A trained model can
therefore be compared with theory by enumeration. Asked for dimensions, experts judge the same stories by
`trait` as above and by `brevity`, which agree on some pairs and not on others.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import yaml

from softpref.judges.outcomes import Outcomes

_TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
_SLOTS: list[list[str]] = [*_TABLES["slots"].values()]
_TASTE: dict[str, list[list[float]]] = _TABLES["taste"] | _TABLES["unjudged"]
_HOME = {hero: place for place, heroes in enumerate(_TABLES["heroes"]) for hero in heroes}
STORIES = math.prod(map(len, _SLOTS))  # of one prompt
# How often writers take each option of a slot: they have habits, but every story can occur. They lean
# slightly towards what suits the prompt, as people do; experts lean further.
_HABIT = np.array([0.24, 0.20, 0.18, 0.15, 0.13, 0.10])
_LEANING = 0.3
_HOME_BONUS = 0.5  # nats that experts give for seeing a hero at home
# Experts judge two slots together: they like what stays a secret to happen at night.
_SECRET_AT_NIGHT = 0.6
DIMENSIONS = ("trait", "brevity")
_BREVITY = 0.15  # nats that a story gains in brevity for each character below the usual length …
_USUAL = 95  # … which is this


class World(ABC):
    """Draws of preferences and demonstrations whose expert reward is known.

    Attributes:
        prompts: those of preferences; each is drawn equally often.
        further_prompts: those of which there are only demonstrations, drawn as often as the others.
        dimensions: what experts judge each draw by, one after another; empty: by the one reward alone.
    """

    prompts: list[str]
    further_prompts: Sequence[str] = ()
    dimensions: Sequence[str] = ()

    @abstractmethod
    def story(self, prompt: str, random: np.random.Generator) -> str:
        """Draw a completion as writers write."""

    @abstractmethod
    def _candidates(
        self, prompt: str, count: int, random: np.random.Generator
    ) -> tuple[list[str], np.ndarray]:
        """Draw distinct completions, one after another as writers write.

        Returns:
            The completions, and their rewards in nats: `[n]`, with dimensions `[dimensions, n]`.
        """

    def _pair(self, prompt: str, random: np.random.Generator) -> tuple[list[str], np.ndarray]:
        return self._candidates(prompt, 2, random)

    def preferences(self, rows: int, seed: int, votes: int = 1) -> Iterator[dict[str, object]]:
        """Draw pairs of distinct completions, judged by experts under Bradley-Terry.

        Args:
            rows: how many pairs.
            votes: experts per pair; 1 gives hard labels, more give vote shares, 0 gives the exact
                `probability` that the first wins in place of votes.

        Returns:
            Rows of `prompt`, `completion_a`, `completion_b` and labels: numbers, or with dimensions objects
            that have a number for each.
        """
        random = np.random.default_rng(seed)

        def judge(rewards: np.ndarray) -> dict[str, object]:
            probability = 1.0 / (1.0 + np.exp(-(rewards[0] - rewards[1])))
            if not votes:
                return {"probability": float(probability)}
            votes_a = int(random.binomial(votes, probability))
            return {"votes_a": votes_a, "votes_b": votes - votes_a}

        for _ in range(rows):
            prompt = self._prompt(random)
            (a, b), rewards = self._pair(prompt, random)
            yield {"prompt": prompt, "completion_a": a, "completion_b": b, **self._judged(rewards, judge)}

    def rankings(
        self, rows: int, seed: int, size: int, *, only_best: bool = False
    ) -> Iterator[dict[str, object]]:
        """Draw sets of distinct completions, ordered by one expert: `prompt` and `completions`, best first.

        The expert orders them by Plackett-Luce: the first is a completion with probability in proportion to
        exp(reward), the next likewise among the rest. For two completions, this is Bradley-Terry. With
        dimensions, completions stay as drawn, and `order`, or `best`, has their places for each.

        Args:
            rows: how many sets.
            size: completions per set.
            only_best: give the expert's favourite alone; the others follow as they were drawn, and `best`
                is 0.
        """
        random = np.random.default_rng(seed)

        def places(rewards: np.ndarray) -> list[int]:
            # rewards with Gumbel noise, sorted, are in Plackett-Luce order
            found: list[int] = np.argsort(-(rewards + random.gumbel(size=size))).tolist()
            return found

        for _ in range(rows):
            prompt = self._prompt(random)
            completions, rewards = self._candidates(prompt, size, random)
            if self.dimensions:
                orders = {name: places(own) for name, own in zip(self.dimensions, rewards, strict=True)}
                label: dict[str, object] = {"order": orders}
                if only_best:
                    label = {"best": {name: order[0] for name, order in orders.items()}}
                yield {"prompt": prompt, "completions": completions, **label}
                continue
            order = places(rewards)
            if only_best:
                order = [order[0], *(place for place in range(size) if place != order[0])]
            row: dict[str, object] = {
                "prompt": prompt,
                "completions": [completions[place] for place in order],
            }
            yield {**row, "best": 0} if only_best else row

    def _judged(
        self, rewards: np.ndarray, judge: Callable[[np.ndarray], dict[str, object]]
    ) -> dict[str, object]:
        """What a judge says of a draw, or of each dimension of it: an object for each label."""
        if not self.dimensions:
            return judge(rewards)
        said = [judge(own) for own in rewards]
        return {
            label: {name: one[label] for name, one in zip(self.dimensions, said, strict=True)}
            for label in said[0]
        }

    def demonstrations(self, rows: int, seed: int) -> Iterator[dict[str, object]]:
        """Draw completions as writers write them, as SFT data: `prompt` and `completion`."""
        random = np.random.default_rng(seed)
        prompts = [*self.prompts, *self.further_prompts]
        for _ in range(rows):
            prompt = prompts[random.integers(len(prompts))]
            yield {"prompt": prompt, "completion": self.story(prompt, random)}

    def _prompt(self, random: np.random.Generator) -> str:
        return self.prompts[random.integers(len(self.prompts))]


class StoryWorld(World):
    """Prompts, one for each hero and trait, and their stories.

    Experts judge half of the traits. As elsewhere, there are more prompts than preferences: the reference has
    demonstrations of all, and the KL term samples the others, too.

    Args:
        dimensions: of `DIMENSIONS`.
    """

    def __init__(self, dimensions: Sequence[str] = ()) -> None:
        self.dimensions = dimensions
        self._subjects = {
            f"Write a very short story about a {trait} {hero}.\n": (trait, hero)
            for hero, trait in itertools.product(_HOME, _TASTE)
        }
        self._outcomes: dict[str, Outcomes] = {}
        self.prompts = [prompt for prompt, (trait, _) in self._subjects.items() if trait in _TABLES["taste"]]
        self.further_prompts = [prompt for prompt in self._subjects if prompt not in self.prompts]

    def outcomes(self, prompt: str) -> Outcomes:
        """Every story of `prompt` with its reward and the probability of being drawn.

        With dimensions, the reward is the sum of theirs.
        """
        if prompt not in self._outcomes:
            trait, hero = self._subjects[prompt]
            choices = list(itertools.product(*(range(len(slot)) for slot in _SLOTS)))
            completions = [_story(hero, choice) for choice in choices]
            rewards = np.array([_reward(trait, hero, choice) for choice in choices])
            weights = _HABIT[np.array(choices)].prod(axis=1) * np.exp(_LEANING * rewards)
            known = {"trait": rewards, "brevity": _BREVITY * (_USUAL - np.array(list(map(len, completions))))}
            dimensions = {name: known[name] for name in self.dimensions}
            self._outcomes[prompt] = Outcomes(
                completions=completions,
                rewards=np.sum([*dimensions.values()], axis=0) if dimensions else rewards,
                weights=weights / weights.sum(),
                dimensions=dimensions,
            )
        return self._outcomes[prompt]

    def story(self, prompt: str, random: np.random.Generator) -> str:
        outcomes = self.outcomes(prompt)
        return outcomes.completions[random.choice(len(outcomes.weights), p=outcomes.weights)]

    def _candidates(
        self, prompt: str, count: int, random: np.random.Generator
    ) -> tuple[list[str], np.ndarray]:
        weights = self.outcomes(prompt).weights
        return self._drawn(prompt, random.choice(len(weights), count, replace=False, p=weights).tolist())

    def _pair(self, prompt: str, random: np.random.Generator) -> tuple[list[str], np.ndarray]:
        weights = self.outcomes(prompt).weights
        a = b = random.choice(len(weights), p=weights)
        while a == b:
            b = random.choice(len(weights), p=weights)
        return self._drawn(prompt, [a, b])

    def _drawn(self, prompt: str, stories: list[int]) -> tuple[list[str], np.ndarray]:
        outcomes = self.outcomes(prompt)
        rewards = [outcomes.dimensions[name] for name in self.dimensions] or outcomes.rewards
        return [outcomes.completions[story] for story in stories], np.asarray(rewards)[..., stories]


def _story(hero: str, choice: tuple[int, ...]) -> str:
    when, went, found, ending = (slot[option] for slot, option in zip(_SLOTS, choice, strict=True))
    return f"{when}, the {hero} {went} and {found}. {ending}"


def _reward(trait: str, hero: str, choice: tuple[int, ...]) -> float:
    reward = sum(taste[option] for taste, option in zip(_TASTE[trait], choice, strict=True))
    reward += _HOME_BONUS * (choice[1] == _HOME[hero])
    at_night, in_secret = choice[0] in (1, 5), choice[3] == 3
    return reward + _SECRET_AT_NIGHT * (at_night and in_secret)
