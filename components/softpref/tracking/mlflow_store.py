"""Opens MLflow's store and explains its errors. Knows no mirror."""

from __future__ import annotations

import getpass
import importlib
import logging
import os
import re
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit, urlunsplit

from softpref.remote import masked, public_url, within

if TYPE_CHECKING:
    from mlflow import MlflowClient

_LINK = 2.0  # seconds until an address is shown without the link to the run
_short_lock = threading.Lock()
_short_limits: list[tuple[int, int]] = []  # of the contexts that are open
_short_set: list[str] = []


class RunGone(Exception):
    """The run was deleted on the server, so nothing can be added to it."""


def resolve_tracking_uri(tracking_uri: str | None = None) -> str:
    """The argument, else `MLFLOW_TRACKING_URI`, else `sqlite:///mlflow.db`; a SQLite path made absolute.

    User and password in a server's URL move to `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`,
    because MLflow prints and records the URL.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.username and parts.password:
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password)
        uri = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    file = sqlite_file(uri)
    return f"sqlite:///{file.resolve()}" if file else uri


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store; None for any other store."""
    path = uri.removeprefix("sqlite:///")
    return None if path in (uri, ":memory:") else Path(path)


def artifact_folder(file: Path) -> Path:
    """Where a SQLite store keeps artifacts; MLflow's own choice is the stage's current directory."""
    return file.parent / "mlartifacts"


def mlflow_ready(uri: str) -> bool:
    """Import what the store at `uri` needs; False when mlflow is not installed.

    Call it before a sender thread starts: imports from two threads can deadlock.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        for module in ("mlflow", "mlflow.entities", "mlflow.tracking.fluent"):
            importlib.import_module(module)
        if uri.startswith(("http:", "https:")):
            importlib.import_module("mlflow.store.tracking.rest_store")
        else:
            importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
            logging.getLogger("alembic").setLevel(logging.WARNING)  # a hundred lines of schema migrations
            # its errors are raised, too: a traceback each, a second apart
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    except ImportError:
        return False
    return True


def open_client(uri: str) -> MlflowClient:
    """A client of the store at `uri`; call `mlflow_ready` first.

    The first client of a SQLite file makes its tables. Two at once would break the file, so one waits; and
    they are made beside it, since a file with a part of them, left by a killed process, is of no use.
    """
    from filelock import FileLock
    from mlflow import MlflowClient

    file = sqlite_file(uri)
    if file is None:
        return MlflowClient(uri)
    with FileLock(f"{file}.lock"):
        if not file.exists() or not file.stat().st_size:
            unfinished = f".{file.name}.new-"
            for left in file.parent.glob(f"{unfinished}*"):
                left.unlink()
            made = file.with_name(f"{unfinished}{os.getpid()}")
            MlflowClient(f"sqlite:///{made}").search_experiments(max_results=1)
            made.replace(file)
        _try_to_read(file)
        return MlflowClient(uri)


def _try_to_read(file: Path) -> None:
    """Have what cannot be opened at all fail now: MLflow would try again for a hundred seconds."""
    with closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA schema_version")


def where_to_look(uri: str, run_id: str | None) -> str:
    """The address of a run's experiment in MLflow's UI, or the command that starts the UI."""
    page, file = "", sqlite_file(uri)
    if run_id and (file is None or file.exists()):

        def look_up() -> str:
            with short_requests():
                return str(open_client(uri).get_run(run_id).info.experiment_id)

        with suppress(Exception):  # on failure only the link is missing
            experiment = look_up() if file else within(_LINK, look_up)
            # without the query MLflow shows the experiment's traces, of which there are none
            page = f"/#/experiments/{experiment}?workflowType=machine_learning"
    if uri.startswith(("http://", "https://")):
        return f"{public_url(uri).rstrip('/')}{page}"
    opened = f", then open http://127.0.0.1:5000{page}" if page else ""
    shown = public_url(uri)
    return f"{shown}; look at it with: mlflow ui --backend-store-uri {shown}{opened}"


def find_experiment(client: MlflowClient, name: str, uri: str) -> str:
    """The id of an experiment; made when absent, even if another process makes it at the same moment."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        file, folder = sqlite_file(uri), re.sub(r"[^\w.-]+", "_", name)
        location = (artifact_folder(file) / folder).as_uri() if file else None  # None: the server decides
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise RunGone(
            f"experiment {name!r} is deleted; `mlflow experiments restore --experiment-id "
            f"{found.experiment_id}` brings it back"
        )
    return found.experiment_id


