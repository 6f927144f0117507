"""What is said where a disk takes no more, by the real errors of the libraries that write."""

import errno
import os
import re
import signal
import sqlite3
from pathlib import Path

import pytest
from softpref.cli import main
from softpref.disk import (
    content_hash,
    disk_trouble,
    remove_parts,
    says_disk_trouble,
    write_private,
    write_whole,
)
from softpref.errors import ConfigError, DiskError


def text(path):
    path.write_text("x" * 100_000)


def json_lines(path):
    with path.open("w") as file:
        for _ in range(10_000):
            file.write("a line\n")


def safetensors(path):
    import torch
    from safetensors.torch import save_file

    save_file({"weights": torch.zeros(30_000)}, path)


def optimizer(path):
    import torch

    torch.save({"moments": torch.zeros(30_000)}, path)


def arrow(path):
    from datasets.arrow_writer import ArrowWriter

    writer = ArrowWriter(path=str(path), writer_batch_size=10)
    for number in range(3_000):
        writer.write({"text": "a row of text", "number": number})
    writer.finalize()


def dataset(path):
    from datasets import Dataset

    Dataset.from_dict({"text": ["a row of text"] * 10_000}).save_to_disk(str(path))


def store(path):
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE points (value TEXT)")
        database.executemany("INSERT INTO points VALUES (?)", [("x" * 1000,)] * 100)


def store_by_sqlalchemy(path):
    from sqlalchemy import create_engine, text

    with create_engine(f"sqlite:///{path}").begin() as connection:
        connection.execute(text("CREATE TABLE points (value TEXT)"))
        connection.execute(text("INSERT INTO points VALUES (:value)"), [{"value": "x" * 1000}] * 100)


@pytest.mark.parametrize(
    "write", [text, json_lines, safetensors, optimizer, arrow, dataset, store, store_by_sqlalchemy]
)
def test_the_error_of_every_library_that_writes_is_one_sentence(tmp_path, file_limit, write):
    @says_disk_trouble
    def run(config, *, output_dir, checkpoint_dir=""):
        write(Path(output_dir) / "file")

    (tmp_path / "out").mkdir()
    file_limit(20_000)
    with pytest.raises(DiskError) as refused:
        run(None, output_dir=str(tmp_path / "out"))
    said = str(refused.value)
    assert str(tmp_path / "out") in said
    assert "give the same command again" in said
    assert "\n" not in said


@pytest.mark.parametrize("write", [text, optimizer])
def test_a_full_disk_is_called_full(write):
    with pytest.raises((OSError, RuntimeError)) as full:
        write(Path("/dev/full"))
    what = "the disk is full" if write is text else "the disk is full, or a quota used up"
    assert disk_trouble(full.value, ["/some/out"]) == (
        f"/some/out cannot be written: {what}; free some space there and give the same command again: "
        "what was saved before is whole"
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("ENOSPC", "/a/b cannot be written: the disk is full; free"),
        ("EDQUOT", "/a/b cannot be written: the disk quota is used up; free"),
        ("EROFS", "/a/b cannot be written: the file system is read-only; make it writable"),
        ("EIO", "/a/b cannot be written: the disk reports an error"),
        ("EACCES", "/a/b: this user has no permission there; give another folder"),
        ("ENOTDIR", "/a/b: a file is where a folder should be; give another folder"),
        ("EISDIR", "/a/b: a folder is where a file should be; give another folder"),
    ],
)
def test_each_kind_of_trouble_has_its_words_and_its_remedy(code, said):
    number = getattr(errno, code)
    assert disk_trouble(OSError(number, os.strerror(number), "/a/b")).startswith(said)
    assert disk_trouble(OSError(number, os.strerror(number)), ["/a/b"]).startswith(said)


def raised(error, cause):
    try:
        try:
            raise cause
        except Exception:
            raise error  # noqa: B904
    except Exception as both:
        return both


def test_an_error_that_a_full_disk_led_to_is_understood_and_any_other_is_left():
    full = OSError(errno.ENOSPC, "No space left on device", "/a/b")
    assert disk_trouble(raised(ValueError("while making the dataset"), full)).startswith("/a/b cannot be")
    assert disk_trouble(raised(ValueError("a defect"), PermissionError(errno.EACCES, "denied", "/a"))) is None
    for other in (ValueError("a defect"), OSError("odd"), ConnectionResetError(errno.ECONNRESET, "reset")):
        assert disk_trouble(other) is None

    @says_disk_trouble
    def run(*, output_dir, error):
        raise error

    for error in (ConfigError("wrong"), KeyError("name"), FileNotFoundError(errno.ENOENT, "no", "/a")):
        with pytest.raises(type(error)) as kept:
            run(output_dir="/a", error=error)
        assert kept.value is error


def test_the_console_says_it_with_status_2_even_if_the_result_cannot_be_written(
    tmp_path, monkeypatch, capsys
):
    from softpref.data import stage

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stage, "_build", full)
    output = str(tmp_path / "out")
    assert main(["data", "--output", output, "--rows", "20", "--result", "/dev/full/result.json"]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {disk_trouble(OSError(errno.ENOSPC, ''), [output])}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no /proc here")
@pytest.mark.parametrize("output", ["/proc/softpref", "/proc/softpref/out"])
def test_an_output_where_no_file_can_be_made_is_refused(output, capsys):
    assert main(["data", "--output", output, "--rows", "20"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"error: /proc/\S+: this file system takes no new files; give another folder, .*\n", said
    )


def test_an_absent_file_is_no_trouble_of_a_disk(tmp_path):
    with pytest.raises(FileNotFoundError) as absent:
        (tmp_path / "absent").read_text()
    assert disk_trouble(absent.value) is None
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_had_begun_to_write_is_removed(tmp_path):
    child = os.fork()
    if child == 0:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        write_whole(tmp_path / "file", "new")
    os.waitpid(child, 0)
    assert [path.name for path in tmp_path.iterdir()] == [f".file.{child}.part"]
    remove_parts(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_private_file_is_its_owners_alone_whatever_was_there(tmp_path):
    file = tmp_path / "file"
    file.write_text("open to all")
    file.chmod(0o644)
    write_private(file, "password")
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.read_text() == "password"


def test_a_file_is_replaced_in_one_step_or_not_at_all(tmp_path, file_limit):
    file = tmp_path / "file"
    write_whole(file, "old")
    file_limit(1000)
    with pytest.raises(OSError, match="too large"):
        write_whole(file, "x" * 10_000)
    assert file.read_text() == "old"
    write_whole(file, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "new"


def test_the_hash_of_contents_is_xxh3(tmp_path):
    (tmp_path / "one").write_bytes(b"")
    (tmp_path / "two").write_bytes(b"abc")
    # from the reference implementation: xxhsum -H2
    assert content_hash(tmp_path / "one") == "99aa06d3014798d86001c324468d497f"
    assert content_hash(tmp_path / "one", tmp_path / "two") == content_hash(tmp_path / "two")
    assert content_hash(tmp_path / "two") == "06b05ab6733a618578af5f94892f3950"
