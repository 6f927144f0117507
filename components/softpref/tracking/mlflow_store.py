"""How MLflow's store is opened and spoken to, and what its errors mean. Knows no mirror."""

from __future__ import annotations

import getpass
import importlib
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from softpref.remote import public_url

_short_lock = threading.Lock()
_short_users = 0
_short_set: list[str] = []


class RunGone(Exception):
    """The run was deleted on the server, so nothing can be added to it."""


def resolve_tracking_uri(tracking_uri: str | None = None) -> str:
    """The argument, else `MLFLOW_TRACKING_URI`, else `sqlite:///mlflow.db`; a SQLite path made absolute."""
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    path = uri.removeprefix("sqlite:///")
    if path != uri and path != ":memory:":
        uri = f"sqlite:///{Path(path).resolve()}"
    return uri


def mlflow_ready(uri: str) -> bool:
    """Import what speaking to `uri` needs; False when mlflow is not installed.

    Done in the caller's thread before a sender starts, since imports from two threads can tangle.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        for module in ("mlflow", "mlflow.entities", "mlflow.tracking.fluent"):
            importlib.import_module(module)
        if uri.startswith(("http:", "https:")):
            importlib.import_module("mlflow.store.tracking.rest_store")
        else:
            importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
            for name in ("alembic", "mlflow.store.db.utils"):  # a hundred lines of schema migrations
                logging.getLogger(name).setLevel(logging.WARNING)
    except ImportError:
        return False
    return True


def open_client(uri: str) -> Any:
    """A client of the store at `uri`, which `mlflow_ready` has been asked about.

    MLflow makes a SQLite file's tables when it is first opened, and two processes that do so at once leave a
    file that nobody can open again: here the second waits for the first.
    """
    from filelock import FileLock
    from mlflow import MlflowClient

    path = uri.removeprefix("sqlite:///")
    if path == uri or path == ":memory:":
        return MlflowClient(uri)
    with FileLock(f"{path}.lock"):
        return MlflowClient(uri)


def where_to_look(uri: str, run_id: str | None) -> str:
    """How a person gets to see a run and those beside it in MLflow's own UI: an address, or what opens one.

    MLflow opens an experiment in its view of traces, which is empty, unless the address asks for the other.
    """
    page = ""
    if run_id and (not uri.startswith("sqlite:") or Path(uri.removeprefix("sqlite:///")).exists()):
        with suppress(Exception), short_requests():  # without it the page is missing, no more
            experiment = open_client(uri).get_run(run_id).info.experiment_id
            page = f"/#/experiments/{experiment}?workflowType=machine_learning"
    if uri.startswith(("http://", "https://")):
        return f"{public_url(uri).rstrip('/')}{page}"
    opened = f", then open http://127.0.0.1:5000{page}" if page else ""
    return f"{uri}; look at it with: mlflow ui --backend-store-uri {uri}{opened}"


def find_experiment(client: Any, name: str, uri: str) -> str:
    """The id of an experiment; made when absent, also when another process makes it at the same moment."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=_artifact_location(name, uri))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        raise RunGone(
            f"experiment {name!r} is deleted; `mlflow experiments restore --experiment-id "
            f"{found.experiment_id}` brings it back"
        )
    return found.experiment_id


def _artifact_location(experiment: str, uri: str) -> str | None:
    """Beside a SQLite store (MLflow's own choice is the stage's current directory); else the server's."""
    path = uri.removeprefix("sqlite:///")
    if path == uri or path == ":memory:":
        return None
    return (Path(path).parent / "mlartifacts" / re.sub(r"[^\w.-]+", "_", experiment)).as_uri()


def source_tags() -> dict[str, str]:
    """The tags by which MLflow shows who ran what; its low-level client leaves them out."""
    program = Path(sys.argv[0]).name or "python"
    if program == "executor_main.py":  # KFP's, which runs every step
        program = "softpref"
    tags = {"mlflow.source.name": program, "mlflow.source.type": "LOCAL"}
    with suppress(Exception):  # a container's user id may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags


@contextmanager
def short_requests(retries: int = 0, timeout: int = 10) -> Iterator[None]:
    """Within it MLflow's requests end soon (its own default is about four minutes of retries).

    Args:
        retries: attempts after the first one.
        timeout: seconds per attempt.
    """
    hold_short_requests(retries, timeout)
    try:
        yield
    finally:
        release_short_requests()


def hold_short_requests(retries: int = 0, timeout: int = 10) -> None:
    """By the environment, the one way MLflow has; the user's own values, and the first holder's, win."""
    global _short_users
    limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": retries, "MLFLOW_HTTP_REQUEST_TIMEOUT": timeout}
    with _short_lock:
        _short_users += 1
        for name, value in limits.items():
            if name not in os.environ:
                os.environ[name] = str(value)
                _short_set.append(name)


def release_short_requests() -> None:
    global _short_users
    with _short_lock:
        _short_users -= 1
        if _short_users == 0:
            for name in _short_set:
                os.environ.pop(name, None)
            _short_set.clear()


def in_short(error: BaseException) -> str:
    """An error's message on one line of at most 200 characters."""
    refusal = refusal_of(error)
    if refusal:
        return f"it {refusal}"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " …"


def refusal_of(error: BaseException) -> str | None:
    """What a server that answers does not accept of this client, and what to do; None for any other error."""
    code = getattr(error, "error_code", None)
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if code == "PERMISSION_DENIED" and "Permission denied" in str(error):
        return (
            f"does not let user {user!r} write there: the experiment or model is another user's; name one of "
            "your own, or ask for the permission EDIT"
        )
    if code == "UNAUTHENTICATED":
        if os.environ.get("MLFLOW_TRACKING_TOKEN"):
            return "refuses the login: set MLFLOW_TRACKING_TOKEN to a token that it knows"
        who = f"the login of user {user!r}" if user else "a client without login"
        return f"refuses {who}: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to a login it knows"
    if "Invalid Host header" in str(error):
        return "does not answer to the name in its URL: it must stand in the server's --allowed-hosts"
    return None
