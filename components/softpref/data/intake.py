"""The first pass over sources: every row accepted, refused or left out, and counted. Writes no dataset.

Accepted rows go to a spool file; in memory stay a few digests per row, so sources may be larger than memory.
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

from softpref.data.columns import check_present, paths_of, settle_layout
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
from softpref.errors import ConfigError, DataError
from softpref.progress import follow

logger = logging.getLogger(__name__)

_PEEK = 100  # rows that tell which columns a source has
_BITS = 40  # of a row's number, in a number that stands for source and row


class Accepted(NamedTuple):
    """An accepted row as the spool holds it; `source` is the index of where it comes from."""

    row: Preference
    source_row: int
    place: str
    weight: float | None = None
    source: int = 0


class Taken(NamedTuple):
    """What came of one source: rows read, accepted, refused and left out (by rule)."""

    rows_read: int
    accepted: int
    refused: Counter[str]
    left_out: Counter[str]


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

    def add(
        self, source_row: int, place: str, reason: Refused, source: str = "preferences", origin: str = ""
    ) -> None:
        """List a row.

        Args:
            source: `preferences`, `sft` or `prompts`.
            origin: which of several sources of preferences it comes from.
        """
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
            **({"from": origin} if origin else {}),
        }
        self._file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        self._file.close()


class Source:
    """A source of preferences whose first rows have told which column plays which role.

    Attributes:
        name: how messages and records call it.
        config: how it is read.
        layout: the roles of its columns.
        conversational: whether most of its first rows are conversations; None where they do not tell.
        rows: all of its records.
    """

    def __init__(self, rows: Iterator[SourceRow], config: DataConfig, name: str) -> None:
        """Read the first rows.

        Raises:
            ConfigError: the column mapping does not fit the source.
            DataError: the source holds no record that can be read.
        """
        rows, known, common = peek_columns(itertools.islice(rows, config.max_source_rows), name)
        template = config.template_fields
        wanted = [(f"columns[{role!r}]", column) for role, column in config.columns.items() if column]
        check_present([*wanted, *(("prompt_template", field) for field in template)], known, name)
        self.name = name
        self.config = config
        with _naming(name):
            self.layout = settle_layout(
                config.columns,
                common,
                template,
                scaled=config.score_scale is not None,
                implicit=config.implicit_prompt or bool(config.implicit_prompt_end),
            )
            first = list(itertools.islice(rows, _PEEK))
            self.rows = itertools.chain(first, rows)
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
            logger.warning("%s: %s", name, note)
        if self.layout.unused:
            logger.warning("%s: columns without use: %s", name, ", ".join(self.layout.unused))

    def read(self, record: dict[str, Any]) -> Sequence[Preference | LeftOut]:
        """The preferences of a record that is not one of several candidates."""
        if self.layout.label == ("verdicts",):
            return read_verdicts(record, self.layout, self.config)
        return [read_row(record, self.layout, self.config)]

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
        for row in rows:
            with contextlib.suppress(Refused):
                record = _record(row)
                if self.layout.form == "single":
                    kinds[isinstance(read_candidate(record, self.layout, self.config).prompt, list)] += 1
                    continue
                for preference in self.read(record):
                    if isinstance(preference, Preference):
                        kinds[isinstance(preference.prompt, list)] += 1
        return kinds.most_common(1)[0][0] if kinds else None


class Intake:
    """Takes the preference rows of one source, or of several one after another.

    Args:
        config: what concerns the whole dataset.
        spool: a file for accepted rows.
        rejections: lists the others.
        names: of several sources, in the order in which they will be taken.

    Attributes:
        conversational: whether prompts are messages; None before the first accepted row.
        duplicates: rows equal to an earlier one.
        prompt_ids: per accepted row, the index of its prompt in `prompt_keys`.
        set_ids: per accepted row, the index of its set of completions.
        sources: per accepted row, the index of its source.
        contradictory: the sets of completions that rows order differently.
    """

    def __init__(
        self, config: DataConfig, spool: Path, rejections: RejectionLog, names: Sequence[str] = ()
    ) -> None:
        self._spool = spool
        self._rejections = rejections
        self._names = names
        self._keep_duplicates = config.duplicates == "keep" or (
            config.duplicates == "auto" and config.embedded
        )
        self._prompts: dict[bytes, int] = {}
        self._sets: dict[bytes, int] = {}
        self._winners: list[bytes] = []
        self._seen: dict[bytes, int] = {}
        self._source: Source
        self._index = -1
        self.conversational: bool | None = None
        self.duplicates = 0
        self.prompt_ids = array("L")
        self.set_ids = array("L")
        self.sources = array("H")
        self.contradictory: set[int] = set()

    @property
    def prompt_keys(self) -> list[bytes]:
        return list(self._prompts)

    def take(self, source: Source) -> Taken:
        """Read a source to its end."""
        self._source = source
        self._index += 1
        if self.conversational is None:
            self.conversational = source.conversational
        before = len(self.set_ids), Counter(self._rejections.refused), Counter(self._rejections.left_out)
        with self._spool.open("a", encoding="utf-8") as spool, _naming(source.name):
            read = (self._take_candidates if source.layout.form == "single" else self._take_rows)(spool)
        return Taken(
            read,
            len(self.set_ids) - before[0],
            self._rejections.refused - before[1],
            self._rejections.left_out - before[2],
        )

    def _take_rows(self, spool: Any) -> int:
        read, source = 0, self._source
        for source_row in follow(source.rows, f"reading {source.name}"):
            read += 1
            try:
                record = _record(source_row)
                weight = read_weight(record, source.layout)
                for row in source.read(record):
                    try:
                        if isinstance(row, LeftOut):
                            raise row
                        self._accept(row, source_row.number, source_row.place, spool, weight)
                    except Refused as reason:
                        self._refuse(source_row.number, source_row.place, reason)
            except Refused as reason:
                self._refuse(source_row.number, source_row.place, reason)
        return read

    def _refuse(self, number: int, place: str, reason: Refused) -> None:
        self._rejections.add(number, place, reason, origin=self._names[self._index] if self._names else "")

    def accepted(self) -> Iterator[Accepted]:
        """The accepted rows again, in order of the sources."""
        with self._spool.open(encoding="utf-8") as spool:
            for line, source in zip(spool, self.sources, strict=True):
                *row, number, place, weight = json.loads(line)
                yield Accepted(Preference(*row), number, place, weight, source)

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
        here = self._index << _BITS | number
        if (earlier := self._seen.setdefault(identity, here)) != here:
            self.duplicates += 1
            if not self._keep_duplicates:
                other = f" of {self._names[earlier >> _BITS]}" if self._names else ""
                raise LeftOut("duplicate", f"of row {earlier & (1 << _BITS) - 1}{other}")
        set_id = self._sets.setdefault(_digest([key.hex(), *sorted(parts)]), len(self._sets))
        if set_id == len(self._winners):
            self._winners.append(b"" if even else parts[0])
        elif not even:
            if self._winners[set_id] not in (b"", parts[0]):
                self.contradictory.add(set_id)
            self._winners[set_id] = parts[0]
        self.prompt_ids.append(self._prompts.setdefault(key, len(self._prompts)))
        self.set_ids.append(set_id)
        self.sources.append(self._index)
        spool.write(json.dumps([*row, number, place, weight], ensure_ascii=False) + "\n")

    def _take_candidates(self, spool: Any) -> int:
        """Group one-candidate rows by prompt. The texts wait on disk; in memory is where each one lies."""
        read, layout, config = 0, self._source.layout, self._source.config
        groups: dict[bytes, list[int]] = {}
        seen: dict[bytes, int] = {}
        waiting_path = self._spool.with_suffix(".candidates")
        with waiting_path.open("w+b") as waiting:
            for source_row in follow(self._source.rows, f"reading {self._source.name}"):
                read += 1
                try:
                    candidate = read_candidate(_record(source_row), layout, config)
                    key = prompt_key(candidate.prompt)
                    identity = _digest([key.hex(), candidate.completion])
                    if (earlier := seen.setdefault(identity, source_row.number)) != source_row.number:
                        self.duplicates += 1
                        raise LeftOut("duplicate", f"of row {earlier}")
                    groups.setdefault(key, []).append(waiting.tell())
                    line = json.dumps([*candidate, source_row.number, source_row.place], ensure_ascii=False)
                    waiting.write(line.encode() + b"\n")
                except Refused as reason:
                    self._refuse(source_row.number, source_row.place, reason)
            for key, offsets in groups.items():
                for chunk in self._chunks(key, offsets):
                    candidates, places = [], []
                    for offset in chunk:
                        waiting.seek(offset)
                        *candidate_fields, number, place = json.loads(waiting.readline())
                        candidates.append(Candidate(*candidate_fields))
                        places.append((number, place))
                    try:
                        if layout.label == ("label",):
                            made = pair_thumbs(candidates)
                        else:
                            made = [rank_candidates(candidates, config)]
                        for row in made:
                            self._accept(row, *min(places), spool)
                    except Refused as reason:
                        for number, place in places:
                            self._refuse(number, place, reason)
        waiting_path.unlink()
        return read

    def _chunks(self, key: bytes, offsets: list[int]) -> Iterator[list[int]]:
        """Deal a prompt's candidates into groups of nearly equal size, by the order of a seeded hash."""
        config = self._source.config
        salt = str(config.seed).encode()
        if self._source.layout.label == ("label",):
            yield offsets
            return
        order = sorted(
            offsets, key=lambda offset: hashlib.blake2b(key + str(offset).encode(), key=salt).digest()
        )
        count = -(-len(order) // config.group_size)
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


def check_rejections(taken: Taken, name: str, config: DataConfig, listing: Path) -> None:
    """Refuse a source that gave no row, or lost too many.

    Raises:
        DataError: with the most frequent reasons, and where all refused rows are listed.
    """
    lost = sum(taken.refused.values())
    if taken.accepted and lost <= config.max_rejected_fraction * taken.rows_read:
        return
    reasons = taken.refused if lost else taken.left_out
    top = "; ".join(f"{rule} ({count})" for rule, count in reasons.most_common(5))
    if not taken.accepted:
        verdict = f"none of the {taken.rows_read} rows of {name} can be used"
    else:
        verdict = (
            f"{lost} of the {taken.rows_read} rows of {name} were refused, more than "
            f"max_rejected_fraction = {config.max_rejected_fraction} allows"
        )
    raise DataError(f"{verdict}: {top}. Every such row is listed in {listing}")


def check_alike(sources: Iterable[Source]) -> None:
    """Refuse sources of which some hold plain text and others conversations.

    Raises:
        ConfigError: names one of each, and the remedy.
    """
    names = {source.conversational: source.name for source in sources}
    if {True, False} <= set(names):
        raise ConfigError(
            f"{names[False]} holds plain text and {names[True]} conversations, and a dataset holds one of "
            "both: as_messages=true makes conversations of plain text too, or leave one of the two out"
        )


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Within it errors of how a source is read name the source."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _record(source_row: SourceRow) -> dict[str, Any]:
    if source_row.record is None:
        raise Refused("row cannot be read", source_row.fault)
    return source_row.record


def _digest(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, default=bytes.hex)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
