"""The first pass over a source: every row accepted, refused or left out, and counted. Writes no dataset.

Accepted rows go to a spool file; in memory stay a few digests per row, so a source may be larger than memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from softpref.data.columns import Layout, check_present, paths_of, settle_layout
from softpref.data.config import DataConfig
from softpref.data.rows import (
    Candidate,
    Preference,
    pair_thumbs,
    rank_candidates,
    read_candidate,
    read_verdicts,
    read_weight,
    value_forms,
)
from softpref.data.rows import read_preference as read_row
from softpref.data.sources import SourceRow
from softpref.data.splits import prompt_key
from softpref.data.texts import LeftOut, Refused
from softpref.errors import DataError
from softpref.progress import follow

logger = logging.getLogger(__name__)

_PEEK = 100  # rows that tell which columns a source has


class Accepted(NamedTuple):
    """An accepted row as the spool holds it."""

    row: Preference
    source_row: int
    place: str
    weight: float | None = None


class RejectionLog:
    """Lists the rows that were not taken, in a JSON Lines file, and counts them by what they broke.

    Attributes:
        refused: unusable preference rows by rule.
        left_out: sound preference rows that the configuration asked to leave out, by rule.
        extras: the same, together, of the further sources `sft` and `prompts`.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self.refused: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.extras: dict[str, Counter[str]] = {"sft": Counter(), "prompts": Counter()}

    def add(self, source_row: int, place: str, reason: Refused, source: str = "preferences") -> None:
        kind, counts = (
            ("left out", self.left_out) if isinstance(reason, LeftOut) else ("refused", self.refused)
        )
        counts = counts if source == "preferences" else self.extras[source]
        counts[reason.rule] += 1
        entry = {
            "source_row": source_row,
            "reason": str(reason),
            "kind": kind,
            "place": place,
            "source": source,
        }
        self._file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        self._file.close()


