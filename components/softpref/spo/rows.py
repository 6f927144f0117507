"""Preference rows as training sees them: tokenized, checked, collated. Everything unusable is refused here.

Rows are `prompt` and `completions` (best first), as the data stage writes them, or `chosen` and `rejected`
with a `prompt` or with one that both begin with. Computes no loss.
"""

from __future__ import annotations

import logging
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice, repeat
from numbers import Real
from typing import TYPE_CHECKING, Any, Required, TypedDict, get_args

import torch
from torch.utils.data import Dataset

from softpref.errors import ConfigError, DataError
from softpref.lm.implicit import cut_common_messages, cut_common_prefix, is_transcript
from softpref.lm.kept_rows import KeptRows
from softpref.lm.packing import pack_sequences
from softpref.lm.tokenization import TokenizedSequence, log_findings, row_findings, stop_token_ids
from softpref.lm.tokenizing import Job, RowText, tokenize_rows
from softpref.objectives.preference import PreferenceKind
from softpref.progress import follow
from softpref.spo.config import SPOConfig
from softpref.spo.degree import DegreeText, Removed, add_removed, degree_tensors, drawn, sides_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


class Row(TypedDict, total=False):
    """A row as training takes it.

    Attributes:
        prompt: ids.
        completions: ids of each, best first.
        probability: P(first beats second).
        kind: what their order means.
        weight: how much the row counts beside the others; absent where all count alike.
        ref_logps: log-probability of each completion under the reference, nats, where known.
        win_probabilities: of each completion, its chance to beat another of the row, for `sppo`.
        offsets: of each completion, a reward that it has besides that of the labels, nats: the offset of the
            loss's margins.
        removed: its completions without some of their key content, for the degree loss.
        degree_texts: those of them that the present epoch gives.
    """

    prompt: Required[list[int]]
    completions: Required[list[list[int]]]
    probability: float
    kind: PreferenceKind
    weight: float
    ref_logps: list[float]
    win_probabilities: list[float]
    offsets: list[float]
    removed: Removed
    degree_texts: list[DegreeText]


