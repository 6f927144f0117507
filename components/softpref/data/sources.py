"""Files, folders, saved datasets and the Hub as one stream of numbered records. Judges no content."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from softpref.errors import ConfigError, DataError

_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_CHUNK = 1 << 20


class SourceRow(NamedTuple):
    """One record of a source.

    `number` counts from 1 through the whole source: the line of a JSON Lines file, else the row (a header
    not counted), running on through the files of a folder. `place` says the same for people. `record` is
    None when the row could not be read, and `fault` then says why.
    """

    number: int
    place: str
    record: dict[str, Any] | None
    fault: str = ""


def open_source(
    source: str,
    *,
    format: str = "auto",
    subset: str | None = None,
    split: str | None = None,
    revision: str | None = None,
) -> Iterator[SourceRow]:
    """Stream a source's records without holding them.

    Raises:
        ConfigError: at once, when the source does not exist, cannot be reached or has no known format.
        DataError: while reading, when a file is broken beyond single rows.
    """
    path = Path(source)
    if path.is_file():
        return _number([(path.name, _read_file(path, format))])
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _number([(path.name, _read_saved(path, split))])
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file() and not file.name.startswith(".") and (format != "auto" or _format_of(file))
        ]
        if not files:
            raise ConfigError(
                f"source folder {source} holds no data file ({', '.join(_FORMATS)}, also with .gz) and is no "
                "saved dataset"
            )
        return _number((str(file.relative_to(path)), _read_file(file, format)) for file in files)
    if _format_of(path) or source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source):
        raise ConfigError(
            f'source {source!r} does not exist; give "story", a file, a folder, or a Hub dataset id like '
            "owner/name"
        )
    return _number([(source, _read_hub(source, subset, split, revision))])


def _number(files: Iterable[tuple[str, Iterable[tuple[int, Any, str]]]]) -> Iterator[SourceRow]:
    """Number the (row, value, fault) triples of several files through."""
    before = 0
    for name, rows in files:
        last = 0
        for row, value, fault in rows:
            last = row
            if not fault and not isinstance(value, dict):
                fault = f"a row must be an object with named fields, got a {type(value).__name__}"
            yield SourceRow(before + row, f"{name}:{row}", None if fault else value, fault)
        before += last


def _format_of(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _read_file(path: Path, format: str) -> Iterator[tuple[int, Any, str]]:
    kind = _format_of(path) if format == "auto" else format
    if kind is None:
        raise ConfigError(
            f"cannot tell the format of {path} from its name; set format to jsonl, json, csv, tsv or parquet"
        )
    if kind == "parquet":
        return _read_parquet(path)
    if kind in ("csv", "tsv"):
        return _read_table(path, "\t" if kind == "tsv" else ",")
    if kind == "json" and _starts_with_bracket(path):
        return _read_array(path)
    return _read_lines(path)  # files named .json often hold JSON Lines


def _open_bytes(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _starts_with_bracket(path: Path) -> bool:
    with _open_bytes(path) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _read_lines(path: Path) -> Iterator[tuple[int, Any, str]]:
    with _open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield number, json.loads(line), ""
            except UnicodeDecodeError:
                yield number, None, "not valid UTF-8"
            except (json.JSONDecodeError, RecursionError) as error:
                yield number, None, f"not valid JSON: {error}"


def _read_array(path: Path) -> Iterator[tuple[int, Any, str]]:
    """Decode a JSON array element by element, holding one piece of the file at a time."""
    decoder = json.JSONDecoder()
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
                    except json.JSONDecodeError as error:
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


def _read_table(path: Path, delimiter: str) -> Iterator[tuple[int, Any, str]]:
    csv.field_size_limit(2**31 - 1)
    # Bytes that are no UTF-8 pass as surrogates here, and the row that holds them is refused by itself.
    with (
        _open_bytes(path) as raw,
        io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
    ):
        reader = csv.reader(file, delimiter=delimiter)
        try:
            header = next(reader, None)
            if header is None:
                return
            if len(set(header)) < len(header):
                raise DataError(f"{path}: the header names a column twice: {', '.join(header)}")
            number = 0
            for cells in reader:
                if not cells:
                    continue
                number += 1
                if len(cells) != len(header):
                    yield number, None, f"{len(cells)} cells, the header has {len(header)}"
                else:
                    yield number, dict(zip(header, cells, strict=True)), ""
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Any, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=512):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record, ""
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error


def _read_saved(path: Path, split: str | None) -> Iterator[tuple[int, Any, str]]:
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        saved = saved[_choose_split(list(saved), split, str(path))]
    elif split is not None:
        raise ConfigError(f"{path} is one dataset without splits; leave out split={split!r}")
    return ((number, record, "") for number, record in enumerate(saved, start=1))


def _read_hub(
    name: str, subset: str | None, split: str | None, revision: str | None
) -> Iterator[tuple[int, Any, str]]:
    import datasets

    asked = f"Hub dataset {name!r} (subset {subset!r}, split {split!r}, revision {revision!r})"
    try:
        streams = datasets.load_dataset(name, subset, revision=revision, streaming=True)
    except (
        Exception
    ) as error:  # the Hub client raises a dozen unrelated types for "not there" and "no network"
        raise ConfigError(
            f"{asked} cannot be opened: {type(error).__name__}: {error}. Check the id and the network, or "
            "download it and give the folder"
        ) from error
    stream = streams[_choose_split([str(key) for key in streams], split, asked)]

    def rows() -> Iterator[tuple[int, Any, str]]:
        number = 0
        try:
            for number, record in enumerate(stream, start=1):
                yield number, record, ""
        except Exception as error:
            raise DataError(
                f"{asked} broke off after row {number}: {type(error).__name__}: {error}"
            ) from error

    return rows()


def _choose_split(present: list[str], split: str | None, where: str) -> str:
    if split is None:
        split = present[0] if len(present) == 1 else "train"
    if split not in present:
        raise ConfigError(f"{where} has no split {split!r}; it has {', '.join(present)}")
    return split


class Pinned(NamedTuple):
    source: str
    revision: str = ""
    fingerprint: str = ""


def pin(source, revision=None, *, tracking_uri=""):
    return Pinned(source)