class Intake:
    """Takes the preference rows of one source.

    Attributes:
        rows_read: records read.
        layout: which column played which role.
        conversational: whether prompts are messages; None before the first accepted row.
        duplicates: rows equal to an earlier one.
        prompt_ids: per accepted row, the index of its prompt in `prompt_keys`.
        set_ids: per accepted row, the index of its set of completions.
        contradictory: the sets of completions that rows order differently.
    """

    def __init__(self, config: DataConfig, spool: Path, rejections: RejectionLog) -> None:
        self._config = config
        self._spool = spool
        self._rejections = rejections
        self._keep_duplicates = config.duplicates == "keep" or (
            config.duplicates == "auto" and config.embedded
        )
        self._prompts: dict[bytes, int] = {}
        self._sets: dict[bytes, int] = {}
        self._winners: list[bytes] = []
        self._seen: dict[bytes, int] = {}
        self.rows_read = 0
        self.layout: Layout
        self.conversational: bool | None = None
        self.duplicates = 0
        self.prompt_ids = array("L")
        self.set_ids = array("L")
        self.contradictory: set[int] = set()

    @property
    def prompt_keys(self) -> list[bytes]:
        return list(self._prompts)

    def take(self, rows: Iterator[SourceRow], source: str) -> None:
        """Read `rows` to their end.

        Args:
            rows: the records.
            source: how to call the source in messages.

        Raises:
            ConfigError: the column mapping does not fit the source.
            DataError: the source holds no record that can be read.
        """
        config = self._config
        rows, known, common = peek_columns(itertools.islice(rows, config.max_source_rows), source)
        template = config.template_fields
        wanted = [(f"columns[{role!r}]", column) for role, column in config.columns.items() if column]
        check_present([*wanted, *(("prompt_template", field) for field in template)], known, source)
        self.layout = settle_layout(
            config.columns,
            common,
            template,
            scaled=config.score_scale is not None,
            implicit=config.implicit_prompt or bool(config.implicit_prompt_end),
        )
        first = list(itertools.islice(rows, _PEEK))
        rows = itertools.chain(first, rows)
        for role, fits in (("weight", self._has_weight), ("system", self._has_system)):
            if role in self.layout.columns and role not in config.columns:
                self._settle_found(role, fits, first)
        self.conversational = self._prevailing(first)
        forms = value_forms([row.record for row in first if row.record], self.layout, config)
        self.layout = self.layout._replace(
            notes=(*self.layout.notes, *(f"recognised as messages: {form}" for form in forms))
        )
        if config.embedded:  # whose columns are its own
            self.layout = self.layout._replace(unused=(), notes=())
        for note in self.layout.notes:
            logger.warning("%s: %s", source, note)
        if self.layout.unused:
            logger.warning("%s: columns without use: %s", source, ", ".join(self.layout.unused))
        with self._spool.open("w", encoding="utf-8") as spool:
            if self.layout.form == "single":
                self._take_candidates(rows, spool, source)
                return
            for source_row in follow(rows, f"reading {source}"):
                self.rows_read += 1
                try:
                    record = _record(source_row)
                    weight = read_weight(record, self.layout)
                    for row in self._read(record):
                        try:
                            if isinstance(row, LeftOut):
                                raise row
                            self._accept(row, source_row.number, source_row.place, spool, weight)
                        except Refused as reason:
                            self._rejections.add(source_row.number, source_row.place, reason)
                except Refused as reason:
                    self._rejections.add(source_row.number, source_row.place, reason)

    def _read(self, record: dict[str, Any]) -> Sequence[Preference | LeftOut]:
        if self.layout.label == ("verdicts",):
            return read_verdicts(record, self.layout, self._config)
        return [read_row(record, self.layout, self._config)]

    def _settle_found(
        self, role: str, fits: Callable[[dict[str, Any]], bool], rows: Sequence[SourceRow]
    ) -> None:
        """Leave a column that was found by its name alone, as one without use, where most rows do not fit."""
        fitting = 0
        for row in rows:
            with contextlib.suppress(Refused):
                fitting += fits(_record(row))
        if 2 * fitting < sum(row.record is not None for row in rows):
            columns = dict(self.layout.columns)
            self.layout = self.layout._replace(
                unused=(*self.layout.unused, columns.pop(role)),
                notes=tuple(note for note in self.layout.notes if role not in note),
                columns=columns,
            )

    def _has_weight(self, record: dict[str, Any]) -> bool:
        return read_weight(record, self.layout) is not None

    def _has_system(self, record: dict[str, Any]) -> bool:
        """Whether there is a text: one word alone names a system rather than instructing one."""
        value = record.get(self.layout.columns["system"])
        return value is None or (isinstance(value, str) and (not value.strip() or len(value.split()) > 1))

    def _prevailing(self, rows: Iterable[SourceRow]) -> bool | None:
        """Whether most of the rows are conversations: not the first alone decides for all others."""
        kinds: Counter[bool] = Counter()
        if self.layout.form != "single":
            for row in rows:
                with contextlib.suppress(Refused):
                    for preference in self._read(_record(row)):
                        if isinstance(preference, Preference):
                            kinds[isinstance(preference.prompt, list)] += 1
        return kinds.most_common(1)[0][0] if kinds else None

    def accepted(self) -> Iterator[Accepted]:
        """The accepted rows again, in order of the source."""
        with self._spool.open(encoding="utf-8") as spool:
            for line in spool:
                *row, number, place, weight = json.loads(line)
                yield Accepted(Preference(*row), number, place, weight)

    def _accept(
        self, row: Preference, number: int, place: str, spool: Any, weight: float | None = None
    ) -> None:
        conversational = isinstance(row.prompt, list)
        if self.conversational is None:
            self.conversational = conversational
        if conversational is not self.conversational:
            kinds = ("plain text", "conversations")
            raise Refused(
                "plain text and conversations are mixed",
                f"this row holds {kinds[conversational]}, the others {kinds[not conversational]}",
            )
        key = prompt_key(row.prompt)
        parts = [_digest(completion) for completion in row.completions]
        even = row.probability == 0.5
        identity = _digest([key.hex(), row.kind, row.probability, *(sorted(parts) if even else parts)])
        if (earlier := self._seen.setdefault(identity, number)) != number:
            self.duplicates += 1
            if not self._keep_duplicates:
                raise LeftOut("duplicate", f"of row {earlier}")
        set_id = self._sets.setdefault(_digest([key.hex(), *sorted(parts)]), len(self._sets))
        if set_id == len(self._winners):
            self._winners.append(b"" if even else parts[0])
        elif not even:
            if self._winners[set_id] not in (b"", parts[0]):
                self.contradictory.add(set_id)
            self._winners[set_id] = parts[0]
        self.prompt_ids.append(self._prompts.setdefault(key, len(self._prompts)))
        self.set_ids.append(set_id)
        spool.write(json.dumps([*row, number, place, weight], ensure_ascii=False) + "\n")

    def _take_candidates(self, rows: Iterable[SourceRow], spool: Any, source: str) -> None:
        """Group one-candidate rows by prompt. The texts wait on disk; in memory is where each one lies."""
        groups: dict[bytes, list[int]] = {}
        seen: dict[bytes, int] = {}
        waiting_path = self._spool.with_suffix(".candidates")
        with waiting_path.open("w+b") as waiting:
            for source_row in follow(rows, f"reading {source}"):
                self.rows_read += 1
                try:
                    candidate = read_candidate(_record(source_row), self.layout, self._config)
                    key = prompt_key(candidate.prompt)
                    identity = _digest([key.hex(), candidate.completion])
                    if (earlier := seen.setdefault(identity, source_row.number)) != source_row.number:
                        self.duplicates += 1
                        raise LeftOut("duplicate", f"of row {earlier}")
                    groups.setdefault(key, []).append(waiting.tell())
                    line = json.dumps([*candidate, source_row.number, source_row.place], ensure_ascii=False)
                    waiting.write(line.encode() + b"\n")
                except Refused as reason:
                    self._rejections.add(source_row.number, source_row.place, reason)
            for key, offsets in groups.items():
                for chunk in self._chunks(key, offsets):
                    candidates, places = [], []
                    for offset in chunk:
                        waiting.seek(offset)
                        *candidate_fields, number, place = json.loads(waiting.readline())
                        candidates.append(Candidate(*candidate_fields))
                        places.append((number, place))
                    try:
                        if self.layout.label == ("label",):
                            made = pair_thumbs(candidates, self._config)
                        else:
                            made = [rank_candidates(candidates, self._config)]
                        for row in made:
                            self._accept(row, *min(places), spool)
                    except Refused as reason:
                        for number, place in places:
                            self._rejections.add(number, place, reason)
        waiting_path.unlink()

    def _chunks(self, key: bytes, offsets: list[int]) -> Iterator[list[int]]:
        """Deal a prompt's candidates into groups of nearly equal size, by the order of a seeded hash."""
        salt = str(self._config.seed).encode()
        if self.layout.label == ("label",):
            yield offsets
            return
        order = sorted(
            offsets, key=lambda offset: hashlib.blake2b(key + str(offset).encode(), key=salt).digest()
        )
        count = -(-len(order) // self._config.group_size)
        for index in range(count):
            yield sorted(order[index::count])


def peek_columns(rows: Iterator[SourceRow], source: str) -> tuple[Iterator[SourceRow], list[str], list[str]]:
    """The stream unharmed, the columns that its first hundred rows have, and those that half of them have.

    A column of a few odd rows must not decide how the others are read.

    Raises:
        DataError: there is no row, or none of the first can be read.
    """
    first = list(itertools.islice(rows, _PEEK))
    known: Counter[str] = Counter()
    for row in first:
        known.update(dict.fromkeys(paths_of(row.record or {}), 1))
    if not first:
        raise DataError(f"{source} holds no rows")
    if not known:
        raise DataError(
            f"none of the first {len(first)} rows of {source} can be read; the first: {first[0].fault}"
        )
    readable = sum(row.record is not None for row in first)
    common = [column for column, count in known.items() if 2 * count >= readable]
    return itertools.chain(first, rows), list(known), common


def check_rejections(intake: Intake, rejections: RejectionLog, config: DataConfig, listing: Path) -> None:
    """Refuse a source that gave no row, or lost too many.

    Raises:
        DataError: with the most frequent reasons, and where all refused rows are listed.
    """
    lost = sum(rejections.refused.values())
    taken = len(intake.prompt_ids)
    if taken and lost <= config.max_rejected_fraction * intake.rows_read:
        return
    reasons = rejections.refused if lost else rejections.left_out
    top = "; ".join(f"{rule} ({count})" for rule, count in reasons.most_common(5))
    if not taken:
        verdict = f"none of the {intake.rows_read} rows of {config.source} can be used"
    else:
        verdict = (
            f"{lost} of the {intake.rows_read} rows of {config.source} were refused, more than "
            f"max_rejected_fraction = {config.max_rejected_fraction} allows"
        )
    raise DataError(f"{verdict}: {top}. Every such row is listed in {listing}")


def _record(source_row: SourceRow) -> dict[str, Any]:
    if source_row.record is None:
        raise Refused("row cannot be read", source_row.fault)
    return source_row.record


def _digest(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, default=bytes.hex)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
