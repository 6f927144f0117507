"""Files, folders, saved datasets, URLs and the Hub as one stream of numbered records. Judges no content."""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import io
import json
import logging
import os
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from softpref import remote
from softpref.data.config import EMBEDDED
from softpref.errors import ConfigError, DataError
from softpref.remote import Pinned, is_url, public_url

logger = logging.getLogger(__name__)

_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_CARD = "README.md"  # of a folder that comes from the Hub: it can say what subsets and splits there are
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_CHUNK = 1 << 20
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)
_MOST_DIGITS = 4300  # of an integer: Python's own limit
_MOST_LINES = 1000  # of a CSV row: a quote that stays open for longer is taken for one that nobody closed
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\Z)|[][{}]', re.DOTALL)  # and strings, which may hold some
_UNREADABLE = object()
_NOWHERE = (
    'source {!r} does not exist; give "story", "storyteller", a file, a folder, a URL like s3://BUCKET/FILE, '
    "or a Hub dataset id like owner/name"
)


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
    fetched: Path | None = None,
) -> Iterator[SourceRow]:
    """Stream a source's records without holding them.

    Args:
        source: a file, a folder of files, a saved dataset, the URL of one of them, or a Hub dataset id.
        subset: of a Hub dataset, or of a folder whose dataset card names several.
        split: of a Hub dataset, a saved one, or a folder that is divided as one of the Hub; by default train,
            or the only one.
        revision: branch, tag or commit of a Hub dataset.
        format: of files; `auto` goes by their names, or by the first bytes where no name tells it.
        fetched: where `fetch` put what the URL names; by default it is fetched.

    Raises:
        ConfigError: at once, when the source does not exist, cannot be reached or has no known format.
        DataError: while reading, when a file is broken beyond single rows.
    """
    if is_url(source):
        path = fetched or fetch(source, format)
        with _speaking_of(source, path):
            rows = open_source(str(path), format=format, subset=subset, split=split)
        return _of_url(source, path, rows)
    path = Path(source)
    if path.is_file():
        if subset is not None or split not in (None, "train"):
            raise ConfigError(
                f"{source} is one file, without splits and subsets; leave out split={split!r}, "
                f"subset={subset!r}"
            )
        return _number([(path.name, _read_file(path, format))])
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _number([(path.name, _read_saved(path, split))])
        files = _files_in(path, format, subset, split)
        return _number((_shown(os.path.relpath(file, path)), _read_file(file, format)) for file in files)
    if _names_a_path(source) or not _HUB_ID.fullmatch(source):
        raise ConfigError(_NOWHERE.format(source))
    return _number([(source, _read_hub(source, subset, split, revision))])


def fetch(source: str, format: str = "auto") -> Path:
    """Download what a URL names, as far as it is data, unless that was done before; returns its path here.

    Raises:
        ConfigError: it does not exist, holds no data, or cannot be read.
    """

    def data_files(names: Iterable[str]) -> list[str]:
        names = list(names)
        if format != "auto" or {"dataset_dict.json", "state.json"} & {*names}:
            return names
        data = [name for name in names if _format_of(name)] or [
            name for name in names if not Path(name).suffix
        ]
        return [*data, *(name for name in names if name == _CARD)]

    return remote.fetch(source, choose=data_files)


def pin(source: str, revision: str | None = None) -> Pinned:
    """What a source is now, without reading it: a Hub dataset's commit, else a fingerprint of its content.

    Where that cannot be told from here (no network, no permission, a path of another machine) the fingerprint
    is empty, and a warning says so.

    Args:
        source: as in `open_source`, or an embedded one.
        revision: branch, tag or commit of a Hub dataset.

    Raises:
        ConfigError: the source certainly does not exist.
    """
    if source in EMBEDDED:
        return Pinned(source, revision, "")
    if is_url(source):
        return Pinned(source, revision, remote.fingerprint(source))
    if Path(source).exists():
        return Pinned(source, revision, remote.fingerprint_of_path(Path(source)))
    if _names_a_path(source):
        logger.warning("source %s is not here. That it changes will not be noticed", source)
        return Pinned(source, revision, "")
    if not _HUB_ID.fullmatch(source):
        raise ConfigError(_NOWHERE.format(source))
    return remote.pin_repository("dataset", source, revision, "source")


