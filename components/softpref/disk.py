"""Files that outlive a kill and a power cut, and what is said where a disk takes no more. Knows no stage."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from softpref.errors import DiskError, SoftprefError

DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What reading a file of JSON can raise, whatever it holds."""

P = ParamSpec("P")
T = TypeVar("T")

_UNSAID = -1  # torch does not say why it could not write
_HAPPENED = {
    _UNSAID: "the disk is full, or a quota used up",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EFBIG: "a file would be larger than is allowed here (ulimit -f)",
    errno.EIO: "the disk reports an error (input/output error)",
    errno.EACCES: "this user has no permission there",
    errno.EPERM: "this user has no permission there",
    errno.EEXIST: "something else has that name",
    errno.ENOTDIR: "a file is where a folder should be",
    errno.EISDIR: "a folder is where a file should be",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOENT: "this file system takes no new files",
}
_ROOM = "free some space there"
_REMEDIES = {
    _UNSAID: _ROOM,
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: f"{_ROOM}, or have the quota raised",
    errno.EROFS: "make it writable",
    errno.EFBIG: "raise that limit",
    errno.EIO: "look at the system's log, and mend the disk or take another one",
}
_GOES_ON = "and give the same command again: what was saved before is whole"
# libraries whose errors are no OSError, or have no number: safetensors and Arrow name the system's, SQLite
# and torch have words of their own
_SAID = {
    errno.ENOSPC: r"no space left on device|os error 28\b|database or disk is full",
    errno.EDQUOT: r"disk quota exceeded|os error 122\b",
    errno.EROFS: r"read-only file system|os error 30\b|attempt to write a readonly database",
    errno.EFBIG: r"file too large|os error 27\b",
    errno.EIO: r"input/output error|disk i/o error|os error 5\b",
}
_TORCH_WRITES = r"PytorchStreamWriter failed|inline_container\.cc.*unexpected pos|basic_ios::clear"
_ALMOST_NOTHING = 1 << 20  # bytes
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_BLOCK = 1 << 22


def write_whole(path: str | Path, text: str) -> None:
    """Write a file in one step: whatever happens, the old one or the new one is there, on the disk."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise
    _flush_folder(path.parent)


def remove_parts(folder: str | Path) -> None:
    """Remove what processes that were killed within `write_whole` have left in a folder of this one alone."""
    for part in Path(folder).glob(".*.part"):
        part.unlink(missing_ok=True)


def write_private(path: str | Path, text: str) -> None:
    """Write a file anew that only its owner may read, for it may hold a password."""
    path = Path(path)
    path.unlink(missing_ok=True)
    with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)


def content_hash(*paths: str | Path) -> str:
    """XXH3 of the contents of files: against accidents, where a cryptographic hash would take minutes."""
    import xxhash

    digest = xxhash.xxh3_128()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def flush_below(folder: str | Path) -> None:
    """Have everything in a folder on the disk, as after a power cut it would else not be."""
    for path in (*Path(folder).rglob("*"), Path(folder)):
        if path.is_dir():
            _flush_folder(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def what_is_at(path: str | Path) -> str:
    """What a path is, as the end of the sentence that refuses it: "does not exist", "is a folder"."""
    try:
        return f"is {_KINDS[stat.S_IFMT(os.stat(path).st_mode)]}"
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no path has a null byte
        if os.path.islink(path):
            return f"is a link to {os.readlink(path)}, which does not exist"
        home = " (~ is not replaced here: write the folder's name)" if str(path).startswith("~") else ""
        return f"does not exist{home}"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def in_brief(error: BaseException) -> str:
    """An error's message on one line of at most 300 characters."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    if isinstance(error, KeyError):
        text = f"it lacks {text}"
    return f"{text[:300]} …" if len(text) > 300 else text or type(error).__name__


def disk_trouble(error: BaseException, folders: Sequence[str | Path] = ()) -> str | None:
    """What a disk's error means, in one sentence: which folder, what happened, what to do; None for others.

    Args:
        folders: that were written to, the likeliest first, for an error that names none.
    """
    code, failed = next(_causes(error), (0, error))
    if not code:
        return None
    file = failed.filename if isinstance(failed, OSError) else None
    place = os.fsdecode(file) if isinstance(file, (str, bytes)) else _suspect(folders, code)
    place = place if len(place) < 300 else f"{place[:300]} …"
    if code not in _REMEDIES:
        return f"{place}: {_HAPPENED[code]}; give another folder, which this user may write to"
    return f"{place} cannot be written: {_HAPPENED[code]}; {_REMEDIES[code]} {_GOES_ON}"


def says_disk_trouble(run: Callable[P, T]) -> Callable[P, T]:
    """A stage's `run`, whose disk's errors are `DiskError`, wherever in it they came up.

    Of the arguments, `output_dir` and `checkpoint_dir` are what is written to.
    """

    @functools.wraps(run)
    def explained(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return run(*args, **kwargs)
        except SoftprefError:
            raise
        except Exception as error:
            given = inspect.signature(run).bind(*args, **kwargs).arguments
            folders = [given[name] for name in ("output_dir", "checkpoint_dir") if given.get(name)]
            if said := disk_trouble(error, folders):
                raise DiskError(said) from error
            raise

    return explained


def _causes(error: BaseException) -> Iterator[tuple[int, BaseException]]:
    """The system's number of an error, or of one that led to it, with that error.

    Only of a disk that takes nothing, the error that led to another is the reason for it.
    """
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        code = _code(one)
        if code in _HAPPENED and (one is error or code in _SAID or code == _UNSAID):
            yield code, one
        seen.append(one)
        one = one.__cause__ or one.__context__


def _code(error: BaseException) -> int:
    if isinstance(error, OSError) and error.errno:
        return 0 if error.errno == errno.ENOENT and not _takes_nothing(error.filename) else error.errno
    text = str(error)
    known = (code for code, words in _SAID.items() if re.search(words, text, re.IGNORECASE))
    return next(known, _UNSAID if re.search(_TORCH_WRITES, text) else 0)


def _takes_nothing(file: str | bytes | None) -> bool:
    """Whether the nearest folder that is there lets none be made, as /proc does; else a file was absent."""
    if file is None:
        return False
    path = Path(os.fsdecode(file)).absolute()
    try:
        os.rmdir(tempfile.mkdtemp(dir=next(one for one in path.parents if one.is_dir())))
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _suspect(folders: Sequence[str | Path], code: int) -> str:
    """Of folders and that for temporary files, the first on a file system in that state, or the first."""

    def in_trouble(folder: str) -> bool:
        path = Path(folder).absolute()
        try:
            state = os.statvfs(next(one for one in (path, *path.parents) if one.exists()))
        except OSError:
            return False
        if code == errno.EROFS:
            return bool(state.f_flag & os.ST_RDONLY)
        return state.f_bavail * state.f_frsize < _ALMOST_NOTHING

    places = [*map(str, folders), tempfile.gettempdir()]
    return next(filter(in_trouble, places), places[0])


def _flush_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system knows this of folders
        place = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)
