"""The sources that need no file, as rows, and what is known of their completions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from softpref.data import storyteller
from softpref.data.columns import Record
from softpref.data.config import STORY_ROWS, STORY_SFT_ROWS, DataConfig
from softpref.data.sources import SourceRow
from softpref.data.story_world import StoryWorld, World
from softpref.records.dataset import OUTCOMES_FILE, REWARD_FILE
from softpref.rewards import write_rewards


def embedded_preferences(config: DataConfig) -> Iterator[SourceRow]:
    """Stories of the world, judged by its experts."""
    world, rows = _world(config), config.rows or STORY_ROWS
    if config.story_kind == "pairwise":
        return _numbered(world.preferences(rows, config.seed, config.votes))
    only_best = config.story_kind == "best_of_n"
    return _numbered(world.rankings(rows, config.seed, config.group_size, only_best=only_best))


def embedded_demonstrations(config: DataConfig) -> Iterator[SourceRow]:
    """Stories as writers write them."""
    # a seed other than that of the preferences, so that the two do not draw the same stories
    return _numbered(_world(config).demonstrations(config.sft_rows or STORY_SFT_ROWS, config.seed + 1))


def embedded_prompts(config: DataConfig) -> list[SourceRow]:
    """Prompts of the world that its experts have not judged."""
    return [*_numbered({"prompt": prompt} for prompt in _world(config).further_prompts)]


def write_known_answers(config: DataConfig, folder: Path) -> None:
    """Write `outcomes.jsonl` of the story world, `reward.json` of the storyteller, and nothing of others."""
    if config.source == "story":
        world = StoryWorld([*config.dimensions])
        with (folder / OUTCOMES_FILE).open("w", encoding="utf-8") as file:
            for prompt in world.prompts:
                outcomes = world.outcomes(prompt)
                line: dict[str, object] = {
                    "prompt": prompt,
                    "completions": outcomes.completions,
                    "rewards": outcomes.rewards.tolist(),
                    "weights": outcomes.weights.tolist(),
                }
                if outcomes.dimensions:
                    line["dimensions"] = {name: own.tolist() for name, own in outcomes.dimensions.items()}
                file.write(json.dumps(line) + "\n")
    elif config.source == "storyteller":
        rewards = {name: storyteller.DIMENSIONS[name] for name in config.dimensions}
        write_rewards(folder / REWARD_FILE, rewards or {"": storyteller.REWARD})


def _world(config: DataConfig) -> World:
    world = StoryWorld if config.source == "story" else storyteller.Storyteller
    return world([*config.dimensions])


def _numbered(draws: Iterable[Record]) -> Iterator[SourceRow]:
    return (SourceRow(number, f"draw {number}", record) for number, record in enumerate(draws, start=1))