def _names_a_path(source: str) -> bool:
    return bool(_format_of(source)) or source.startswith((".", "/", "~"))


def _files_in(folder: Path, format: str, subset: str | None, split: str | None) -> list[Path]:
    """The data files of a folder's split, sorted; all of them where it is not divided.

    Raises:
        ConfigError: there is no such subset or split, or no data file.
    """
    from datasets.data_files import FILES_TO_IGNORE

    present = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and file.name not in FILES_TO_IGNORE
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    files = [file for file in present if format != "auto" or _format_of(file.name)]
    files = files or [file for file in present if not file.suffix and _format_inside(file)]
    divided = _divided(folder, subset)
    if divided is None:
        if split not in (None, "train"):
            raise ConfigError(
                f"source folder {folder} has no split {split!r}: neither a dataset card nor the names of its "
                "files divide it; leave split out"
            )
        chosen, where = files, f"source folder {folder}"
    else:
        asked, split = split, _choose_split(list(divided), split, f"source folder {folder}")
        where = f"split {split} of source folder {folder}"
        wanted, known = set(divided[split]), {file for one in divided.values() for file in one}
        chosen = [file for file in files if os.path.abspath(file) in wanted]
        left = [_shown(file.relative_to(folder)) for file in files if os.path.abspath(file) not in known]
        if asked is None and len(divided) > 1:
            logger.warning("%s is read, of %s; split chooses another", where, ", ".join(divided))
        if left and subset is None:
            some = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if left[3:] else "")
            logger.warning("source folder %s: %s belong to no split, and are not read", folder, some)
    if not chosen:
        raise ConfigError(
            f"{where} holds no data file ({', '.join(_FORMATS)}, also with .gz) and is no saved dataset"
        )
    return chosen


def _divided(folder: Path, subset: str | None) -> dict[str, list[str]] | None:
    """The files of each split, as `datasets` divides a folder: by its dataset card, or by names.

    `datasets` itself would leave out files of another format than the most frequent one, and stop at the
    first bad row. None where nothing divides the folder.
    """
    from datasets import data_files

    card = folder / _CARD
    subsets, default = _subsets(card)
    chosen = subset or default
    if chosen not in (subsets or ["default"]):
        raise ConfigError(
            f"source folder {folder} has {f'no subset {subset!r}' if subset else 'several subsets'}; "
            + (f"set subset to one of {', '.join(subsets)}" if subsets else "its dataset card names none")
        )
    options = subsets.get(chosen or "", {})
    base = glob.escape(os.path.abspath(folder / str(options.get("data_dir", ""))))
    divided: dict[str, list[str]] = {}
    try:
        patterns = data_files.sanitize_patterns(
            options.get("data_files") or data_files.get_data_patterns(base)
        )
        if patterns == data_files.DEFAULT_PATTERNS_ALL and not options:
            return None
        for split, places in patterns.items():
            divided[str(split)] = []
            for place in places:
                if "://" in place:
                    raise ValueError(f"{place} lies elsewhere, download it")
                with suppress(FileNotFoundError):  # said where the split is asked for: others may be here
                    divided[str(split)] += data_files.resolve_pattern(place, base)
    except FileNotFoundError:  # no data
        return {"train": []} if options else None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the dataset card {card} cannot be followed: {error}") from error
    return divided


def _subsets(card: Path) -> tuple[dict[str, dict[str, Any]], str | None]:
    """What a dataset card says of each subset, and which is the default; empty and "default" without one.

    Raises:
        ConfigError: the card cannot be read.
    """
    import yaml
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        if not text.lstrip().startswith("---"):
            return {}, "default"
        subsets = MetadataConfigs.from_dataset_card_data(DatasetCard(text).data)
        default = subsets.get_default_config_name() if subsets else "default"
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"the dataset card {card}, which says what splits there are, cannot be read: {error}; correct or "
            "remove it"
        ) from error
    return {str(name): options for name, options in subsets.items()}, default and str(default)


