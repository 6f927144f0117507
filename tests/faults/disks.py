"""Fills a small disk (a tmpfs) at chosen moments of the stages, and then makes room there.

The command must say in a sentence that the disk is full, and given again it must go on to the same result.
Where only tracking is met, training goes on, and `softpref track-sync` sends the rest.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.faults import console
from tests.faults.console import (
    AT_THE_END,
    STORE,
    Result,
    Workplace,
    note_waits,
    seconds_waited,
    unlike_a_refusal,
    wrong_with,
)
from tests.faults.forks import writes
from tests.faults.manglings import as_evaluated, as_the_reference, as_trained, registered_once
from tests.faults.outcomes import Outcome, Say
from tests.test_outages import SLACK

_SIZE = "64m"
_FILLER = ".filler"
_BLOCK = bytes(1 << 20)


class Place(NamedTuple):
    """Where the disk becomes full.

    Attributes:
        states: what the command begins with.
        arguments: of the console.
        at: a part of the name of a file or folder; the disk is filled when it is opened for writing, or made.
        room: bytes that are left then.
        wrong: of what the command leaves when it has been given again.
    """

    name: str
    states: tuple[str, ...]
    arguments: list[str]
    at: str
    room: int
    wrong: Result


_RUN = ["run", "--recipe", "recipe.yaml", "--output", "runs"]


def _places() -> list[Place]:
    trained, reference = partial(as_trained, state="trained"), partial(as_the_reference, output="reference")
    train = (("inputs", "store"), console.TRAIN)
    evaluate = (("inputs", "to evaluate"), console.EVALUATE)
    register = (("inputs", "evaluated"), console.REGISTER)
    checkpoint = "checkpoint-8/"
    return [
        Place(
            "data: rows while they are read",
            ("settings",),
            console.DATA,
            "work/rows.jsonl",
            8192,
            _as_the_data,
        ),
        Place("data: a split", ("settings",), console.DATA, "train/data-00000", 0, _as_the_data),
        Place("data: statistics", ("settings",), console.DATA, "stats.json", 0, _as_the_data),
        Place("sft: the final weights", ("data",), console.SFT, "reference/config.json", 8192, reference),
        Place("sft: the rows in tokens", ("data",), console.SFT, "reference/rows/train", 0, reference),
        Place("train: the run's mirror", *train, "out/tracking.jsonl", 0, trained),
        Place("train: weights of a checkpoint", *train, f"{checkpoint}config.json", 8192, trained),
        Place(
            "train: optimizer of a checkpoint", *train, f"{checkpoint}tokenizer_config.json", 65536, trained
        ),
        Place("train: samples of a checkpoint", *train, f"{checkpoint}sample_buffer", 0, trained),
        Place("train: manifest of a checkpoint", *train, f"{checkpoint}.manifest", 0, trained),
        Place("train: the final weights", *train, "out/config.json", 8192, trained),
        Place("train: the last file", *train, "out/.softpref.json", 0, trained),
        Place("evaluate: samples", *evaluate, "evaluation/samples.jsonl", 0, as_evaluated),
        Place("evaluate: report", *evaluate, "evaluation/report.html", 4096, as_evaluated),
        Place("evaluate: figures", *evaluate, "evaluation/.evaluation", 0, as_evaluated),
        Place("register: the temporary copy", *register, "model/MLmodel", 0, registered_once),
        Place(
            "register: the registry's copy",
            *register,
            "artifacts/model/tokenizer.json",
            8192,
            registered_once,
        ),
        Place("run: its folder", ("recipe",), _RUN, "runs/.run.json", 0, _as_the_run),
    ]


def fill_disks(place: Workplace, say: Say) -> list[Outcome]:
    """Fill the disk at each place once; returns the outcomes: none where no file system can be mounted."""
    place.keep_stages()
    try:
        with _small_disk(place.here):
            return [_fill_all(place, say)]
    except PermissionError as error:
        say(f"the part disk is left out, for no file system can be mounted here: {error}")
        return []


def _fill_all(place: Workplace, say: Say) -> Outcome:
    outcome = Outcome("disk")
    for number, one in enumerate(_places()):
        wrong = _fill(place, one, grown=bool(number % 2))
        outcome.note(refused=True, fault=f"{one.name}: {'; '.join(wrong)}" if wrong else "")
        say(f"{one.name}: {'; '.join(wrong) or 'refused, and then right'}")
    for trouble in ("full", "read-only"):
        wrong = _trouble_the_store(place, trouble)
        outcome.note(fault=f"train: a store that is {trouble}: {'; '.join(wrong)}" if wrong else "")
        say(f"train: a store that is {trouble}: {'; '.join(wrong) or 'right'}")
    return outcome


def _trouble_the_store(place: Workplace, trouble: str) -> list[str]:
    """What goes wrong where the disk of MLflow's store takes nothing while a model is trained."""
    place.begin("inputs", "store")
    disk = place.here / "store"
    disk.mkdir()
    environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{disk}/{STORE}"}
    with _small_disk(disk):
        shutil.move(place.here / STORE, disk / STORE)
        if trouble == "full":
            _fill_disk(disk, 0)
        else:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        ended = place.call(console.TRAIN, before=note_waits, environment=environment)
        wrong = [] if ended.status == 0 else [f"it ends with {ended.status}: {ended.said[-300:]}"]
        waited = seconds_waited(place.here)
        wrong += [f"it waits {waited:.1f} s at its end"] if waited > AT_THE_END + SLACK else []
        subprocess.run(["mount", "-o", f"remount,rw,size={_SIZE}", disk], check=True)
        (disk / _FILLER).unlink(missing_ok=True)
        synced = place.call(["track-sync", "out"])
        if synced.status:
            wrong.append(f"track-sync ends with {synced.status}: {synced.said[-300:]}")
        shutil.copy(disk / STORE, place.here / STORE)
    said = ended.said + synced.said
    return wrong + wrong_with(partial(as_trained, state="trained"), place, said)