def source_tags() -> dict[str, str]:
    """MLflow's tags for who ran what; its low-level client does not set them."""
    program = Path(sys.argv[0]).name or "python"
    if program == "executor_main.py":  # KFP's, which runs every step
        program = "softpref"
    tags = {"mlflow.source.name": program, "mlflow.source.type": "LOCAL"}
    with suppress(Exception):  # a container's user id may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags


@contextmanager
def short_requests(retries: int = 0, timeout: int = 10) -> Iterator[None]:
    """Within it MLflow's requests fail soon; by default MLflow retries for about four minutes.

    Set through the environment, the only way MLflow offers. The user's own values win, and where contexts
    overlap, the largest.

    Args:
        retries: attempts after the first one.
        timeout: seconds per attempt.
    """
    limits = (retries, timeout)
    with _short_lock:
        if not _short_limits:
            names = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
            _short_set[:] = [name if name not in os.environ else "" for name in names]
        _short_limits.append(limits)
        _set_limits()
    try:
        yield
    finally:
        with _short_lock:
            _short_limits.remove(limits)
            _set_limits()


def _set_limits() -> None:
    for place, name in enumerate(_short_set):
        if name and _short_limits:
            os.environ[name] = str(max(limits[place] for limits in _short_limits))
        elif name:
            os.environ.pop(name, None)


def in_short(error: BaseException) -> str:
    """An error's message on one line of at most 200 characters, without the credentials of an address."""
    refusal = refusal_of(error)
    if refusal:
        return f"it {refusal}"
    text = " ".join(str(error).split()) or type(error).__name__
    text = masked(text).partition(" [SQL:")[0]
    return text if len(text) <= 200 else text[:200] + " …"


def lasting_refusal(error: BaseException, uri: str) -> str | None:
    """Why the store at `uri` will not serve however long one waits, and what to do; None if it may yet."""
    if refusal := refusal_of(error):
        return refusal
    if isinstance(error, TimeoutError):
        return None
    if isinstance(error, RunGone):
        return f"does not serve: {in_short(error)}"
    # a server, also one of databases, may come back, and a file may be locked
    if uri.startswith(("http:", "https:")) or type(error).__name__ == "OperationalError":
        return None
    remedy = (
        "set MLFLOW_TRACKING_URI (or tracking_uri) to a store that MLflow knows, like sqlite:///mlflow.db"
    )
    if sqlite_file(uri):
        remedy = (
            "if it is of another version of MLflow, `mlflow db upgrade` of a copy may mend it; else move the "
            "file away, or name another one"
        )
    return f"is no usable store ({in_short(error)}); {remedy}"


def refusal_of(error: BaseException) -> str | None:
    """What a server that answers refuses, and what to do about it; None for any other error."""
    code = getattr(error, "error_code", None)
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if code == "PERMISSION_DENIED" and "Permission denied" in str(error):
        return (
            f"does not let user {user!r} write there: the experiment or model is another user's; name one of "
            "your own, or ask for the permission EDIT"
        )
    if code == "UNAUTHENTICATED":
        if os.environ.get("MLFLOW_TRACKING_TOKEN"):
            return "refuses the login: set MLFLOW_TRACKING_TOKEN to a valid token"
        who = f"the login of user {user!r}" if user else "a client without login"
        return f"refuses {who}: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to a valid login"
    if "Invalid Host header" in str(error):
        return "does not answer to the host name in its URL: add the name to the server's --allowed-hosts"
    return None
