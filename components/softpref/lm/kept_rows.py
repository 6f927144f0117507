"""The preference rows' tokens beside a reference model, for all trainings that start from it. Trains nothing.

They are kept without length limits, so that they do not depend on a training's settings. They depend on the
data, the tokenizer, the ids that end a completion and the code; these are recorded with them, and rows that
differ in any of them are not used. The reference's log-probabilities of the completions can be kept with
them; those depend on its weights and on the precision as well.

    rows/rows.json      what the rows were made from, and the hash of every file; written last
    rows/SPLIT/part-…   see `softpref.lm.row_files`
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import compress, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softpref.disk import DAMAGED, in_brief
from softpref.errors import DataError, SoftprefError
from softpref.lm import tokenization
from softpref.lm.arguments import StageArguments
from softpref.lm.loading import load_tokenizer
from softpref.lm.row_files import part_files, prompt_lengths, read_rows, write_rows
from softpref.lm.scoring import computing_precision
from softpref.lm.tokenization import TokenizedSequence, stop_token_ids
from softpref.lm.tokenizing import RowText, tokenize_here
from softpref.progress import follow
from softpref.records.dataset import read_dataset
from softpref.records.files import RESULT_FILE
from softpref.records.model import METADATA_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ROWS_FOLDER = "rows"
_DESCRIPTION = "rows.json"
_SPLITS = ("train", "validation")  # what trainings read
# a model's files that are not the tokenizer's
_NO_TOKENIZER = ("*.safetensors", "*.md", METADATA_FILE, RESULT_FILE, "tracking*", "timings*", ".*")
_SCORED_AT_ONCE = 4_096  # rows: enough for batches of equal lengths, few enough to hold
_DECIDE = ("transformers", "tokenizers", "jinja2")  # packages whose versions decide tokens, too


Scorer = Callable[[Sequence[tuple[Sequence[int], Sequence[int]]]], list[float]]
"""`(prompt ids, completion ids)` pairs to sequence log-probabilities, nats; NaN where there is none."""


@dataclass(frozen=True)
class KeptRows:
    """A split's rows in tokens, without length limits, in the order of the dataset's rows.

    Attributes:
        folder: where they are.
        scored: whether to read the reference's log-probabilities, too, where they are known.
        places: those of the rows to read, rising; None: all.
    """

    folder: Path
    scored: bool = False
    places: Sequence[int] | None = None

    def __iter__(self) -> Iterator[list[TokenizedSequence]]:
        chosen = None if self.places is None else frozenset(self.places)
        for place, row in enumerate(read_rows(self.folder)):
            if chosen is not None and place not in chosen:
                continue
            yield row if self.scored else [one._replace(reference_logp=None) for one in row]

    def longer_prompts(self, limit: int) -> int:
        """How many prompts are longer than that."""
        lengths = list(prompt_lengths(self.folder))
        places = range(len(lengths)) if self.places is None else self.places
        return sum(lengths[place] > limit for place in places)


def keep_rows(
    dataset_dir: str | Path,
    model_dir: str | Path,
    model: Any,
    args: StageArguments,
    score: Scorer | None = None,
) -> None:
    """Write a dataset folder's preference rows in tokens into the folder of a complete model.

    Where a row cannot be tokenized, nothing is kept: the trainings, which may not need it, report it.

    Args:
        model: that of the folder; its tokenizer is loaded as trainings will load it.
        args: of the stage; a completion beyond its length limits is not scored.
        score: gives the model's log-probabilities, if they are to be kept, too.
    """
    folder = Path(model_dir) / ROWS_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    try:
        preferences = read_dataset(dataset_dir)
        splits = [split for split in _SPLITS if len(preferences.get(split, ()))]
        tokenizer = load_tokenizer(str(model_dir), trust_remote_code=args.trust_remote_code)
        stop_ids = stop_token_ids(tokenizer, model)
        for split in splits:
            rows = _tokenized(preferences[split], split, tokenizer, stop_ids, args)
            write_rows(folder / split, _scored(rows, score, model, args) if score else rows)
        description = {
            **_identity(model_dir, tokenizer, stop_ids),
            "scored": _scoring(model_dir, computing_precision(args, model)) if score else None,
            "splits": {
                split: {"data": _data_hash(dataset_dir, split), "files": _hashes(folder / split)}
                for split in splits
            },
        }
        text = json.dumps(description, indent=2)
        (folder / _DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    except Exception as error:  # of any kind: the trained model is worth more
        logger.warning("each training will tokenize the rows, which cannot be kept: %s", error)
        shutil.rmtree(folder, ignore_errors=True)


def kept_rows(
    dataset_dir: str | Path,
    model_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    *,
    precision: str = "",
    quiet: bool = False,
) -> dict[str, KeptRows]:
    """The rows of a dataset's splits that are kept beside a model, if they are what tokenizing would give.

    Args:
        tokenizer: the model's.
        stop_ids: see `softpref.lm.tokenization.stop_token_ids`.
        precision: of log-probabilities that are wanted, too (`computing_precision`); empty: none are.
        quiet: whether to log nothing about what was found.

    Returns:
        Rows by split; none if anything differs.
    """
    folder = Path(model_dir) / ROWS_FOLDER
    if not folder.exists():
        level, text = logging.INFO, f"tokenizing the rows here: {model_dir} holds none"
        splits: list[str] = []
        scored = False
    else:
        splits, scoring, fault = _usable(folder, dataset_dir, _identity(model_dir, tokenizer, stop_ids))
        level = logging.WARNING if fault else logging.INFO
        text = f"tokenizing the rows here: {fault}" if fault else f"taking the rows' tokens from {folder}"
        scored = bool(precision and scoring) and scoring == _scoring(model_dir, precision)
        if scored:
            text += ", and the reference's log-probabilities"
        elif precision and scoring:
            kept = scoring.get("precision")
            other = "of other weights" if kept == precision else f"in {kept} and not {precision}"
            text += f"; its log-probabilities are {other}: they are computed here"
    if not quiet:
        logger.log(level, "%s", text)
    return {split: KeptRows(folder / split, scored) for split in splits}


def _usable(
    folder: Path, dataset_dir: str | Path, identity: Mapping[str, Any]
) -> tuple[list[str], dict[str, str], str]:
    """The splits in a folder of rows and what they were scored with, or nothing and the reason."""
    try:
        found = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        splits = {split: (made["data"], made["files"]) for split, made in found["splits"].items()}
        scoring = dict(found["scored"] or {})
    except DAMAGED as error:
        return [], {}, f"{folder / _DESCRIPTION} cannot be read ({in_brief(error)})"
    differing = [name for name in identity if found.get(name) != identity[name]]
    differing += [f"{split} rows" for split in splits if splits[split][0] != _data_hash(dataset_dir, split)]
    if differing:
        return [], {}, f"those in {folder} were made from other {', '.join(differing)}"
    damaged = [str(folder / split) for split in splits if splits[split][1] != _hashes(folder / split)]
    return ([], {}, f"{', '.join(damaged)} is damaged") if damaged else (list(splits), scoring, "")


def _tokenized(
    rows: Any, split: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], args: StageArguments
) -> Iterator[list[TokenizedSequence]]:
    for column in ("prompt", "completions"):
        if column not in rows.column_names:
            raise DataError(f"the {split} preferences have no column {column}")
    shown = follow(rows, f"tokenizing {split} preferences", disable=bool(args.disable_tqdm))
    jobs = ((number, RowText(row["prompt"], row["completions"])) for number, row in enumerate(shown))
    for number, found in tokenize_here(jobs, tokenizer, args, count=len(rows), stop_ids=stop_ids):
        if isinstance(found, SoftprefError):
            raise type(found)(f"{split} preference {number}: {found}")
        yield found


def _scored(
    rows: Iterator[list[TokenizedSequence]], score: Scorer, model: Any, args: StageArguments
) -> Iterator[list[TokenizedSequence]]:
    """The rows with log-probabilities, where lengths and ids suit `args` and the model.

    The others are left to the trainings, which may cut them shorter or refuse them.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    size = getattr(model.get_input_embeddings(), "num_embeddings", math.inf)

    def suits(one: TokenizedSequence) -> bool:
        lengths = len(one.prompt), len(one.completion)
        return (
            lengths[0] <= args.max_prompt_length
            and lengths[1] <= args.max_completion_length
            and sum(lengths) <= positions
            and max(max(one.prompt, default=0), max(one.completion, default=0)) < size
        )

    while part := list(islice(rows, _SCORED_AT_ONCE)):
        fits = [suits(one) for row in part for one in row]
        sequences = [(one.prompt, one.completion) for row in part for one in row]
        logps = iter(score(list(compress(sequences, fits))))
        known = iter([next(logps) if fit else math.nan for fit in fits])
        for row in part:
            yield [
                one._replace(reference_logp=None if math.isnan(logp) else logp)
                for one, logp in zip(row, islice(known, len(row)), strict=True)
            ]


def _scoring(model_dir: str | Path, precision: str) -> dict[str, str]:
    """What log-probabilities depend on besides tokens."""
    return {"weights": _digest(sorted(Path(model_dir).glob("*.safetensors"))), "precision": precision}


def _identity(
    model_dir: str | Path, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> dict[str, Any]:
    """What tokens depend on besides the data, by names for messages."""
    files = [
        file
        for file in sorted(Path(model_dir).iterdir())
        if file.is_file() and not any(file.match(pattern) for pattern in _NO_TOKENIZER)
    ]
    return {
        "tokenizer": {"class": type(tokenizer).__name__, "files": _digest(files)},
        "end tokens": sorted(stop_ids),
        "code": {
            "softpref": _digest([Path(str(tokenization.__file__))]),
            **{package: version(package) for package in _DECIDE},
        },
    }


def _data_hash(dataset_dir: str | Path, split: str) -> str:
    files = (Path(dataset_dir) / split).glob("data-*.arrow")  # other files there are caches
    return _digest(sorted(files))


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: _digest([file]) for file in part_files(folder)}


def _digest(files: Iterable[Path]) -> str:
    """SHA-256 of files' names and contents."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
