"""The first pass over sources: every row is accepted, refused or left out, and counted. Writes no dataset.

Accepted rows go to a spool file and only a few digests per row stay in memory, so sources may be larger.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from softpref.data.columns import (
    Layout,
    Record,
    check_present,
    check_roles,
    paths_of,
    settle_dimensions,
    settle_layout,
    value_at,
)
from softpref.data.config import FURTHER, DataConfig
from softpref.data.rows import (
    Candidate,
    Preference,
    has_label,
    pair_thumbs,
    rank_candidates,
    read_candidate,
    read_dimension,
    read_preference,
    read_verdicts,
    read_weight,
    value_forms,
)
from softpref.data.sources import SourceRow
from softpref.data.splits import prompt_key
from softpref.data.texts import LeftOut, Refused, may_instruct
from softpref.errors import ConfigError, DataError
from softpref.progress import follow

logger = logging.getLogger(__name__)

_PEEK = 100  # rows that show which columns a source has
Read = TypeVar("Read", Preference, Candidate)
_BITS = 40  # for a row's number, in an integer that holds source and row


class Accepted(NamedTuple):
    """An accepted row as the spool holds it; `source` is the index of where it comes from."""

    row: Preference
    source_row: int
    place: str
    weight: float | None = None
    source: int = 0


class Taken(NamedTuple):
    """What became of one source: rows read, accepted, refused and left out (by rule)."""

    rows_read: int
    accepted: int
    refused: Counter[str]
    left_out: Counter[str]


class RejectionLog:
    """Lists the rows that were not taken, in a JSON Lines file, and counts them by what they broke.

    Attributes:
        refused: unusable preference rows by rule.
        left_out: usable preference rows that the configuration asked to leave out, by rule.
        extras: both together, of the further sources, by the name of the folder.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self.refused, self.left_out = Counter[str](), Counter[str]()
        self.extras = {name: Counter[str]() for name in FURTHER}

    def add(
        self, source_row: int, place: str, reason: Refused, source: str = "preferences", origin: str = ""
    ) -> None:
        """List a row.

        Args:
            source: `preferences`, or a further source by the name of its folder.
            origin: which of several sources of preferences it comes from.
        """
        left_out = isinstance(reason, LeftOut)
        counts = self.extras.get(source, self.left_out if left_out else self.refused)
        counts[reason.rule] += 1
        entry = {
            "source_row": source_row,
            "reason": str(reason),
            "kind": "left out" if left_out else "refused",
            "place": place,
            "source": source,
        }
        self._file.write(json.dumps({**entry, "from": origin} if origin else entry) + "\n")

    def close(self) -> None:
        self._file.close()


