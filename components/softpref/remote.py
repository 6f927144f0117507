"""Lists and fetches what a URL of any fsspec store, or the Hub, holds. Does not read the content.

Credentials come from the environment, as each store's own client takes them. Those in a URL (user and
password, a signature in its query) are used, but appear in no message and no record.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from pathlib import Path, PurePosixPath
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from softpref.errors import ConfigError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class _Store(NamedTuple):
    """A kind of store: the package and extra that read it, and the environment variables to set."""

    package: str
    extra: str
    credentials: str
    address: str = ""


_S3 = _Store(
    "s3fs",
    "s3",
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (for a public bucket FSSPEC_S3_ANON=true)",
    "AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, for a store that is not Amazon's",
)
_GCS = _Store(
    "gcsfs",
    "gcs",
    "GOOGLE_APPLICATION_CREDENTIALS, the path of a service account's key file",
)
_AZURE = _Store(
    "adlfs",
    "azure",
    "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_CONNECTION_STRING",
)
_HTTP = _Store("aiohttp", "remote", "NETRC, the path of a .netrc file with the host's login")
_HUB = _Store("huggingface_hub", "remote", "HF_TOKEN")
_OTHER = _Store("", "", "what its fsspec package reads from the environment")
_STORES = {
    **dict.fromkeys(("s3", "s3a"), _S3),
    **dict.fromkeys(("gs", "gcs"), _GCS),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), _AZURE),
    **dict.fromkeys(("http", "https"), _HTTP),
    "hf": _HUB,
}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/\s'\"\\]*)@")  # of a URL within a text, and its query
_QUERY = re.compile(r"(://[^\s?#'\"\\<>]*)\?[^\s#'\"\\<>]*")
_PLACES = ("abfs", "abfss", "hf")  # abfs://CONTAINER@ACCOUNT and hf://MODEL@REVISION name places
# keys under which stores identify a file's content, the best first; a time as the last resort
_MARKS = (
    *("ETag", "etag", "e_tag", "md5Hash", "Content-MD5", "Digest", "xet_hash", "blob_id"),
    *("LastModified", "last_modified", "Last-Modified", "mtime", "updated", "created"),
)
_CREDENTIALS = re.compile(r"credential|authenticat|authoriz|account_name", re.IGNORECASE)
_CONNECTION = re.compile(r"Connect|Timeout|Transport|ServiceRequest|DNS|gaierror|Offline")
_MB = 1 << 20
_LOOK, _LIST = 20.0, 300.0  # seconds that a store may take to list, for a fingerprint and for a download


class NotReached(ConfigError):
    """Whether a source exists is unknown: no network, no permission, no package."""


class Pinned(NamedTuple):
    """A source at one version.

    Attributes:
        source: what to read from now on; a registered model's alias is replaced by its version.
        revision: the commit of a Hub repository.
        fingerprint: changes when the content does; empty where that is unknown.
    """

    source: str
    revision: str | None
    fingerprint: str


class _File(NamedTuple):
    path: str  # as its store names it
    size: int | None
    mark: str


class _Listing(NamedTuple):
    store: AbstractFileSystem
    root: str
    files: dict[str, _File]  # by name below the root; a single file by its own name
    single: bool


def is_url(source: str) -> bool:
    return bool(_URL.match(source))


def public_url(source: str) -> str:
    """A URL without what may be secret in it, its user and its query; anything else as it is."""
    if not is_url(source):
        return source
    parts = urlsplit(source)
    if not parts.netloc:  # a path, which would lose a slash: sqlite:////FOLDER/FILE
        return source
    user, at, host = parts.netloc.rpartition("@")
    secret = at and (":" in user or parts.scheme.lower() not in _PLACES)
    return urlunsplit((parts.scheme, host if secret else parts.netloc, parts.path, "", ""))


def masked(text: str) -> str:
    """A text, in which URLs are without what may be secret, their users and their queries."""
    return _QUERY.sub(r"\1", _USER.sub(_without_user, text))


def _without_user(match: re.Match[str]) -> str:
    """As in `public_url`."""
    scheme, user = match.groups()
    secret = ":" in user or scheme.lower() not in _PLACES
    return f"{scheme}://" if secret else match[0]


def check_url(url: str, what: str) -> None:
    """Refuse a URL of a kind that cannot be read here; uses no network.

    Args:
        what: what messages call the URL, such as "source".
    """
    from fsspec import available_protocols

    scheme = _scheme(url)
    if scheme not in available_protocols():
        raise ConfigError(
            f"{what} {public_url(url)}: {scheme}:// cannot be read; give s3://, gs://, abfs://, https:// or "
            "hf://, or another scheme that fsspec knows"
        )
    if not url[len(scheme) + 3 :].strip("/"):
        raise ConfigError(f"{what} {public_url(url)} names no file or folder; give {scheme}://PLACE/PATH")


def fetch(
    url: str, what: str = "source", choose: Callable[[Iterable[str]], Iterable[str]] | None = None
) -> Path:
    """Download the file or folder that a URL names; returns its local path.

    It is cached in `$XDG_CACHE_HOME/softpref` by its fingerprint, so it is fetched again only when the
    content changes. A `file://` URL is read where it is.

    Args:
        url: of a file, or of a folder (a prefix).
        what: what messages call the URL.
        choose: picks from the names of a folder's files; default all.

    Raises:
        ConfigError: it does not exist, is empty, or cannot be read; the message says what to set.
    """
    import fsspec.implementations.local

    found = _list(url, what, _LIST)
    if isinstance(found.store, fsspec.implementations.local.LocalFileSystem):
        return Path(found.root)
    names = set(found.files if choose is None or found.single else choose(found.files))
    files = {name: file for name, file in sorted(found.files.items()) if name in names}
    if not files or all(file.size == 0 for file in files.values()):
        some = ", ".join([*sorted(found.files)[:3], *("…" for _ in [*found.files][3:4])])
        why = "is empty" if found.single or not found.files else f"holds no file of use, only {some}"
        raise ConfigError(f"{what} {public_url(url)} {why}")
    name = _last_name(url)
    key = [public_url(url), name, _digest(files) or uuid.uuid4().hex]
    folder = kept(key, lambda partial: _download(found, files, url, what, partial, name))
    return folder / name


def fingerprint(url: str, what: str = "source") -> str:
    """A text that changes with the content behind a URL; empty, with a warning, where that is unknown.

    Reads no content; takes seconds.

    Raises:
        ConfigError: there is certainly nothing.
    """
    try:
        found = _digest(_list(url, what, _LOOK).files)
    except NotReached as error:
        logger.warning("%s. Changes will not be noticed", error)
        return ""
    if not found:
        logger.warning("%s %s: its store does not tell when it changes", what, public_url(url))
    return found


def pin_repository(kind: str, name: str, revision: str | None, what: str) -> Pinned:
    """A Hub repository at the present commit of `revision` (default: the main branch).

    Args:
        kind: `dataset` or `model`.

    Raises:
        ConfigError: the Hub certainly has no such repository or revision.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        commit = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=10).sha
    except Exception as error:  # a dozen unrelated types
        if isinstance(error, RevisionNotFoundError):
            raise ConfigError(f"{what} {name} has no revision {revision!r} on the Hub") from error
        if isinstance(error, RepositoryNotFoundError) and _status(error) == 404:
            raise ConfigError(f"{what} {name}: the Hub has no such {kind}; check its id") from error
        logger.warning(
            f"{what} {name}: the Hub does not say its commit ({_reason(error)}). Changes will not be noticed"
        )
        return Pinned(name, revision, "")
    return Pinned(name, commit, commit or "")