class RowsWithTokens(Sequence[Mapping[str, Any]]):
    """Preference rows as `SPOTrainer` takes them, with their tokens, which are then not made anew."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], tokens: KeptRows) -> None:
        self.rows, self.tokens = rows, tokens

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows)


class TrainingRows(Dataset[Row], ABC):
    """Tokenized rows that take part; what cannot be trained on is refused here, before training.

    Two kinds of rows are left out and counted: those whose completions are identical as tokens, which teach
    nothing, and unless `cut_rows` is `keep` those with a completion cut at the length limit, which has no end
    token and teaches the policy not to stop.

    Args:
        given: rows as `SPOTrainer` takes them.
        tokenizer: the model's.
        args: see `SPOConfig`.
        stop_ids: see `softpref.lm.tokenization.stop_token_ids`.
        name: what messages call the rows.

    Attributes:
        rows: those that take part.
        numbers: their places in what was given.
        prompts: ids of every given prompt.
        counts: of rows `given`, of those `left_out`, of what `row_findings` names, and those `weighted`; with
            a degree loss `degree_skipped`, the completions that take no part in it.
        epoch: of training, from 0, which gives rows their degree levels; an evaluation's is always the first.

    Raises:
        DataError: names the row and its fault, or says why none takes part.
    """

    def __init__(
        self,
        given: Iterable[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        args: SPOConfig,
        *,
        stop_ids: Sequence[int] | None = None,
        name: str = "preference row",
    ) -> None:
        self._tokenizer, self._args = tokenizer, args
        given = rows_of(given, f"the {name}s")
        self._options: dict[str, Any] = {
            "stop_ids": stop_ids,
            "max_prompt_length": args.max_prompt_length,
            "max_completion_length": args.max_completion_length,
        }
        self.rows: list[Row] = []
        self.numbers: list[int] = []
        self.prompts: list[list[int]] = []
        self.counts: Counter[str] = Counter()
        unusable = {"identical", *(["cut_completion"] if args.cut_rows == "leave_out" else [])}
        for number, (row, sequences) in enumerate(self._tokenized(given, name)):
            try:
                made = self._made(row, sequences)
            except DataError as error:
                raise DataError(f"{name} {number}: {error}") from error
            found = row_findings(sequences)
            left_out = not unusable.isdisjoint(found)
            self.counts.update(["given", *found, *(["left_out"] if left_out else [])])
            self.prompts.append(made["prompt"])
            if not left_out:
                self.rows.append(made)
                self.numbers.append(number)
        if args.process_index == 0:
            log_findings(self.counts, f"{name}s", left_out=unusable)
        if not self.prompts:
            raise DataError(f"there is no {name}")
        if not self.rows:
            raise DataError(
                f"none of the {len(self.prompts)} {name}s can take part: {self.counts['identical']} have "
                f"completions that are identical as tokens, {self.counts['cut_completion']} one of more than "
                f"max_completion_length={args.max_completion_length} tokens; raise that, or set cut_rows to "
                "keep"
            )
        if _settle_weights(self.rows, name):
            self.counts["weighted"] = len(self.rows)
        self.epoch = 0
        if args.degree_weight:
            self._add_removed(given, name)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return with_levels(self.rows[index], self._args, self.epoch, index)

    def _tokenized(
        self, given: Collection[Mapping[str, Any]], name: str
    ) -> Iterator[tuple[Mapping[str, Any], list[TokenizedSequence]]]:
        """Rows and their sequences."""
        known, count = None, len(given)
        if isinstance(given, RowsWithTokens):
            known, count = given.tokens, given.tokens.longer_prompts(self._options["max_prompt_length"])

        def jobs() -> Iterator[tuple[Mapping[str, Any], Job]]:
            shown = follow(given, f"tokenizing {name}s", disable=_quiet(self._args))
            for row, tokens in zip(shown, repeat(None) if known is None else known):  # noqa: B905
                yield row, self._job(row, tokens)

        return tokenize_rows(jobs, self._tokenizer, self._args, name=name, count=count, **self._options)

    def _job(self, row: Mapping[str, Any], tokens: Sequence[TokenizedSequence] | None) -> Job:
        """The row's text, its known tokens within the limits, or why it has none."""
        try:
            text = self.text(row)
        except DataError as error:
            return error
        # a longer prompt may need its text: a chat loses whole turns
        if tokens is None or len(tokens[0].prompt) > self._options["max_prompt_length"]:
            return text
        limit = self._options["max_completion_length"]
        return [
            one._replace(completion=one.completion[:limit], truncated=True, reference_logp=None)
            if len(one.completion) > limit
            else one._replace(truncated=False)
            for one in tokens
        ]

    def _add_removed(self, given: Collection[Mapping[str, Any]], name: str) -> None:
        """What the degree loss needs of rows whose completions are known."""

    @abstractmethod
    def text(self, row: Mapping[str, Any]) -> RowText:
        """What of a row is tokenized."""

    @abstractmethod
    def _made(self, row: Mapping[str, Any], sequences: list[TokenizedSequence]) -> Row:
        """A row as training needs it."""


