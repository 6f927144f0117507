"""The experts whose rewards the data were drawn from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from softpref.errors import DataError
from softpref.judges.outcomes import Outcomes
from softpref.judges.protocol import ScoringJudge, digest
from softpref.records.dataset import OUTCOMES_FILE
from softpref.rewards import TextReward


class ExpertJudge(ScoringJudge):
    """The expert whose rewards the data were drawn from: looks completions up among the known outcomes.

    A completion outside its prompt's set (see `outside`) scores 1 nat less than the worst within.

    Attributes:
        dimensions: by name, an expert for each dimension of preference, where there are several.
    """

    name = "expert"
    dimensions: Mapping[str, ScoringJudge]

    def __init__(self, outcomes: Mapping[str, Outcomes]) -> None:
        self._rewards = {
            prompt: dict(zip(map(str.strip, entry.completions), entry.rewards.tolist(), strict=True))
            for prompt, entry in outcomes.items()
        }
        self._lowest = {prompt: min(rewards.values()) - 1.0 for prompt, rewards in self._rewards.items()}
        self.description = (
            f"the experts' own rewards, known for every completion of {len(outcomes)} prompts; "
            "a completion outside its prompt's set scores 1 nat less than the worst within"
        )
        self.fingerprint = digest(self._rewards)
        names = dict.fromkeys(name for entry in outcomes.values() for name in entry.dimensions)
        self.dimensions = {
            name: ExpertJudge(
                {
                    prompt: Outcomes(entry.completions, entry.dimensions[name], entry.weights)
                    for prompt, entry in outcomes.items()
                }
            )
            for name in names
        }

    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """Rewards, `[n]`; of several dimensions their sum.

        Raises:
            DataError: a prompt that `outcomes.jsonl` does not hold.
        """
        rewards = self._known_rewards(prompts, completions)
        lowest = np.array([self._lowest[prompt] for prompt in prompts])
        return np.where(np.isnan(rewards), lowest, rewards)

    def outside(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """`[n]` of bool: which completions do not belong to their prompt's set."""
        outside: np.ndarray = np.isnan(self._known_rewards(prompts, completions))
        return outside

    def _known_rewards(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """`[n]`, NaN for completions outside the set."""
        for prompt in prompts:
            if prompt not in self._rewards:
                raise DataError(f"{OUTCOMES_FILE} has no prompt {prompt!r}; use the judge 'bradley-terry'")
        pairs = zip(prompts, completions, strict=True)
        return np.array([self._rewards[prompt].get(text.strip(), np.nan) for prompt, text in pairs])


class RewardJudge(ScoringJudge):
    """The expert whose reward can be read off any text, as the dataset's `reward.json` describes.

    Args:
        rewards: by dimension of preference, of which the score is the sum; one alone under an empty name.

    Attributes:
        dimensions: by name, an expert for each dimension, where there are several.
    """

    name = "expert"
    dimensions: Mapping[str, ScoringJudge]

    def __init__(self, rewards: Mapping[str, TextReward]) -> None:
        self._rewards = rewards
        words = {word for reward in rewards.values() for word in reward.warmth}
        named = [name for name in rewards if name]
        self.description = (
            f"the experts' own reward, known for every text: {len(words)} words, and ease of reading"
            + (f"; the sum of {' and '.join(named)}" if named else "")
        )
        described = {name: dataclasses.asdict(reward) for name, reward in rewards.items()}
        self.fingerprint = digest(described)
        self.dimensions = {name: RewardJudge({"": rewards[name]}) for name in named}

    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """Rewards, `[n]`."""
        return np.array(
            [sum(reward(completion) for reward in self._rewards.values()) for completion in completions]
        )