def fingerprint_of_path(path: Path) -> str:
    """A text that changes with the sizes and times of the files at a local path."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    states = [(str(file.relative_to(path)), file.stat()) for file in files]
    return _digest({name: _File("", state.st_size, str(state.st_mtime_ns)) for name, state in states})


def kept(key: object, fill: Callable[[Path], None]) -> Path:
    """The cached folder of a key, filled once by `fill`; other processes wait meanwhile.

    Args:
        key: identifies the content; JSON.
    """
    from filelock import FileLock

    folder = _cache() / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                fill(partial)
                partial.replace(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def _cache() -> Path:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softpref"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # a container's user may have no home
        pass
    return Path(tempfile.mkdtemp(prefix="softpref-"))


# ---------------------------------------------------------------------- the store


def _list(url: str, what: str, seconds: float) -> _Listing:
    """The files that a URL names.

    Raises:
        ConfigError: there are certainly none.
        NotReached: whether there are any is unknown.
    """
    check_url(url, what)
    try:
        return within(seconds, lambda: _listing(url))
    except Exception as error:  # every store has errors of its own
        raise _refusal(error, url, what) from None  # its text may hold the URL with its secrets


def _listing(url: str) -> _Listing:
    import fsspec

    scheme, options = _scheme(url), dict[str, Any](skip_instance_cache=True)  # nor an earlier listing
    for client in ("gcsfs", "azure"):  # they log pages on every attempt
        logging.getLogger(client).setLevel(logging.CRITICAL)
    if scheme in ("http", "https"):
        import aiohttp

        # proxies and logins from the environment; no limit on a whole download, only on a stalled one
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=120)
        options |= {"client_kwargs": {"trust_env": True, "timeout": timeout}}
    store, root = fsspec.url_to_fs(url, **options)
    if scheme in ("http", "https"):
        if not urlsplit(url).path.endswith("/"):  # to fsspec any page with links looks like a folder
            return _Listing(store, root, {_last_name(url): _file(store.info(root))}, True)
        infos = {path: store.info(path) for path in store.find(root, maxdepth=1)}
    else:
        info = store.info(root)
        if info["type"] != "directory":
            return _Listing(store, root, {_last_name(url): _file(info)}, True)
        infos = store.find(root, detail=True)
    files = {_below(root, path): _file(info) for path, info in infos.items() if not path.endswith("/")}
    if not files and scheme in ("http", "https"):
        raise FileNotFoundError("the page has no links to files below it")
    return _Listing(store, root, files, False)


def _file(info: Mapping[str, Any]) -> _File:
    mark = next((str(info[key]) for key in _MARKS if info.get(key)), "")
    return _File(info["name"], info.get("size"), mark)


def _below(root: str, path: str) -> str:
    """A file's name below the root. A store's key can be any text, even a path out of the folder."""
    name = path.removeprefix(root).lstrip("/")
    if is_url(root):
        name = unquote(name.partition("?")[0])
    if not name or any(part in ("", ".", "..") for part in name.split("/")):
        raise OSError(f"{path!r} is not a usable file name")
    return name


def _digest(files: dict[str, _File]) -> str:
    if not all(file.mark for file in files.values()):
        return ""
    listed = sorted((name, file.size, file.mark) for name, file in files.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:32]


def _download(
    found: _Listing, files: dict[str, _File], url: str, what: str, partial: Path, name: str
) -> None:
    from fsspec.callbacks import Callback

    from softpref.progress import progress

    total = sum(file.size or 0 for file in files.values())
    done = shown = 0

    def update(size: int, value: int, **_: object) -> None:
        """Called after every block with the bytes of this file so far."""
        nonlocal shown
        whole = min(done + value, total) // _MB
        loop.update(whole - shown)
        shown = whole

    with progress(f"fetching {public_url(url)}", total=total // _MB, unit="MB") as loop:
        for below, file in files.items():
            target = partial / name if found.single else partial / name / below
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                found.store.get_file(file.path, str(target), callback=Callback(hooks={"bar": update}))
            except Exception as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise _refusal(error, url, what) from None
            size = target.stat().st_size
            if file.size is not None and size != file.size:
                raise NotReached(
                    f"{what} {public_url(url)}: {below} broke off after {size:,} of {file.size:,} bytes, or "
                    "was replaced meanwhile; try again"
                )
            done += size


def within(seconds: float, look: Callable[[], Result], heard: Callable[[], float] = lambda: 0.0) -> Result:
    """What `look` returns, for which nobody waits longer than `seconds`; it goes on in a thread of its own.

    Some clients without credentials search for them for minutes, and no limit of a request covers DNS.

    Args:
        heard: the moment (`time.monotonic`) of the last sign of life, from which the seconds count.

    Raises:
        TimeoutError: it is too late.
    """
    begun = monotonic()
    answer: Future[Result] = Future()

    def ask() -> None:
        try:
            answer.set_result(look())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()  # an executor would wait for it at exit
    while (left := max(begun, heard()) + seconds - monotonic()) > 0 and not answer.done():
        wait([answer], left)
    if not answer.done():
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return answer.result()


# ---------------------------------------------------------------------- errors


def _refusal(error: BaseException, url: str, what: str) -> ConfigError:
    """The error of any store in words, with what to set."""
    scheme, shown = _scheme(url), f"{what} {public_url(url)}"
    store, reason = _STORES.get(scheme, _OTHER), _reason(error)
    if isinstance(error, ImportError):
        how = f"pip install 'softpref[{store.extra}]'" if store.extra else reason
        return NotReached(f"{shown}: {scheme}:// needs {store.package or 'a package'}: {how}")
    chain = list(_chain(error))
    names = " ".join(type(one).__name__ for one in chain)
    statuses = {_status(one) for one in chain}
    if (
        statuses & {401, 403}
        or any(isinstance(one, PermissionError) for one in chain)
        or _CREDENTIALS.search(f"{names} {reason}")
    ):
        return NotReached(
            f"{shown} cannot be read with the credentials of this environment ({reason}); set "
            f"{store.credentials}" + (f", and {store.address}" if store.address else "")
        )
    if _CONNECTION.search(names) or any(isinstance(one, ConnectionError) for one in chain):
        # a client without credentials may search for them until it times out
        settings = [store.address, store.credentials if isinstance(error, TimeoutError) else ""]
        check = "; ".join(["check the network", *(f"set {setting}" for setting in settings if setting)])
        return NotReached(f"{shown} cannot be reached ({reason}); {check}")
    if isinstance(error, FileNotFoundError) and (statuses <= {None, 404, 410}):
        why = "" if reason in url or reason == "FileNotFoundError" else f" ({reason})"
        return ConfigError(f"{shown} does not exist{why}; check its name, and what holds it")
    return NotReached(f"{shown} cannot be read ({type(error).__name__}: {reason})")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error, wherever its library keeps it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status if isinstance(status, int) else None
    for holder in (error, response):
        for name in ("status", "status_code", "code"):
            if isinstance(value := getattr(holder, name, None), int):
                return value
    return None


def _reason(error: BaseException) -> str:
    """One line of an error or its cause, without the secrets of URLs in it."""
    cause = error.__cause__ or error.__context__
    text = str(error)
    if cause is not None and (not text or is_url(text)):  # fsspec's errors are often just the URL
        text = str(cause)
    line = next(iter(masked(text).strip().splitlines()), "") or type(error).__name__
    return line if len(line) <= 200 else f"{line[:200]} …"


def _scheme(url: str) -> str:
    match = _URL.match(url)
    assert match is not None, url
    return match[1].lower()


def _last_name(url: str) -> str:
    parts = urlsplit(url)
    names = [part for part in PurePosixPath(unquote(parts.path)).parts if part not in ("/", "..")]
    return names[-1] if names else parts.netloc.rpartition("@")[2] or "data"
