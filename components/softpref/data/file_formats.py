"""Files of rows: JSON Lines, JSON, CSV, Parquet, compressed or not, a row at a time.

Every reader yields `(number, value, fault)`: a row that cannot be read has a fault and no value, and the rows
around it are read as usual.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import logging
import os
import re
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from softpref.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

Row = tuple[int, object, str]

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_CHUNK = 1 << 20
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)
_MOST_DIGITS = 4300  # of an integer: Python's own limit
_MOST_LINES = 1000  # of a CSV row: a quote that stays open for longer was never closed
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\Z)|[][{}]', re.DOTALL)  # and strings, which may hold some
_UNREADABLE = object()


def printable(name: str | Path) -> str:
    """A file's name as text; bytes that are not UTF-8 are replaced."""
    return os.fsencode(name).decode("utf-8", "replace")


def format_of(name: str) -> str | None:
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def format_inside(path: Path) -> str | None:
    """The format that a file's first bytes show; CSV shows none."""
    try:
        with _open_bytes(path) as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    except (OSError, EOFError, zlib.error):  # compressed, and broken
        return None
    if start.startswith(b"PAR1"):
        return "parquet"
    return {b"[": "json", b"{": "jsonl"}.get(start[:1])


def read_file(path: Path, format: str) -> Iterator[Row]:
    kind = format if format != "auto" else format_of(path.name) or format_inside(path)
    if kind is None:
        raise ConfigError(
            f"cannot tell the format of {path} from its name or content; set format to jsonl, json, csv, tsv "
            "or parquet"
        )
    if kind == "parquet":
        return _read_parquet(path)
    if kind in ("csv", "tsv"):
        return _until_damage(path, _read_table(path, "\t" if kind == "tsv" else ","))
    try:
        array = kind == "json" and format_inside(path) == "json"
    except _DAMAGED:
        array = False
    # files named .json often hold JSON Lines
    return _until_damage(path, _read_array(path) if array else _read_lines(path))