class PreferenceRows(TrainingRows):
    """Rows of completions, best first, with what their order means; with a degree loss also `removed`."""

    def text(self, row: Mapping[str, Any]) -> RowText:
        if self._alone(row):
            return RowText(cell(row, "prompt"), [row["completion"]])
        return RowText(*_columns(row))

    def _alone(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of `kto` holds one completion, with a label."""
        row = mapping_of(row)
        # a column of a table, in which others have completions, is null where a row has none
        return (
            self._args.method == "kto"
            and row.get("completion") is not None
            and row.get("completions") is None
        )

    def _made(self, row: Mapping[str, Any], sequences: list[TokenizedSequence]) -> Row:
        probability = _label(row) if self._alone(row) else _probability(row, len(sequences))
        kind = _kind(row, len(sequences), self._args)
        made: Row = {
            "prompt": sequences[0].prompt,
            "completions": [sequence.completion for sequence in sequences],
            "probability": probability,
            "kind": kind,
            "weight": _weight(row),
        }
        logps = [one.reference_logp for one in sequences if one.reference_logp is not None]
        if len(logps) == len(sequences):
            made["ref_logps"] = logps
        if self._args.method == "sppo":
            made["win_probabilities"] = _win_probabilities(kind, len(sequences), probability)
            if self._args.sppo_completions == "extremes":
                made = extremes(made)
        return made

    def _add_removed(self, given: Collection[Mapping[str, Any]], name: str) -> None:
        kept = frozenset(self.numbers)
        texts = (self.text(row) for number, row in enumerate(given) if number in kept)
        stops = self._options["stop_ids"] or stop_token_ids(self._tokenizer)
        skipped = add_removed(self.rows, texts, self._tokenizer, self._args, stop_ids=stops, name=name)
        self.counts["degree_skipped"] = skipped
        if skipped and self._args.process_index == 0:
            logger.warning(
                "%d of %d completions of the %ss have fewer than %d key phrases or were cut, and take no "
                "part in the degree loss.",
                skipped,
                len(self.rows) * len(sides_of(self._args)),
                name,
                self._args.degree_levels - 1,
            )


class AnswerRows(TrainingRows):
    """What rounds that draw their rows need: prompts, and for self-play the best completion of each."""

    def text(self, row: Mapping[str, Any]) -> RowText:
        answers = self._args.train_on == "self_play"
        if _implies_prompt(mapping_of(row)) or (answers and row.get("completion") is None):
            prompt, completions = _columns(row)
            return RowText(prompt, completions[:1] if answers else ())
        return RowText(cell(row, "prompt"), [row["completion"]] if answers else ())

    def _made(self, row: Mapping[str, Any], sequences: list[TokenizedSequence]) -> Row:
        [sequence] = sequences
        return {"prompt": sequence.prompt, "completions": [sequence.completion], "weight": _weight(row)}


def with_levels(row: Row, args: SPOConfig, epoch: int, number: int) -> Row:
    """A row as an epoch gives it: with its texts for the degree loss, where there is one."""
    if "removed" not in row:
        return row
    return {**row, "degree_texts": drawn(row, args, epoch, number)}


def _quiet(args: SPOConfig) -> bool:
    """Whether to show no progress: as asked, or because another process shows it."""
    return bool(args.disable_tqdm) or args.process_index > 0


def rows_of(given: Iterable[Mapping[str, Any]], name: str) -> Collection[Mapping[str, Any]]:
    """The rows, so that they can be counted and read twice; an iterable is read to its end.

    Args:
        name: what a message calls them.

    Raises:
        ConfigError: they are not rows, but several sets of them, or text.
    """
    if isinstance(given, Mapping):
        some, first = ", ".join(map(str, given)) or "nothing", next(iter(given), "train")
        remedy = f"hand over one of its sets, data[{first!r}]"
        if not any(isinstance(row, Mapping) for value in given.values() for row in islice(value, 1)):
            remedy = "datasets.Dataset.from_dict makes rows of a dict of columns"
        raise ConfigError(f"{name} must be rows, got a {type(given).__name__} of {some}; {remedy}")
    if isinstance(given, str):
        raise ConfigError(f"{name} must be rows, got the text {given!r}; datasets.load_dataset reads a file")
    if not hasattr(given, "__iter__") and not hasattr(given, "__getitem__"):
        raise ConfigError(f"{name} must be rows, got {type(given).__name__}")
    return given if isinstance(given, Sized) else list(given)  # type: ignore[return-value]


def mapping_of(row: Any) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(
            f"a row must be a mapping from column to value, got {row!r:.60}; of a table, "
            "datasets.Dataset.from_pandas makes such rows"
        )
    return row


def cell(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise DataError(f"needs {column}; has {', '.join(sorted(row))}")
    return row[column]


def _columns(row: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    if "completions" in mapping_of(row):
        if isinstance(row["completions"], str) or not isinstance(row["completions"], Sequence):
            raise DataError(f"completions must be a list, best first, got {row['completions']!r}")
        completions = list(row["completions"])
    elif "chosen" in row and "rejected" in row:
        completions = [row["chosen"], row["rejected"]]
        if _implies_prompt(row) and (found := _implicit_prompt(completions)):
            return found
    else:
        raise DataError(f"needs completions, or chosen and rejected; has {', '.join(sorted(row))}")
    if "prompt" not in row:
        raise DataError(
            f"needs prompt, or chosen and rejected that both begin with it; has {', '.join(sorted(row))}"
        )
    if len(completions) < 2:
        raise DataError(f"needs at least two completions, got {len(completions)}")
    return row["prompt"], completions


def _implies_prompt(row: Mapping[str, Any]) -> bool:
    """Whether the prompt is what chosen and rejected begin with.

    So it is where no column holds it, or a text that only repeats the conversations' question.
    """
    repeats = isinstance(row.get("prompt"), str) and not isinstance(row.get("chosen"), str)
    return "chosen" in row and "rejected" in row and ("prompt" not in row or repeats)


def _implicit_prompt(completions: list[Any]) -> tuple[Any, list[Any]] | None:
    """The prompt that texts or conversations begin with, as the data stage finds it, and what follows."""
    if all(isinstance(text, str) for text in completions):
        return cut_common_prefix(
            completions, "\n\nAssistant:" if all(map(is_transcript, completions)) else ""
        )
    try:
        return cut_common_messages(completions)
    except (TypeError, KeyError):  # neither texts nor messages, which tokenizing says
        return None


def _probability(row: Mapping[str, Any], count: int) -> float:
    probability = _number(row, "probability", 1.0, "in [0, 1]")
    if count > 2 and probability != 1:
        raise DataError(
            f"probability {row['probability']} belongs to a pair, but there are {count} completions; leave "
            "it null"
        )
    return probability


def _number(row: Mapping[str, Any], column: str, most: float, range_: str) -> float:
    """A number of at least 0 from a row; 1 where there is none."""
    value = row.get(column)
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= most:
        raise DataError(f"{column} must be a number {range_}, or null, got {value!r}")
    return float(value)


def _label(row: Mapping[str, Any]) -> float:
    """Whether a completion is desirable: 1 or 0."""
    label = cell(row, "label")
    if not isinstance(label, bool):
        raise DataError(f"label must be true of a desirable completion, or false, got {label!r}")
    return float(label)


def _weight(row: Mapping[str, Any]) -> float:
    """How much a row counts beside the others."""
    return _number(row, "weight", sys.float_info.max, "of at least 0")


def _settle_weights(rows: list[Row], name: str) -> bool:
    """Scale weights to a mean of 1, which keeps the balance with the KL term; equal ones are left out.

    Returns:
        Whether they differ.

    Raises:
        DataError: all are 0.
    """
    weights = [row.pop("weight") for row in rows]
    if max(weights) == 0:
        raise DataError(f"every {name} has weight 0; one at least must count")
    largest = max(weights)
    weights = [weight / largest for weight in weights]  # sums of large ones would leave float's range
    mean = sum(weights) / len(weights)
    differ = any(weight != weights[0] for weight in weights)
    for row, weight in zip(rows, weights, strict=True):
        if differ:
            row["weight"] = weight / mean
    return differ


def _kind(row: Mapping[str, Any], count: int, args: SPOConfig) -> PreferenceKind:
    """What the order of a row's completions means; a pair is a pair whatever it is called."""
    kind: PreferenceKind = row.get("kind") or "ranking"
    if kind not in get_args(PreferenceKind):
        raise DataError(f"kind must be one of {', '.join(get_args(PreferenceKind))}, got {kind!r}")
    if args.preference_kind != "auto":
        kind = args.preference_kind
    if count == 2:
        return "pairwise"
    if count == 1:
        return "ranking"
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


def extremes(row: Row) -> Row:
    """A row of `sppo` with its best and its worst completion alone, as its authors train.

    Their win probabilities are over all K completions of the row, and as the authors' over itself too, which
    it beats with ½: `(Σ_{j≠i} P(y_i beats y_j) + ½) / K`. Source: arXiv 2405.00675 and its authors' code.
    """
    made = row.copy()
    count = len(row["completions"])
    made["completions"] = [row["completions"][place] for place in (0, -1)]
    made["kind"] = "pairwise"
    wins = [row["win_probabilities"][place] for place in (0, -1)]
    made["win_probabilities"] = [((count - 1) * win + 0.5) / count for win in wins]
    if "ref_logps" in row:
        made["ref_logps"] = [row["ref_logps"][place] for place in (0, -1)]
    return made


def collate(rows: list[Row]) -> dict[str, Any]:
    """Rows to one flat batch of sequences, the completions of a row next to each other."""
    inputs: dict[str, Any] = {  # group sizes first: batches are counted by the first tensor
        "group_sizes": torch.tensor([len(row["completions"]) for row in rows]),
        "probabilities": torch.tensor([row["probability"] for row in rows]),
        "kinds": [row["kind"] for row in rows],
        **pack_sequences(
            [(row["prompt"], completion) for row in rows for completion in row["completions"]]
        )._asdict(),
    }
    if all("weight" in row for row in rows):
        inputs["row_weights"] = torch.tensor([row["weight"] for row in rows])
    # one for each completion, where rows have them
    for name in ("ref_logps", "win_probabilities", "offsets"):
        if all(name in row for row in rows):
            inputs[name] = torch.tensor([value for row in rows for value in row[name]])
    if all("degree_texts" in row for row in rows):
        inputs |= degree_tensors(rows)
    return inputs
