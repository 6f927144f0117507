"""Preference rows as training sees them: tokenized, checked, collated. Everything unusable is refused here.

Rows are `prompt` and `completions` (best first), as the data stage writes them, or `prompt`, `chosen` and
`rejected`. Computes no loss.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch.utils.data import Dataset

from softpref.errors import ConfigError, DataError
from softpref.lm.packing import pack_sequences
from softpref.lm.scoring import check_positions
from softpref.lm.tokenization import tokenize_prompt, tokenize_row, tokenize_sequence
from softpref.objectives.preference import PreferenceKind
from softpref.progress import follow
from softpref.spo.config import SPOConfig

logger = logging.getLogger(__name__)


class PreferenceRows(Dataset):
    """Tokenized preference rows; everything that cannot be trained on is refused here, before training.

    Raises:
        DataError: names the row and what is wrong with it.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], tokenizer: Any, args: SPOConfig) -> None:
        self.rows: list[dict[str, Any]] = []
        self.truncated = 0
        for number, row in enumerate(follow(rows, "tokenizing preferences", disable=_quiet(args))):
            try:
                prompt, completions = _columns(row)
                tokenized = tokenize_row(
                    tokenizer,
                    prompt,
                    completions,
                    max_prompt_length=args.max_prompt_length,
                    max_completion_length=args.max_completion_length,
                )
                probability = _probability(row, len(completions))
                kind = _kind(row, len(completions), args)
                wins = (
                    _win_probabilities(kind, len(completions), probability) if args.method == "sppo" else []
                )
            except DataError as error:
                raise DataError(f"preference row {number}: {error}") from error
            self.truncated += any(sequence.truncated for sequence in tokenized)
            self.rows.append(
                {
                    "prompt": tokenized[0].prompt,
                    "completions": [sequence.completion for sequence in tokenized],
                    "probability": probability,
                    "kind": kind,
                    **({"win_probabilities": wins} if wins else {}),
                }
            )
        if not self.rows:
            raise DataError("the preference data hold no row")
        if self.truncated:
            logger.warning(
                "%d of %d preference rows have a completion of more than max_completion_length=%d tokens; "
                "it was cut and carries no end token",
                self.truncated,
                len(self.rows),
                args.max_completion_length,
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def check_lengths(model: Any, rows: Sequence[Mapping[str, Any]], args: SPOConfig, sampled: bool) -> None:
    """Refuse rows that the model has no positions for, before a batch in the middle of a run fails.

    Args:
        rows: tokenized, with `prompt` and `completions`.
        sampled: whether completions are drawn for these prompts, up to the length limit.
    """
    lengths = [(len(row["prompt"]), max(map(len, row["completions"]))) for row in rows]
    if sampled:
        lengths.append((max(prompt for prompt, _ in lengths), args.max_completion_length))
    check_positions(model, *max(lengths, key=sum), "lower max_prompt_length or max_completion_length")


def answer_rows(rows: Iterable[Mapping[str, Any]], tokenizer: Any, args: SPOConfig) -> list[dict[str, Any]]:
    """What rounds that draw their rows need of each row: `prompt` and, for self-play, the best completion.

    Returns:
        Rows with `prompt` (ids) and `completions`: the answer alone, or none where samples answer.

    Raises:
        DataError: names the row and what is wrong with it.
    """
    limits = {
        "max_prompt_length": args.max_prompt_length,
        "max_completion_length": args.max_completion_length,
    }
    answered = []
    for number, row in enumerate(follow(rows, "tokenizing prompts", disable=_quiet(args))):
        try:
            if "prompt" not in row:
                raise DataError(f"needs prompt; has {', '.join(sorted(row))}")
            if args.train_on == "self_play":
                answer = row["completion"] if row.get("completion") is not None else _columns(row)[1][0]
                sequence = tokenize_sequence(tokenizer, row["prompt"], answer, **limits)
                answered.append({"prompt": sequence.prompt, "completions": [sequence.completion]})
            else:
                prompt = tokenize_prompt(tokenizer, row["prompt"], max_length=args.max_prompt_length)
                answered.append({"prompt": prompt, "completions": [[]]})
        except DataError as error:
            raise DataError(f"training row {number}: {error}") from error
    if not answered:
        raise DataError("the training data hold no row")
    return answered


def _quiet(args: SPOConfig) -> bool:
    """Whether nothing is said of progress: as asked, or because another process says it."""
    return bool(args.disable_tqdm) or args.process_index > 0


def _columns(row: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    if "completions" in row:
        if isinstance(row["completions"], str) or not isinstance(row["completions"], Sequence):
            raise DataError(f"completions must be a list, best first, got {row['completions']!r}")
        completions = list(row["completions"])
    elif "chosen" in row and "rejected" in row:
        completions = [row["chosen"], row["rejected"]]
    else:
        raise DataError(f"needs completions, or chosen and rejected; has {', '.join(sorted(row))}")
    if "prompt" not in row:
        raise DataError(f"needs prompt; has {', '.join(sorted(row))}")
    if len(completions) < 2:
        raise DataError(f"needs at least two completions, got {len(completions)}")
    return row["prompt"], completions


def _probability(row: Mapping[str, Any], count: int) -> float:
    probability = row.get("probability")
    if probability is None:
        return 1.0
    if (
        isinstance(probability, bool)
        or not isinstance(probability, (int, float))
        or not 0 <= probability <= 1
    ):
        raise DataError(f"probability must be a number in [0, 1], or null, got {probability!r}")
    if count > 2 and probability != 1:
        raise DataError(
            f"probability {probability} belongs to a pair, but there are {count} completions; leave it null"
        )
    return float(probability)


def _kind(row: Mapping[str, Any], count: int, args: SPOConfig) -> PreferenceKind:
    """What the order of a row's completions means; a pair is a pair whatever it is called."""
    kind: Any = row.get("kind") or "ranking"
    if kind not in get_args(PreferenceKind):
        raise DataError(f"kind must be one of {', '.join(get_args(PreferenceKind))}, got {kind!r}")
    if args.preference_kind != "auto":
        kind = args.preference_kind
    if count == 2:
        return "pairwise"
    if kind == "pairwise":
        raise DataError(
            f"{count} completions are no pair, but the row's kind, or preference_kind, is pairwise"
        )
    return kind


def _win_probabilities(kind: PreferenceKind, count: int, probability: float) -> list[float]:
    """Each completion's estimated chance to beat another of the row."""
    if count == 2:
        return [probability, 1 - probability]
    if kind == "best_of_n":
        raise DataError(
            "method sppo needs to know how often each completion wins, and a best-of-n row of "
            f"{count} completions tells only of its best; give pairs or rankings"
        )
    return [1 - place / (count - 1) for place in range(count)]


def tokenize_prompts(rows: Iterable[Mapping[str, Any]], tokenizer: Any, max_length: int) -> list[list[int]]:
    prompts = []
    for number, row in enumerate(rows):
        if "prompt" not in row:
            raise DataError(f"prompt row {number}: needs prompt; has {', '.join(sorted(row))}")
        try:
            prompts.append(tokenize_prompt(tokenizer, row["prompt"], max_length=max_length))
        except DataError as error:
            raise DataError(f"prompt row {number}: {error}") from error
    if not prompts:
        raise DataError("prompt_dataset holds no prompt; the KL term needs some to sample from")
    return prompts


def kl_prompts(
    args: SPOConfig,
    rows: Sequence[Mapping[str, Any]],
    prompt_dataset: Iterable[Mapping[str, Any]] | None,
    tokenizer: Any,
) -> list[list[int]]:
    """Prompts that the KL term's samples answer, as `SPOConfig.kl_prompts` says."""
    if prompt_dataset is None and args.kl_prompts in ("separate", "both"):
        raise ConfigError(
            f"kl_prompts is {args.kl_prompts}, but there is no separate prompt set: give SPOTrainer a "
            "prompt_dataset, or the data stage a prompts_source"
        )
    prompts = []
    if prompt_dataset is None or args.kl_prompts in ("preferences", "both"):
        prompts += [row["prompt"] for row in rows]
    if prompt_dataset is not None and args.kl_prompts != "preferences":
        prompts += tokenize_prompts(prompt_dataset, tokenizer, args.max_prompt_length)
    return prompts


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows to one flat batch of sequences, the completions of a row next to each other."""
    inputs: dict[str, Any] = {  # group sizes first: batches are counted by the first tensor
        "group_sizes": torch.tensor([len(row["completions"]) for row in rows]),
        "probabilities": torch.tensor([row["probability"] for row in rows]),
        "kinds": [row["kind"] for row in rows],
        **pack_sequences(
            [(row["prompt"], completion) for row in rows for completion in row["completions"]]
        )._asdict(),
    }
    for name in ("ref_logps", "win_probabilities"):  # one for each completion, where rows have them
        if all(name in row for row in rows):
            inputs[name] = torch.tensor([value for row in rows for value in row[name]])
    return inputs
