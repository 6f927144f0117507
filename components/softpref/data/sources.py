"""Files, folders, saved datasets, URLs and the Hub as one stream of numbered records. Judges no content."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from softpref import remote
from softpref.data.columns import Record
from softpref.data.config import EMBEDDED
from softpref.data.file_formats import Row, format_of, printable, read_file
from softpref.data.folders import CARD, choose_split, files_in
from softpref.data.texts import Refused
from softpref.disk import what_is_at
from softpref.errors import ConfigError, DataError
from softpref.remote import Pinned, is_url, public_url

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_NOWHERE = (
    'source {!r} {}; give "story", "storyteller", a file, a folder, a URL like s3://BUCKET/FILE, '
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
    record: Record | None
    fault: str = ""

    @property
    def readable(self) -> Record:
        """The record.

        Raises:
            Refused: the row could not be read.
        """
        if self.record is None:
            raise Refused("row cannot be read", self.fault)
        return self.record


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
        format: of files; `auto` goes by their names, or else by their first bytes.
        fetched: where `fetch` put what the URL names; by default it is fetched now.

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
    if os.path.isfile(path):
        if subset is not None or split not in (None, "train"):
            raise ConfigError(
                f"{source} is one file, without splits and subsets; leave out split={split!r}, "
                f"subset={subset!r}"
            )
        return _number([(path.name, read_file(path, format))])
    if os.path.isdir(path):
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _number([(path.name, _read_saved(path, split))])
        files = files_in(path, format, subset, split)
        return _number((printable(os.path.relpath(file, path)), read_file(file, format)) for file in files)
    if _names_a_path(source) or os.path.lexists(source) or not _HUB_ID.fullmatch(source):
        raise ConfigError(_NOWHERE.format(source, what_is_at(source)))
    return _number([(source, _read_hub(source, subset, split, revision))])


def fetch(source: str, format: str = "auto") -> Path:
    """Download the data that a URL names, unless that was done before; returns its path here.

    Raises:
        ConfigError: it does not exist, holds no data, or cannot be read.
    """

    def data_files(names: Iterable[str]) -> list[str]:
        names = list(names)
        if format != "auto" or {"dataset_dict.json", "state.json"} & {*names}:
            return names
        data = [name for name in names if format_of(name)] or [
            name for name in names if not Path(name).suffix
        ]
        return [*data, *(name for name in names if name == CARD)]

    return remote.fetch(source, choose=data_files)


def pin(source: str, revision: str | None = None) -> Pinned:
    """What a source is now, without reading it: a Hub dataset's commit, else a fingerprint of its content.

    Where it is unknown here (no network, no permission, a path of another machine) the fingerprint is empty,
    and a warning says so.

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
    if os.path.isfile(source) or os.path.isdir(source):
        return Pinned(source, revision, remote.fingerprint_of_path(Path(source)))
    if os.path.lexists(source):
        raise ConfigError(_NOWHERE.format(source, what_is_at(source)))
    if _names_a_path(source):
        logger.warning("source %s is not on this machine: changes to it will go unnoticed", source)
        return Pinned(source, revision, "")
    if not _HUB_ID.fullmatch(source):
        raise ConfigError(_NOWHERE.format(source, what_is_at(source)))
    return remote.pin_repository("dataset", source, revision, "source")


def _names_a_path(source: str) -> bool:
    return bool(format_of(source)) or source.startswith((".", "/", "~"))


def _of_url(source: str, path: Path, rows: Iterator[SourceRow]) -> Iterator[SourceRow]:
    with _speaking_of(source, path):
        yield from rows


@contextmanager
def _speaking_of(source: str, path: Path) -> Iterator[None]:
    """Errors inside name the URL instead of the place of the download."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(str(error).replace(str(path), public_url(source))) from error


def _number(files: Iterable[tuple[str, Iterable[Row]]]) -> Iterator[SourceRow]:
    """Number the rows of several files consecutively."""
    before = 0
    for name, rows in files:
        last = 0
        for row, value, fault in rows:
            last = row
            record = value if isinstance(value, dict) and not fault else None
            if not fault and record is None:
                fault = f"a row must be an object with named fields, got a {type(value).__name__}"
            yield SourceRow(before + row, f"{name}:{row}", record, fault)
        before += last


def _read_saved(path: Path, split: str | None) -> Iterator[Row]:
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        saved = saved[choose_split(list(saved), split, str(path))]
    elif split is not None:
        raise ConfigError(f"{path} is one dataset without splits; leave out split={split!r}")
    return ((number, record, "") for number, record in enumerate(saved, start=1))


def _read_hub(name: str, subset: str | None, split: str | None, revision: str | None) -> Iterator[Row]:
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
    stream = streams[choose_split([str(key) for key in streams], split, asked)]

    def rows() -> Iterator[Row]:
        number = 0
        try:
            for number, record in enumerate(stream, start=1):
                yield number, record, ""
        except Exception as error:
            raise DataError(
                f"{asked} broke off after row {number}: {type(error).__name__}: {error}"
            ) from error

    return rows()
