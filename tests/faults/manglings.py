"""Mangles files that softpref reads, and gives the console command that reads them.

It must give what it gives with the whole files, or refuse in one sentence that names the place.
"""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.faults import console
from tests.faults.console import STORE, Result, Workplace, unlike_a_refusal, wrong_with
from tests.faults.kills import figures, weights
from tests.faults.outcomes import Outcome, Say
from tests.faults.tracked import tracked_in

Mangling = Callable[[Path, random.Random], None]


# ---------------------------------------------------------------------- how a file is mangled


def _by_content(change: Callable[[bytes, random.Random], bytes]) -> Mangling:
    return lambda file, chance: _write(file, change(file.read_bytes(), chance))


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def _with_noise(content: bytes, chance: random.Random) -> bytes:
    """A run of random bytes in the middle."""
    start = len(content) // 3
    return content[:start] + chance.randbytes(max(1, len(content) // 3)) + content[2 * len(content) // 3 :]


def _torn(content: bytes, _: random.Random) -> bytes:
    """Without the second half of the last line."""
    before, _, last = content.rstrip(b"\n").rpartition(b"\n")
    return (before + b"\n" if before else b"") + last[: len(last) // 2]


def _removed(file: Path, _: random.Random) -> None:
    shutil.rmtree(file) if file.is_dir() else file.unlink()


def _folder(file: Path, chance: random.Random) -> None:
    _removed(file, chance)
    file.mkdir()
    (file / "a file").write_text("in a folder")


def _foreign(file: Path, _: random.Random) -> None:
    """A whole file of the same format, with the content of something else."""
    if file.suffix == ".safetensors":
        import torch
        from safetensors.torch import save_file

        save_file({"foreign": torch.zeros(3)}, file)
    elif file.suffix == ".arrow":
        from datasets.arrow_writer import ArrowWriter

        file.unlink()
        writer = ArrowWriter(path=str(file))
        writer.write({"foreign": "row"})
        writer.finalize()
    elif file.suffix == ".db":
        file.unlink()
        with sqlite3.connect(file) as database:
            database.execute("CREATE TABLE foreign_rows (name TEXT)")
    elif file.suffix == ".yaml":
        file.write_text("- foreign\n- list\n")
    elif file.suffix in (".pt", ".pth", ".bin"):
        import torch

        torch.save({"foreign": 1}, file)
    else:
        file.write_text('{"foreign": {"content": [1, 2]}}\n')


def _values(change: Callable[[Any], Any]) -> Mangling:
    """All values of a JSON or YAML file changed, its structure kept."""

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: changed(one) for key, one in value.items()}
        if isinstance(value, list):
            return [changed(one) for one in value]
        return change(value)

    def mangle(file: Path, _: random.Random) -> None:
        text = file.read_text(encoding="utf-8")
        if file.suffix in (".jsonl", ".sent"):
            file.write_text(
                "".join(json.dumps(changed(json.loads(line))) + "\n" for line in text.splitlines())
            )
        else:
            values = yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
            file.write_text(json.dumps(changed(values)))

    return mangle


def _huge(value: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return 10**400 if is_number else value


_BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
)
_ANY: dict[str, Mangling] = {
    "cut": _by_content(lambda content, _: content[: len(content) // 2]),
    "zeros": _by_content(lambda content, _: bytes(len(content))),
    "noise": _by_content(lambda content, chance: chance.randbytes(len(content))),
    "noise in the middle": _by_content(_with_noise),
    "empty": _by_content(lambda *_: b""),
    "foreign": _foreign,
    "removed": _removed,
    "a folder": _folder,
}
_TEXT: dict[str, Mangling] = {
    "a torn line": _by_content(_torn),
    "not UTF-8": _by_content(lambda content, _: content.replace(b'"', b'"\xff\xfe\x80', 3) + b"\xff"),
    "deep": _by_content(lambda *_: b"[" * 100_000 + b"]" * 100_000),
    "deep values": _by_content(lambda *_: b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "huge numbers": _values(_huge),
    "thousands of digits": _by_content(lambda *_: b'{"version": ' + b"9" * 10_000 + b"}"),
    "surrogates": _values(lambda value: value + "\ud800" if isinstance(value, str) else value),
    "other types": _values(lambda value: [value] if isinstance(value, (str, int)) else "text"),
}
_YAML: dict[str, Mangling] = {"aliases": _by_content(lambda *_: _BOMB.encode())}
_OF_A_STORE: dict[str, Mangling] = {
    "a newer schema": lambda file, _: _execute(
        file, "UPDATE alembic_version SET version_num = 'ffffffffffff'"
    ),
    "a lost table": lambda file, _: _execute(file, "DROP TABLE metrics"),
}


def _execute(file: Path, statement: str) -> None:
    connection = sqlite3.connect(file)
    connection.execute(statement)
    connection.commit()
    connection.close()


def _a_file(folder: Path, _: random.Random) -> None:
    shutil.rmtree(folder)
    folder.write_text("where a folder was")


def _ways(file: str) -> dict[str, Mangling]:
    """What can be done to a file of that name, or to a folder."""
    suffix = Path(file).suffix
    if not suffix:
        return {"removed": _removed, "a file": _a_file}
    if suffix == ".db":
        return _ANY | _OF_A_STORE
    if suffix == ".yaml":
        return _ANY | _TEXT | _YAML
    return _ANY | _TEXT if suffix in (".json", ".jsonl", ".sent") else _ANY


# ---------------------------------------------------------------------- who reads it, and what is right


class Reader(NamedTuple):
    """A command and the files that it reads.

    Attributes:
        group: what is mangled.
        states: what it begins with.
        files: that are mangled, one at a time.
        arguments: of the console.
        wrong: of what it leaves.
    """

    group: str
    states: tuple[str, ...]
    files: tuple[str, ...]
    arguments: list[str]
    wrong: Result


_CHECKPOINT = "out/checkpoints/checkpoint-12"
_SPLIT = "data/train"


def _readers() -> list[Reader]:
    trained = partial(as_trained, state="trained")
    of_a_checkpoint = ("manifest.json", "model.safetensors", "optimizer.pt", "trainer_state.json")
    of_a_checkpoint += ("sample_buffer_0_of_1.json", "rng_state.pth", "training_loss.json")
    model = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    model += ("generation_config.json", "softpref.json")
    described = ("dataset_dict.json", "stats.json")
    split = (f"{_SPLIT}/data-00000-of-00001.arrow", f"{_SPLIT}/state.json", f"{_SPLIT}/dataset_info.json")
    evaluated = ("inputs", "evaluated")
    return [
        Reader(
            "checkpoints",
            ("inputs", "cut"),
            (*(f"{_CHECKPOINT}/{name}" for name in of_a_checkpoint), _CHECKPOINT, "out/checkpoints/run.json"),
            console.TRAIN,
            trained,
        ),
        Reader(
            "checkpoints",
            ("inputs", "cut lora"),
            tuple(f"{_CHECKPOINT}/adapter_{name}" for name in ("model.safetensors", "config.json")),
            console.LORA,
            partial(as_trained, state="trained lora"),
        ),
        Reader(
            "mirrors",
            ("store", "unsent"),
            ("out/tracking.jsonl", "out/tracking.sent"),
            ["track-sync", "out", "--tracking_uri", f"sqlite:///{STORE}"],
            _delivered,
        ),
        Reader(
            "mirrors",
            ("inputs", "cut"),
            ("out/tracking.jsonl", "out/tracking.sent"),
            console.TRAIN,
            partial(as_trained, state="trained", points=False),
        ),
        Reader("stores", ("store", "unsent"), (STORE,), _readers_sync(), _delivered),
        Reader(
            "stores",
            ("inputs", "cut"),
            (STORE,),
            console.TRAIN,
            partial(as_trained, state="trained", points=False),
        ),
        Reader("stores", evaluated, (STORE,), console.REGISTER, registered_once),
        Reader("configurations", ("inputs",), ("train.yaml",), console.TRAIN, trained),
        Reader("configurations", ("inputs",), ("data.yaml",), [*console.DATA[:-1], "out"], _any_data),
        Reader(
            "configurations",
            ("recipe",),
            ("recipe.yaml",),
            ["compile", "sweep", "--recipe", "recipe.yaml", "--output", "package.yaml"],
            _package,
        ),
        Reader(
            "results of stages",
            ("inputs", "trained"),
            ("out/result.json", "out/softpref.json"),
            console.TRAIN,
            trained,
        ),
        Reader(
            "results of stages",
            evaluated,
            ("evaluation/result.json", "evaluation/evaluation.json"),
            console.EVALUATE,
            as_evaluated,
        ),
        Reader("results of stages", evaluated, ("evaluation/evaluation.json",), console.COMPARE, _compared),
        Reader(
            "results of stages",
            evaluated,
            ("evaluation/evaluation.json", "policy/softpref.json"),
            console.REGISTER,
            registered_once,
        ),
        Reader(
            "prepared data",
            ("inputs",),
            (*(f"data/{name}" for name in described), *split),
            console.TRAIN,
            trained,
        ),
        Reader(
            "prepared data",
            ("inputs",),
            ("data/sft/train/data-00000-of-00001.arrow", "data/sft/train/state.json"),
            [*console.SFT[:-1], "out"],
            partial(as_the_reference, output="out"),
        ),
        Reader(
            "prepared data",
            ("inputs", "to evaluate"),
            ("data/outcomes.jsonl", "data/test/data-00000-of-00001.arrow"),
            console.EVALUATE,
            as_evaluated,
        ),
        Reader("models", ("inputs",), tuple(f"reference/{name}" for name in model), console.TRAIN, trained),
        Reader(
            "models",
            ("inputs",),
            ("reference/rows/rows.json", "reference/rows/train/part-00000.safetensors"),
            console.TRAIN,
            trained,
        ),
        Reader(
            "models",
            ("inputs", "to evaluate"),
            tuple(f"policy/{name}" for name in model),
            console.EVALUATE,
            as_evaluated,
        ),
    ]


def _readers_sync() -> list[str]:
    return ["track-sync", "out", "--tracking_uri", f"sqlite:///{STORE}"]


def mangle_everything(place: Workplace, faults: Path, most: int, seed: int, say: Say) -> list[Outcome]:
    """Mangle files in `most` ways; returns the outcomes.

    Args:
        faults: folder for what is left by a command that does wrong.
        seed: of the choice among all files and ways, and of random bytes.
    """
    chance = random.Random(seed)
    place.keep_stages()
    cases = _chosen(_readers(), most, chance)
    outcomes: dict[str, Outcome] = {}
    for reader, file, way in cases:
        outcome = outcomes.setdefault(reader.group, Outcome(reader.group))
        place.begin(*reader.states)
        _ways(file)[way](place.here / file, chance)
        said = f"{file}: {way}; softpref {reader.arguments[0]}"
        ended = place.call(reader.arguments)
        names = [file, *(str(path) for path in Path(file).parents if path.name), Path(file).name]
        wrong = (
            unlike_a_refusal(ended, names) if ended.status else wrong_with(reader.wrong, place, ended.said)
        )
        outcome.note(refused=ended.status != 0, fault=f"{said}: {'; '.join(wrong)}" if wrong else "")
        say(f"{said}: {'; '.join(wrong) or ('refused' if ended.status else 'right')}")
        if wrong:
            kept = faults / f"fault-{sum(len(one.faults) for one in outcomes.values())}"
            shutil.copytree(place.here, kept, symlinks=True)
            (kept / "said.log").write_text(f"{said}\n{ended.said}")
    return list(outcomes.values())


def _chosen(readers: list[Reader], most: int, chance: random.Random) -> list[tuple[Reader, str, str]]:
    """Of all cases `most`: each file once before any twice, its ways in a random order."""
    orders = []
    for reader in readers:
        for file in reader.files:
            ways = sorted(_ways(file))
            chance.shuffle(ways)
            orders.append([(reader, file, way) for way in ways])
    rounds = max(map(len, orders))
    cases = [order[turn] for turn in range(rounds) for order in orders if turn < len(order)]
    return cases[:most]


# ---------------------------------------------------------------------- what is wrong


def as_trained(place: Workplace, said: str, state: str, points: bool = True) -> list[str]:
    """Against the training that was never killed.

    Args:
        points: whether all points must be there.
    """
    wrong = (
        []
        if weights(place.here / "out") == weights(place.kept(state) / "out")
        else ["its weights are others"]
    )
    if "Traceback" in said:
        wrong.append("it shows a traceback")
    try:
        found, whole = tracked_in(place.here / STORE), tracked_in(place.kept(state) / STORE)
    except sqlite3.DatabaseError as error:
        return wrong if not points else [*wrong, f"the store is broken: {error}"]
    lost = {
        point for point in whole.points.keys() - found.points.keys() if not point[1].startswith("seconds/")
    }
    if points and lost:
        wrong.append(f"{len(lost)} points are lost, such as {min(lost)}")
    return wrong + _doubled_or_wrong(found, whole)


def _delivered(place: Workplace, said: str) -> list[str]:
    """Every record that can be read is in the store, once; what cannot is said."""
    found, whole = tracked_in(place.here / STORE), tracked_in(place.kept("trained") / STORE)
    wrong = ["it shows a traceback"] if "Traceback" in said else []
    lost = {
        point for point in whole.points.keys() - found.points.keys() if not point[1].startswith("seconds/")
    }
    if lost and "tracking.jsonl" not in said:
        wrong.append(f"{len(lost)} points are lost without a word, such as {min(lost)}")
    return wrong + _doubled_or_wrong(found, whole)


def _doubled_or_wrong(found: Any, whole: Any) -> list[str]:
    wrong = []
    if doubled := [point for point, times in found.points.items() if times > whole.points.get(point, 1)]:
        wrong.append(f"{len(doubled)} points are doubled, such as {min(doubled)}")
    unlike = [at for at in found.values.keys() & whole.values.keys() if found.values[at] != whole.values[at]]
    if unlike:
        wrong.append(f"{len(unlike)} values differ, such as {min(unlike)}")
    return wrong


def as_evaluated(place: Workplace, said: str) -> list[str]:
    wrong = ["it shows a traceback"] if "Traceback" in said else []
    whole = figures(place.kept("evaluated") / "evaluation")
    return wrong if figures(place.here / "evaluation") == whole else [*wrong, "its figures are others"]


def _compared(place: Workplace, said: str) -> list[str]:
    there = json.loads((place.here / "comparison/comparison.json").read_text())
    whole = json.loads((place.kept("evaluated") / "evaluation/evaluation.json").read_text())
    return [] if there["members"][0]["metrics"] == whole["metrics"] else ["its figures are others"]


def registered_once(place: Workplace, said: str) -> list[str]:
    there = json.loads((place.here / "registration/registration.json").read_text())
    return [] if there["registered"] and there["version"] == "1" else ["it is not registered"]


def _any_data(place: Workplace, said: str) -> list[str]:
    """Data by the defaults, where the configuration says nothing."""
    return [] if (place.here / "out/stats.json").is_file() else ["it left no data"]


def as_the_reference(place: Workplace, said: str, output: str) -> list[str]:
    whole = weights(place.kept("inputs") / "reference")
    return [] if weights(place.here / output) == whole else ["its weights are others"]


def _package(place: Workplace, said: str) -> list[str]:
    return [] if (place.here / "package.yaml").is_file() else ["it left no package"]