class Source:
    """A source of preferences whose first rows have shown which column plays which role.

    Attributes:
        name: what messages and records call it.
        config: how it is read.
        layouts: the roles of its columns, by dimension; under an empty name where rows have none, or name it.
        conversational: whether most of its first rows are conversations; None if none of them is usable.
        rows: all of its records.
    """

    def __init__(self, rows: Iterator[SourceRow], config: DataConfig, name: str) -> None:
        """Read the first rows.

        Raises:
            ConfigError: the column mapping does not fit the source.
            DataError: the source holds no record that can be read.
        """
        first, self.rows, known, common = peek(itertools.islice(rows, config.max_source_rows), name)
        self.name, self.config = name, config
        template = config.template_fields
        given = {
            role: column
            for roles in [*config.dimensions.values()] or [{}]
            if config.columns
            for role, column in check_roles({**config.columns, **roles}, bool(template)).columns.items()
        }
        wanted = [(f"columns[{role!r}]", column) for role, column in given.items()]
        check_present([*wanted, *(("prompt_template", field) for field in template)], known, name)

        def settle(columns: Mapping[str, object]) -> Layout:
            return settle_layout(
                columns,
                common,
                template,
                scaled=config.score_scale is not None,
                implicit=config.implicit_prompt or bool(config.implicit_prompt_end),
            )

        with _naming(name):
            self.layouts = settle_dimensions(config.dimensions, config.columns, known, settle)
            for role, fits in (
                ("weight", self._has_weight),
                ("system", self._has_system),
                ("dimension", self._has_dimension),
            ):
                if role in self.layout.columns and role not in config.columns:
                    self._settle_found(role, fits, first)
            self.conversational = self._prevailing(first)
        forms = value_forms([row.record for row in first if row.record], self.layout, config)
        notes = [*self.layout.notes, *(f"recognised as messages: {form}" for form in forms)]
        unused = self.layout.unused
        if config.embedded:  # whose columns are its own
            unused, notes = (), []
        self._update(unused=unused, notes=tuple(notes))
        for note in notes:
            logger.warning("%s: %s", name, note)
        if unused:
            logger.warning("%s: columns without use: %s", name, ", ".join(unused))

    @property
    def layout(self) -> Layout:
        """What the layouts of all dimensions share: all but the labels."""
        return next(iter(self.layouts.values()))

    @property
    def has_dimensions(self) -> bool:
        """Whether rows are of a dimension."""
        return self.layouts.keys() != {""} or "dimension" in self.layout.columns

    def read(self, record: Record) -> Sequence[Preference | Refused]:
        """The preferences of a record that is not one of several candidates, or why it has none.

        Raises:
            Refused: the record, whatever its dimension.
        """
        return self._each(record, self._read)

    def read_candidates(self, record: Record) -> Sequence[Candidate | Refused]:
        """The same of a record that is one of several candidates."""
        return self._each(record, lambda record, layout: [read_candidate(record, layout, self.config)])

    def _read(self, record: Record, layout: Layout) -> Sequence[Preference | Refused]:
        if layout.label == ("verdicts",):
            return read_verdicts(record, layout, self.config)
        return [read_preference(record, layout, self.config)]

    def _each(
        self, record: Record, read: Callable[[Record, Layout], Sequence[Read | Refused]]
    ) -> list[Read | Refused]:
        """What every dimension makes of a record."""
        found: list[Read | Refused] = []
        if self.layouts.keys() == {""}:
            found += read(record, self.layout)
            return found
        for name, layout in self.layouts.items():
            try:
                if layout.label and not has_label(record, layout):
                    raise LeftOut("dimension without a label", name)
                found += [
                    one if isinstance(one, Refused) else one._replace(dimension=name)
                    for one in read(record, layout)
                ]
            except LeftOut as reason:
                found.append(reason)
            except Refused as reason:
                found.append(reason.of(f"dimension {name}"))
        return found

    def _update(self, **values: Any) -> None:
        self.layouts = {name: layout._replace(**values) for name, layout in self.layouts.items()}

    def _settle_found(self, role: str, fits: Callable[[Record], bool], rows: Sequence[SourceRow]) -> None:
        """Leave a column that was found by its name alone unused, where most rows do not fit its role."""
        fitting = 0
        for row in rows:
            with contextlib.suppress(Refused):
                fitting += fits(row.readable)
        if 2 * fitting < sum(row.record is not None for row in rows):
            unused = (*self.layout.unused, str(self.layout.columns[role]))
            self._update(unused=unused, notes=tuple(note for note in self.layout.notes if role not in note))
            for layout in self.layouts.values():
                del layout.columns[role]

    def _has_weight(self, record: Record) -> bool:
        return read_weight(record, self.layout) is not None

    def _has_dimension(self, record: Record) -> bool:
        return isinstance(read_dimension(record, self.layout), str)

    def _has_system(self, record: Record) -> bool:
        return may_instruct(value_at(record, self.layout.columns["system"]))

    def _prevailing(self, rows: Iterable[SourceRow]) -> bool | None:
        """Whether most of the rows are conversations: the first must not decide for all others."""
        kinds: Counter[bool] = Counter()
        for row in rows:
            with contextlib.suppress(Refused):
                single = self.layout.form == "single"
                read = (self.read_candidates if single else self.read)(row.readable)
                kinds.update(isinstance(one.prompt, list) for one in read if not isinstance(one, Refused))
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

    def _take_rows(self, spool: IO[str]) -> int:
        read, source = 0, self._source
        for row in follow(source.rows, f"reading {source.name}"):
            read += 1
            with self._refusing((row.number, row.place)):
                weight = read_weight(row.readable, source.layout)
                for preference in source.read(row.readable):
                    with self._refusing((row.number, row.place)):
                        if isinstance(preference, Refused):
                            raise preference
                        self._accept(preference, row.number, row.place, spool, weight)
        return read

    @contextlib.contextmanager
    def _refusing(self, *rows: tuple[int, str]) -> Iterator[None]:
        """A refusal inside lists these rows, each by number and place."""
        try:
            yield
        except Refused as reason:
            for number, place in rows:
                origin = self._names[self._index] if self._names else ""
                self._rejections.add(number, place, reason, origin=origin)

    def accepted(self) -> Iterator[Accepted]:
        """The accepted rows again, in order of the sources."""
        with self._spool.open(encoding="utf-8") as spool:
            for line, source in zip(spool, self.sources, strict=True):
                *row, number, place, weight = json.loads(line)
                yield Accepted(Preference(*row), number, place, weight, source)

    def _accept(
        self, row: Preference, number: int, place: str, spool: IO[str], weight: float | None = None
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
        identity = _digest(
            [key.hex(), row.kind, row.probability, row.dimension, *(sorted(parts) if even else parts)]
        )
        here = self._index << _BITS | number
        if (earlier := self._seen.setdefault(identity, here)) != here:
            self.duplicates += 1
            if not self._keep_duplicates:
                other = f" of {self._names[earlier >> _BITS]}" if self._names else ""
                raise LeftOut("duplicate", f"of row {earlier & (1 << _BITS) - 1}{other}")
        set_id = self._sets.setdefault(_digest([key.hex(), row.dimension, *sorted(parts)]), len(self._sets))
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

    def _take_candidates(self, spool: IO[str]) -> int:
        """Group one-candidate rows by prompt. The texts wait on disk; only their offsets are in memory."""
        read, layout, config = 0, self._source.layout, self._source.config
        groups: dict[tuple[bytes, str], list[int]] = {}
        seen: dict[bytes, int] = {}
        waiting_path = self._spool.with_suffix(".candidates")
        with waiting_path.open("w+b") as waiting:
            for row in follow(self._source.rows, f"reading {self._source.name}"):
                read += 1
                with self._refusing((row.number, row.place)):
                    for candidate in self._source.read_candidates(row.readable):
                        with self._refusing((row.number, row.place)):
                            if isinstance(candidate, Refused):
                                raise candidate
                            key = prompt_key(candidate.prompt)
                            identity = _digest([key.hex(), candidate.dimension, candidate.completion])
                            if (earlier := seen.setdefault(identity, row.number)) != row.number:
                                self.duplicates += 1
                                raise LeftOut("duplicate", f"of row {earlier}")
                            groups.setdefault((key, candidate.dimension), []).append(waiting.tell())
                            line = json.dumps([*candidate, row.number, row.place], ensure_ascii=False)
                            waiting.write(line.encode() + b"\n")
            for (key, _), offsets in groups.items():
                for chunk in self._chunks(key, offsets):
                    candidates, places = [], []
                    for offset in chunk:
                        waiting.seek(offset)
                        *candidate_fields, number, place = json.loads(waiting.readline())
                        candidates.append(Candidate(*candidate_fields))
                        places.append((number, place))
                    with self._refusing(*places):
                        if layout.label == ("label",):
                            made = pair_thumbs(candidates)
                        else:
                            made = [rank_candidates(candidates, config)]
                        for preference in made:
                            self._accept(preference, *min(places), spool)
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


def peek(
    rows: Iterator[SourceRow], source: str
) -> tuple[list[SourceRow], Iterator[SourceRow], list[str], list[str]]:
    """The first hundred rows, all rows, the columns of the first, and the columns of at least half of them.

    A few odd rows must not decide how the others are read.

    Raises:
        DataError: there is no row, or none of the first can be read.
    """
    first = list(itertools.islice(rows, _PEEK))
    records = [row.record for row in first if row.record is not None]
    known = Counter(column for record in records for column in dict.fromkeys(paths_of(record)))
    if not first:
        raise DataError(f"{source} holds no rows")
    if not known:
        raise DataError(
            f"none of the first {len(first)} rows of {source} can be read; the first: {first[0].fault}"
        )
    common = [column for column, count in known.items() if 2 * count >= len(records)]
    return first, itertools.chain(first, rows), list(known), common


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
    """Refuse a mix of plain text and conversations.

    Raises:
        ConfigError: names one of each, and the remedy.
    """
    names = {source.conversational: source.name for source in sources}
    if {True, False} <= set(names):
        raise ConfigError(
            f"{names[False]} holds plain text and {names[True]} conversations, and a dataset holds one "
            "kind: set as_messages=true to make conversations of plain text, or leave one source out"
        )


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors inside name the source."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _digest(value: object) -> bytes:
    text = json.dumps(value, sort_keys=True, default=bytes.hex)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