def _until_damage(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows before the place where a compressed file is damaged, and one fault for the rest."""
    number = 0
    try:
        for row in rows:
            number = row[0]
            yield row
    except _DAMAGED as error:
        fault = f"the compressed file is damaged from here on, the rest is not read: {error}"
        logger.warning("%s, row %d: %s", printable(path), number + 1, fault)
        yield number + 1, None, fault


def _integer(digits: str) -> int | float:
    """A JSON integer; with thousands of digits, which Python refuses to convert, an infinite float."""
    return int(digits) if len(digits) < _MOST_DIGITS else float(digits)


def _open_bytes(path: Path) -> IO[bytes]:
    with path.open("rb") as file:  # servers unpack some files on the way, and artifacts have no suffix
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else path.open("rb")  # type: ignore[return-value]


def _read_lines(path: Path) -> Iterator[Row]:
    with _open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield number, json.loads(line, parse_int=_integer), ""
            except UnicodeDecodeError:
                yield number, None, "not valid UTF-8"
            except (ValueError, RecursionError) as error:
                yield number, None, f"not valid JSON: {error}"


def _read_array(path: Path) -> Iterator[Row]:
    """Decode a JSON array element by element, holding one piece of the file at a time."""
    decoder = json.JSONDecoder(parse_int=_integer)
    with _open_bytes(path) as raw:
        file = codecs.getreader("utf-8-sig")(raw)
        text, place, number, more, wanted = "", 0, 0, True, _CHUNK
        expect_element = False
        try:
            while True:
                while place < len(text) and text[place] in " \t\r\n":
                    place += 1
                if place < len(text):
                    mark = text[place]
                    if not expect_element:
                        if mark == "]" and number > 0:
                            return
                        if mark == ("[" if number == 0 else ","):
                            place, expect_element = place + 1, True
                            continue
                        raise DataError(f"{path} is not a JSON array: {mark!r} after element {number}")
                    if mark == "]" and number == 0:
                        return
                    try:
                        value, end = decoder.raw_decode(text, place)
                    except RecursionError:
                        behind = _end_of_element(text, place)
                        if behind is None and not more:
                            raise DataError(f"{path}: element {number + 1} has no end") from None
                        if behind is not None:
                            number, place, expect_element = number + 1, behind, False
                            yield number, None, "nested too deeply"
                            continue
                    except ValueError as error:
                        if not more:
                            raise DataError(
                                f"{path}: element {number + 1} is not valid JSON: {error}"
                            ) from None
                    else:
                        if end < len(text) or not more:
                            number, place, expect_element = number + 1, end, False
                            yield number, value, ""
                            continue
                elif not more:
                    raise DataError(f"{path} ends inside its JSON array, after element {number}")
                piece = file.read(wanted)
                more = bool(piece)
                text, place = text[place:] + piece, 0
                wanted = max(_CHUNK, len(text))  # doubling keeps one huge element linear
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not valid UTF-8 after element {number}: {error}") from error


def _end_of_element(text: str, place: int) -> int | None:
    """Where the array or object that begins at `place` ends; None where that lies beyond `text`."""
    depth = 0
    for mark in _BRACKETS.finditer(text, place):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(mark[0], 0)
        if not depth:
            return mark.end()
    return None


def _read_table(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    # bytes that are not UTF-8 pass as surrogates here, so that only the row that holds them is refused
    with (
        _open_bytes(path) as raw,
        io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
    ):
        lines = _Lines(file)
        header: list[str] | None = None
        number = 0
        while True:
            fault = ""
            first = lines.begin()
            try:
                cells = next(csv.reader(lines, delimiter=delimiter, strict=True), None)
            except csv.Error as error:
                cells, fault = [], f"line {first}: {error}; is a quote open, or not doubled inside of a cell?"
            if cells is None:
                return
            if header is None:
                if fault:
                    raise DataError(f"{path}: the header cannot be read: {fault}")
                if len(set(cells)) < len(cells):
                    raise DataError(f"{path}: the header names a column twice: {', '.join(cells)}")
                header = cells
                continue
            if not fault and not cells:
                continue
            number += 1
            if not fault and len(cells) != len(header):
                fault = f"line {first}: {len(cells)} cells, the header has {len(header)}"
            if fault:
                lines.back_to_second()
                yield number, None, fault
            elif len(header) > 2 and lines.further_are_rows(len(header), delimiter):
                last = first + lines.length - 1
                yield (
                    number,
                    None,
                    f"lines {first} to {last}: one cell would hold whole rows; is a quote open?",
                )
            else:
                yield number, dict(zip(header, cells, strict=True)), ""


class _Lines:
    """The lines of a CSV file, one row's at a time. Those after the first of a bad row are read again.

    So a quote that is never closed costs only the row that opened it.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._waiting: deque[str] = deque()
        self._row: list[str] = []
        self._line = 1

    def begin(self) -> int:
        """Begin a row; returns the number of its first line."""
        self._line += len(self._row)
        self._row.clear()
        return self._line

    def back_to_second(self) -> None:
        self._waiting.extendleft(reversed(self._row[1:]))
        del self._row[1:]

    @property
    def length(self) -> int:
        """Lines of the row."""
        return len(self._row)

    def further_are_rows(self, cells: int, delimiter: str) -> bool:
        """Whether each line after the first, of at least three, has as many cells as a row.

        Then two stray quotes have made one row of many; a text of that shape is rare.
        """
        further = self._row[1:]
        return len(further) >= 3 and all(
            len(next(csv.reader([line], delimiter=delimiter), [])) == cells for line in further
        )

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if len(self._row) >= _MOST_LINES:
            raise csv.Error(f"a row of more than {_MOST_LINES} lines")
        self._row.append(self._waiting.popleft() if self._waiting else next(self._file))
        return self._row[-1]


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        # opened here, since pyarrow takes no name that is not UTF-8
        with path.open("rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
            for batch in file.iter_batches(batch_size=512):
                columns = [_values(column) for column in batch.columns]
                for values in zip(*columns, strict=True):
                    number += 1
                    cells = zip(batch.schema.names, values, strict=True)
                    yield number, {name: value for name, value in cells if value is not _UNREADABLE}, ""
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error


def _values(column: pyarrow.Array) -> list[object]:
    """A column's values; one that Python cannot hold is `_UNREADABLE`, which matters only if it is used."""
    try:
        values: list[object] = column.to_pylist()
    except (ValueError, OverflowError):
        values = []
        for value in column:
            try:
                values.append(value.as_py())
            except (ValueError, OverflowError):
                values.append(_UNREADABLE)
    return values