def _shown(name: str | Path) -> str:
    """A file's name as text: what in it is no UTF-8 is replaced."""
    return os.fsencode(name).decode("utf-8", "replace")


def _of_url(source: str, path: Path, rows: Iterator[SourceRow]) -> Iterator[SourceRow]:
    with _speaking_of(source, path):
        yield from rows


@contextmanager
def _speaking_of(source: str, path: Path) -> Iterator[None]:
    """Within it errors name the URL, not the place of what was downloaded."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(str(error).replace(str(path), public_url(source))) from error


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


def _format_of(name: str) -> str | None:
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _format_inside(path: Path) -> str | None:
    """The format that a file's first bytes tell; CSV has none."""
    try:
        with _open_bytes(path) as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    except (OSError, EOFError, zlib.error):  # compressed, and broken
        return None
    if start.startswith(b"PAR1"):
        return "parquet"
    return {b"[": "json", b"{": "jsonl"}.get(start[:1])


def _read_file(path: Path, format: str) -> Iterator[tuple[int, Any, str]]:
    kind = format if format != "auto" else _format_of(path.name) or _format_inside(path)
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
        array = kind == "json" and _format_inside(path) == "json"
    except _DAMAGED:
        array = False
    # files named .json often hold JSON Lines
    return _until_damage(path, _read_array(path) if array else _read_lines(path))


def _until_damage(path: Path, rows: Iterator[tuple[int, Any, str]]) -> Iterator[tuple[int, Any, str]]:
    """The rows before the place where a packed file is damaged, and one fault for all behind it."""
    number = 0
    try:
        for row in rows:
            number = row[0]
            yield row
    except _DAMAGED as error:
        fault = f"the packed file is damaged from here on, nothing behind is read: {error}"
        logger.warning("%s, row %d: %s", _shown(path), number + 1, fault)
        yield number + 1, None, fault


def _integer(digits: str) -> int | float:
    """A JSON integer; of thousands of digits, which Python refuses to convert, an infinite float."""
    return int(digits) if len(digits) < _MOST_DIGITS else float(digits)


def _open_bytes(path: Path) -> IO[bytes]:
    with path.open("rb") as file:  # servers unpack some files on the way, and artifacts have no suffix
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else path.open("rb")  # type: ignore[return-value]


def _read_lines(path: Path) -> Iterator[tuple[int, Any, str]]:
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


def _read_array(path: Path) -> Iterator[tuple[int, Any, str]]:
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


def _read_table(path: Path, delimiter: str) -> Iterator[tuple[int, Any, str]]:
    csv.field_size_limit(2**31 - 1)
    # Bytes that are no UTF-8 pass as surrogates here, and the row that holds them is refused by itself.
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
    """The lines of a CSV file, a row's at a time. Those behind the first of a bad row are read again.

    So a quote that nothing closes costs the row that opened it, and not all that follow.
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
        """Whether each line behind the first, of three at least, has as many cells as a row.

        Then two stray quotes paired, and made one row of many; text of that shape is rare.
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


def _read_parquet(path: Path) -> Iterator[tuple[int, Any, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        # opened here, for pyarrow takes no name that is not UTF-8
        with path.open("rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
            for batch in file.iter_batches(batch_size=512):
                columns = [_values(column) for column in batch.columns]
                for values in zip(*columns, strict=True):
                    number += 1
                    cells = zip(batch.schema.names, values, strict=True)
                    yield number, {name: value for name, value in cells if value is not _UNREADABLE}, ""
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error


def _values(column: Any) -> list[Any]:
    """A column's values; one that Python has no value for is `_UNREADABLE`, and concerns who uses it."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        values = []
        for value in column:
            try:
                values.append(value.as_py())
            except (ValueError, OverflowError):
                values.append(_UNREADABLE)
        return values


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
    wanted = split or (present[0] if len(present) == 1 else "train")
    if wanted not in present:
        raise ConfigError(f"{where} has no split {wanted!r}; it has {', '.join(present)}: set split")
    return wanted