def _fill(place: Workplace, one: Place, *, grown: bool) -> list[str]:
    """What goes wrong with a full disk, and after it has grown, or has been emptied."""
    place.begin(*one.states)
    (place.here / "tmp").mkdir()
    environment = {"TMPDIR": str(place.here / "tmp")}
    ended = place.call(one.arguments, before=partial(_fill_at, place.here, one), environment=environment)
    if not (place.here / _FILLER).exists():
        return [f"the disk was never filled: {ended.said[-300:]}"]
    wrong = unlike_a_refusal(ended, ["cannot be written: the disk is full"])
    if grown:
        subprocess.run(["mount", "-o", "remount,size=128m", place.here], check=True)
    else:
        (place.here / _FILLER).unlink()
    again = place.call(one.arguments, environment=environment)
    if again.status:
        wrong.append(f"given again, it ends with {again.status}: {again.said[-400:]}")
    else:
        wrong += wrong_with(one.wrong, place, again.said)
    if grown:
        (place.here / _FILLER).unlink()
        subprocess.run(["mount", "-o", f"remount,size={_SIZE}", place.here], check=True)
    return wrong


def _fill_at(disk: Path, one: Place) -> None:
    """Have this process fill the disk when it begins to write at the place."""
    once = threading.Lock()

    def changed(event: str, arguments: tuple[object, ...]) -> None:
        if one.at in writes(event, arguments) and once.acquire(blocking=False):
            _fill_disk(disk, one.room)

    sys.addaudithook(changed)


def _fill_disk(disk: Path, room: int) -> None:
    """Fill a disk but for `room` bytes."""
    with open(disk / _FILLER, "wb", buffering=0) as filler:
        size = len(_BLOCK)
        while size >= 1:
            try:
                filler.write(_BLOCK[:size])
            except OSError:
                size //= 2
        filler.truncate(filler.tell() - room)


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own in a folder.

    Raises:
        PermissionError: this user may not mount one.
    """
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "softpref-faults", folder],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        raise PermissionError(mounted.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _as_the_data(place: Workplace, said: str) -> list[str]:
    """Rows and statistics as in the dataset that was made without trouble."""
    files = [
        path.relative_to(place.kept("inputs"))
        for path in place.kept("inputs").glob("data/**/*")
        if path.suffix in (".arrow", ".jsonl") or path.name == "stats.json"
    ]
    unlike = [
        str(file)
        for file in files
        if not (place.here / file).is_file()
        or (place.here / file).read_bytes() != (place.kept("inputs") / file).read_bytes()
    ]
    return [f"{', '.join(unlike)} are others"] if unlike else []


def _as_the_run(place: Workplace, said: str) -> list[str]:
    return [] if list((place.here / "runs/pipeline").rglob("evaluation.json")) else ["it left no evaluation"]
