"""Which prompt belongs to which split. Sees prompts only, never a completion."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping

from softpref.errors import DataError
from softpref.records.dataset import JUDGE_SPLIT, Text
from softpref.records.figures import LEAST_PROMPTS

SPLITS = ("train", "validation", "test")
WITH_JUDGE = (*SPLITS, JUDGE_SPLIT)


def prompt_key(prompt: Text) -> bytes:
    """A digest that is equal for prompts that differ only in case, white space or Unicode form."""
    if isinstance(prompt, str):
        text = _plain(prompt)
    else:
        text = "\n".join(f"{message['role']}\t{_plain(message['content'])}" for message in prompt)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def assign_splits(
    keys: Iterable[bytes],
    *,
    validation_fraction: float,
    test_fraction: float,
    judge_fraction: float = 0.0,
    seed: int,
) -> dict[bytes, str]:
    """Give every distinct prompt key one split, by the order of a seeded hash.

    The counts are the fractions of the distinct prompts, rounded, with at least one prompt for each fraction
    above zero. The order of `keys` does not matter. What is held out does not depend on `judge_fraction`.

    Args:
        judge_fraction: of the prompts that validation and test leave.

    Raises:
        DataError: there are too few prompts for every wanted split to have one.
    """
    salt = str(seed).encode()
    ordered = sorted(set(keys), key=lambda key: hashlib.blake2b(key, key=salt, digest_size=16).digest())
    test = max(1, int(test_fraction * len(ordered) + 0.5)) if test_fraction else 0
    validation = max(1, int(validation_fraction * len(ordered) + 0.5)) if validation_fraction else 0
    left = len(ordered) - test - validation
    judge = max(1, int(judge_fraction * left + 0.5)) if judge_fraction else 0
    if left - judge < 1:
        wanted = 1 + bool(test_fraction) + bool(validation_fraction) + bool(judge_fraction)
        raise DataError(
            f"{len(ordered)} distinct prompts cannot fill train{', validation' if validation else ''}"
            f"{', test' if test else ''}{', judge' if judge else ''} without sharing a prompt; at least "
            f"{wanted} are needed, or smaller "
            "fractions (0 leaves a split empty)"
        )
    names = ["test"] * test + ["validation"] * validation + [JUDGE_SPLIT] * judge
    return {key: names[rank] if rank < len(names) else "train" for rank, key in enumerate(ordered)}


def few_prompts(split_of: Mapping[bytes, str], known_reward: bool) -> list[str]:
    """A sentence for each held-out split with too few prompts for intervals, and what that will cost.

    Args:
        split_of: each prompt's split.
        known_reward: a judge need not be trusted then, which is what the validation split is for.
    """
    costs = {"test": "no model will be surely better than another, nor pass a gate that asks for a win rate"}
    if not known_reward:
        costs["validation"] = "no judge that learns will be trusted"
    counts = Counter(split_of.values())
    return [
        f"the split {split} has only {counts[split]} of {len(split_of)} prompts, and intervals take "
        f"{LEAST_PROMPTS}: {cost}; give more prompts, or raise {split}_fraction"
        for split, cost in costs.items()
        if 0 < counts[split] < LEAST_PROMPTS
    ]


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
