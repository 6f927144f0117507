"""softpref's console in forks, in one working folder; and what finished stages left there for others."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import yaml

from tests.faults.forks import Ended, in_fork
from tests.faults.kills import LENGTHS, MODEL, TRAINING
from tests.faults.sweeps import small_recipe

STORE = "mlflow.db"
_WAITED = "waited.txt"
AT_THE_END = 10.0  # seconds that a stage may wait for MLflow by default
LONGEST = 240  # seconds for one call on a busy machine; each takes a few
INPUTS = ["--dataset", "data", "--reference", "reference"]
DATA = ["data", "--config", "data.yaml", "--output", "data"]
SFT = ["sft", "--config", "sft.yaml", "--dataset", "data", "--output", "reference"]
TRAIN = ["train", "--config", "train.yaml", *INPUTS, "--output", "out"]
LORA = [*TRAIN, "--lora_r", "2", "--use_peft"]
EVALUATE = ["evaluate", "--config", "evaluate.yaml", *INPUTS, "--policy", "policy", "--output", "evaluation"]
COMPARE = ["compare", "evaluation", "--output", "comparison"]
REGISTER = ["register", "--registered_model_name", "stories", "--min_win_rate", "0", "--policy", "policy"]
REGISTER += ["--evaluation", "evaluation", "--output", "registration"]
CONFIGURATIONS: dict[str, dict[str, object]] = {
    "data": {"rows": 160, "sft_rows": 160, "votes": 5, "seed": 3},
    "sft": {
        **{**TRAINING, **LENGTHS, "max_steps": 20, "model_config": MODEL, "vocab_size": 600},
        **{"learning_rate": 5e-3, "base_model": ""},
    },
    "train": {
        **{**TRAINING, **LENGTHS, "alpha": 0.5, "beta": 0.1, "learning_rate": 1e-3},
        **{"samples_per_refresh": 16, "sampling_interval": 3, "save_total_limit": 2},
    },
    "evaluate": {
        **{"samples_per_prompt": 4, "exact_prompts": 1, "bootstrap_samples": 100, "seed": 3},
        **{"max_prompts": 4, "max_new_tokens": 32},
    },
}
KILLED_AFTER = 14  # steps: two checkpoints are there then, and some steps after the last


Result = Callable[["Workplace", str], list[str]]
"""What is wrong with what a command has left, given what it said; empty where nothing is."""


class Workplace:
    """A folder in which commands of the console are given, always the same one: some files hold its path.

    Attributes:
        here: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.here = folder / "here"
        self._kept, self._log = folder / "kept", folder / "log"

    def call(
        self,
        arguments: list[str],
        *,
        before: Callable[[], object] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Ended:
        """Give a command.

        Args:
            before: done in the fork at first.
            environment: variables beside the store's, which is a file in the folder.
        """

        def work() -> None:
            from softpref.cli import main

            os.chdir(self.here)
            os.environ.update(
                {"MLFLOW_TRACKING_URI": f"sqlite:///{self.here}/{STORE}", **(environment or {})}
            )
            if before:
                before()
            sys.exit(main(arguments))

        return in_fork(work, self._log, longest=LONGEST)

    def begin(self, *states: str) -> None:
        """Empty the folder, and put the files of kept states there."""
        empty(self.here)
        for state in states:
            shutil.copytree(self._kept / state, self.here, symlinks=True, dirs_exist_ok=True)

    def keep(self, state: str, *names: str) -> None:
        """Keep files of the folder, all of them where none is named."""
        (self._kept / state).mkdir(parents=True)
        for name in names or sorted(path.name for path in self.here.iterdir()):
            source, target = self.here / name, self._kept / state / name
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)

    def keep_stages(self) -> None:
        """Run every stage once, where that has not been done, and keep what each leaves.

        States: `settings` (the stages' configurations), `data` (with them), `inputs` (with a reference, too),
        `store` (MLflow's, empty), `trained`, `trained lora` (`out` and its store), `cut`, `cut lora` (the
        same, killed), `unsent` (a training whose records reached no server), `to evaluate` (`policy` and its
        store), `evaluated` (with `evaluation`, too), `recipe` (of a small run).
        """
        if self._kept.exists():
            return
        self.begin()
        for name, values in CONFIGURATIONS.items():
            (self.here / f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        self.keep("settings")
        self._done(DATA)
        self.keep("data")
        self._done(SFT, environment={"MLFLOW_TRACKING_URI": f"sqlite:///{self.here}/sft.db"})
        (self.here / "sft.db").unlink()
        for left in self.here.glob("*.lock"):
            left.unlink()
        self.keep("inputs")
        self.begin()
        assert in_fork(partial(_make_store, self.here / STORE), self._log).status == 0
        self.keep("store", STORE)
        for name, arguments in (("", TRAIN), (" lora", LORA)):
            self.begin("inputs", "store")
            self._done(arguments)
            self.keep(f"trained{name}", "out", STORE)
            self.begin("inputs", "store")
            assert self.call(arguments, before=_die_after_a_step).status == -signal.SIGKILL
            self.keep(f"cut{name}", "out", STORE)
        self.begin("inputs")
        self._done(
            TRAIN,
            environment={"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "SOFTPREF_TRACKING_WAIT": "0"},
        )
        self.keep("unsent", "out")
        self.begin("inputs", "trained")
        (self.here / "out").rename(self.here / "policy")
        self.keep("to evaluate", "policy", STORE)
        self._done(EVALUATE)
        self.keep("evaluated", "policy", "evaluation", STORE)
        self.begin()
        (self.here / "recipe.yaml").write_text(yaml.safe_dump(small_recipe()), encoding="utf-8")
        self.keep("recipe")

    def kept(self, state: str) -> Path:
        """The folder of a kept state."""
        return self._kept / state

    def _done(self, arguments: list[str], environment: Mapping[str, str] | None = None) -> None:
        ended = self.call(arguments, environment=environment)
        assert ended.status == 0, ended.said[-3000:]


def empty(folder: Path) -> None:
    """Remove what is in a folder, which is made where it is absent."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def wrong_with(result: Result, place: Workplace, said: str) -> list[str]:
    """What is wrong with a result, also where it cannot be read."""
    try:
        return result(place, said)
    except (OSError, ValueError, KeyError, sqlite3.DatabaseError) as error:
        return [f"its result cannot be read: {error!r}"]


def unlike_a_refusal(ended: Ended, names: list[str]) -> list[str]:
    """In what an ended command is no good refusal, which is status 2 and one sentence that names the place.

    Args:
        names: one of them must be in the sentence.
    """
    errors = re.findall(r"^error: (.*)$", ended.said, re.MULTILINE)
    last = ended.said.rstrip().rpartition("\n")[2]
    if ended.status == -signal.SIGALRM:
        return [f"it takes more than {LONGEST} s"]
    unlike = [] if ended.status == 2 else [f"it ends with {ended.status}"]
    if "Traceback" in ended.said:
        unlike.append("it shows a traceback")
    if len(errors) != 1 or not last.startswith("error: "):
        unlike.append(f"it says {len(errors)} errors, and at last {last[:200]!r}")
    elif len(errors[0]) > 800:
        unlike.append(f"its sentence has {len(errors[0]):,} characters")
    elif not any(name in errors[0] for name in names):
        unlike.append(f"its sentence names none of {', '.join(names)}: {errors[0]}")
    return unlike


def note_waits() -> None:
    """Have this process note how long a stage's end waits for MLflow, for `seconds_waited`."""
    from softpref.tracking import Tracker

    waited = 0.0

    def timed(real: Callable[..., object]) -> Callable[..., object]:
        def wait(*arguments: object, **options: object) -> object:
            nonlocal waited
            began = time.monotonic()
            try:
                return real(*arguments, **options)
            finally:
                waited += time.monotonic() - began
                Path(_WAITED).write_text(f"{waited}")

        return wait

    Tracker.flush = timed(Tracker.flush)  # type: ignore[method-assign]
    Tracker.close = timed(Tracker.close)  # type: ignore[method-assign]


def seconds_waited(here: Path) -> float:
    """How long the stage that was called there has waited."""
    return float((here / _WAITED).read_text())


def _make_store(file: Path) -> None:
    from softpref.tracking import mlflow_ready, open_client

    uri = f"sqlite:///{file}"
    assert mlflow_ready(uri)
    open_client(uri)


def _die_after_a_step() -> None:
    """Have this process killed after a step of its training, when MLflow has the points until then."""
    from softpref.lm.watching import TrackingCallback

    real = TrackingCallback.on_log

    def on_log(self: TrackingCallback, args, state, control, logs=None, **more) -> None:  # type: ignore[no-untyped-def]
        real(self, args, state, control, logs, **more)
        if state.global_step == KILLED_AFTER:
            self.tracker.flush(60)
            os.kill(os.getpid(), signal.SIGKILL)

    TrackingCallback.on_log = on_log  # type: ignore[method-assign]
