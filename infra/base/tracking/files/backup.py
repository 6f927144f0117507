"""Stores backups of the tracking server in an object store, and fetches them. Does not read the database.

    backup.py put FILE s3://BUCKET/PREFIX --keep N    store a dump under its time; keep the newest N
    backup.py get s3://BUCKET/PREFIX FILE             fetch the newest dump, or the one named by --name
    backup.py copy s3://FROM s3://TO                  copy objects that are missing or differ; deletes nothing

For URIs below BACKUP_DESTINATION, BACKUP_S3_ENDPOINT_URL, BACKUP_AWS_ACCESS_KEY_ID and
BACKUP_AWS_SECRET_ACCESS_KEY replace MLFLOW_S3_ENDPOINT_URL and AWS_*, where they are set.
"""

import argparse
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import boto3
from botocore.exceptions import BotoCoreError, ClientError

_STAMP = re.compile(r"\d{8}T\d{6}Z\.dump$")


class Place(NamedTuple):
    """A bucket and a prefix in it, with the client of the store that holds them."""

    client: Any
    bucket: str
    prefix: str

    def objects(self) -> Iterator[dict[str, Any]]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
        for page in pages:
            yield from page.get("Contents", [])


def place(uri: str) -> Place:
    if not uri.startswith("s3://") or len(uri) < 6:
        raise SystemExit(f"{uri!r} must be s3://BUCKET/PREFIX")
    bucket, _, prefix = uri.removeprefix("s3://").strip("/").partition("/")
    endpoint, key, secret = (
        _setting(name, uri) for name in ("S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    )
    client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=secret)
    return Place(client, bucket, f"{prefix}/" if prefix else "")


def _setting(name: str, uri: str) -> str | None:
    backup = os.environ.get("BACKUP_DESTINATION", "")
    of_backup = backup and (uri == backup or uri.startswith(backup.rstrip("/") + "/"))
    own = os.environ.get(f"BACKUP_{name}") if of_backup else None
    return own or os.environ.get(f"MLFLOW_{name}" if name.startswith("S3") else name) or None


def put(file: Path, uri: str, keep: int) -> None:
    """Store a dump, unless it is empty; only then delete old ones."""
    size = file.stat().st_size
    if size == 0:
        raise SystemExit(f"{file} is empty: the dump failed, nothing is stored and nothing removed")
    to = place(uri)
    key = f"{to.prefix}{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.dump"
    to.client.upload_file(str(file), to.bucket, key)
    stored = to.client.head_object(Bucket=to.bucket, Key=key)["ContentLength"]
    if stored != size:
        raise SystemExit(f"s3://{to.bucket}/{key} has {stored} bytes instead of {size}")
    print(f"s3://{to.bucket}/{key}: {size} bytes", flush=True)
    for old in _dumps(to)[:-keep]:
        to.client.delete_object(Bucket=to.bucket, Key=old)
        print(f"s3://{to.bucket}/{old}: removed, there are {keep} newer ones", flush=True)


def get(uri: str, file: Path, name: str | None) -> None:
    """Fetch the newest dump, or the named one."""
    source = place(uri)
    found = _dumps(source)
    key = f"{source.prefix}{name}" if name else (found[-1] if found else "")
    if key not in found:
        known = ", ".join(Path(one).name for one in found) or "there is none"
        raise SystemExit(f"no dump {name or ''} at {uri}; dumps: {known}")
    source.client.download_file(source.bucket, key, str(file))
    print(f"s3://{source.bucket}/{key} → {file}", flush=True)


def _dumps(at: Place) -> list[str]:
    return sorted(found["Key"] for found in at.objects() if _STAMP.fullmatch(found["Key"][len(at.prefix) :]))


def copy(source_uri: str, target_uri: str) -> None:
    """Copy the objects that are missing, of another size, or newer than their copies."""
    source, target = place(source_uri), place(target_uri)
    known = {found["Key"][len(target.prefix) :]: found for found in target.objects()}
    copied = same = 0
    for found in source.objects():
        name = found["Key"][len(source.prefix) :]
        copy_of = known.get(name)
        if copy_of and copy_of["Size"] == found["Size"] and copy_of["LastModified"] >= found["LastModified"]:
            same += 1
            continue
        body = source.client.get_object(Bucket=source.bucket, Key=found["Key"])["Body"]
        target.client.upload_fileobj(body, target.bucket, target.prefix + name)
        copied += 1
    print(f"{source_uri} → {target_uri}: {copied} copied, {same} unchanged", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("put")
    one.add_argument("file", type=Path)
    one.add_argument("uri")
    one.add_argument("--keep", type=int, required=True)
    one = commands.add_parser("get")
    one.add_argument("uri")
    one.add_argument("file", type=Path)
    one.add_argument("--name", help="YYYYMMDDTHHMMSSZ.dump")
    one = commands.add_parser("copy")
    one.add_argument("source")
    one.add_argument("target")
    options = parser.parse_args()
    try:
        match options.command:
            case "put" if options.keep < 1:
                raise SystemExit(f"--keep must be at least 1, got {options.keep}")
            case "put":
                put(options.file, options.uri, options.keep)
            case "get":
                get(options.uri, options.file, options.name or None)
            case "copy":
                copy(options.source, options.target)
    except (BotoCoreError, ClientError, OSError) as error:
        raise SystemExit(f"{options.command}: {error}") from error


if __name__ == "__main__":
    main()
