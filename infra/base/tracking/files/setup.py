"""Prepares the MLflow server's database and buckets before it starts. Safe to repeat, even in parallel.

    setup.py database          create or upgrade the tables, then create or update the users
    setup.py buckets URI...    create missing buckets (for an object store in the cluster)

The PG* variables name the database. Each folder of /etc/mlflow/users (or $MLFLOW_USERS) is a user, a mounted
Secret with the files `username` and `password`; the folder `admin` is the administrator. A changed Secret
takes effect when the pod restarts.
"""

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psycopg2.extensions

DATABASE = "postgresql+psycopg2:///mlflow"
_LOCK = 7_100_514  # any number; lets one pod at a time change tables
_PATIENCE = 180  # seconds, for a database that starts together with this pod


def database() -> None:
    """Create or upgrade tables and users, under a lock in the database."""
    import psycopg2
    from mlflow.db import upgrade

    with contextlib.closing(_connection()) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))
        try:
            upgrade.callback(DATABASE)  # `mlflow db upgrade`, without starting another interpreter
            _users()
        except psycopg2.Error as error:
            raise SystemExit(f"PostgreSQL: {error}") from error
        finally:
            cursor.execute("SELECT pg_advisory_unlock(%s)", (_LOCK,))


def _connection() -> "psycopg2.extensions.connection":
    import psycopg2

    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return psycopg2.connect(dbname="mlflow", connect_timeout=10)
        except psycopg2.OperationalError as error:
            where = f"{os.environ.get('PGHOST', 'this machine')}:{os.environ.get('PGPORT', '5432')}"
            if time.monotonic() > deadline:
                raise SystemExit(f"PostgreSQL at {where}, database mlflow: {error}") from error
            print(f"waiting for PostgreSQL at {where}: {str(error).strip().splitlines()[-1]}", flush=True)
            time.sleep(3)


def _users() -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore()
    store.init_db(DATABASE)
    for folder in sorted(Path(os.environ.get("MLFLOW_USERS", "/etc/mlflow/users")).iterdir()):
        name, password = (_text(folder / part) for part in ("username", "password"))
        admin = folder.name == "admin"
        try:
            if not store.has_user(name):
                store.create_user(name, password, is_admin=admin)
                print(f"user {name}: made", flush=True)
            elif not store.authenticate_user(name, password):
                store.update_user(name, password=password)
                print(f"user {name}: new password", flush=True)
            if store.get_user(name).is_admin != admin:
                store.update_user(name, is_admin=admin)
        except MlflowException as error:
            raise SystemExit(f"user {name} of the Secret mounted at {folder}: {error.message}") from error


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SystemExit(
            f"{path}: {error.strerror}; the Secret needs the keys username and password"
        ) from error
    if not text:
        raise SystemExit(f"{path} is empty")
    return text


def buckets(uris: list[str]) -> None:
    """Create the missing buckets of s3:// URIs."""
    import boto3
    from botocore.exceptions import ClientError, EndpointConnectionError

    client = boto3.client("s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL") or None)
    deadline = time.monotonic() + _PATIENCE
    for bucket in sorted({uri.removeprefix("s3://").split("/")[0] for uri in uris}):
        while True:
            try:
                if bucket not in {found["Name"] for found in client.list_buckets()["Buckets"]}:
                    client.create_bucket(Bucket=bucket)
                    print(f"bucket {bucket}: made", flush=True)
                break
            except EndpointConnectionError as error:
                if time.monotonic() > deadline:
                    raise SystemExit(f"object store: {error}") from error
                print(f"waiting for the object store: {error}", flush=True)
                time.sleep(3)
            except ClientError as error:
                raise SystemExit(f"bucket {bucket}: {error}") from error


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["database"]:
            database()
        case ["buckets", *uris] if uris:
            buckets(uris)
        case _:
            raise SystemExit(__doc__)
