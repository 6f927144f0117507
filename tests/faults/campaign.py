"""Breaks softpref on purpose, and counts what is lost: make test-faults.

    python -m tests.faults.campaign --parts kills manglings --kills 100

Prints each fault as it is found, and a table a part at the end; the exit status is 1 where there is a fault.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.console import Workplace
from tests.faults.disks import fill_disks
from tests.faults.kills import kill_everywhere
from tests.faults.manglings import mangle_everything
from tests.faults.outcomes import Outcome, table
from tests.faults.sweeps import kill_sweeps
from tests.faults.trackers import trouble_trackers

# so that a fork begins in milliseconds
_IMPORTS = (
    "softpref.data.stage",
    "softpref.sft.stage",
    "softpref.spo.stage",
    "softpref.evaluation.measure",
    "softpref.evaluation.report",
    "softpref.evaluation.stage",
    "softpref.registry.stage",
    "transformers.models.llama.modeling_llama",
    "peft",
    "matplotlib.pyplot",
    "mlflow.tracking.fluent",
    "mlflow.store.tracking.sqlalchemy_store",
    "softpref.cli",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=[*PARTS], choices=[*PARTS])
    parser.add_argument("--kills", type=int, default=110, help="of stages, in sum (default 110)")
    parser.add_argument("--manglings", type=int, default=120, help="of files, in sum (default 120)")
    parser.add_argument("--sweeps", type=int, default=10, help="sweeps that are killed once (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of what is left to chance (default 0)")
    parser.add_argument("--folder", type=Path, help="to work in; kept (default: a temporary one)")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    for name in _IMPORTS:
        importlib.import_module(name)
    began, found = time.monotonic(), dict[str, list[Outcome]]()
    with tempfile.TemporaryDirectory(prefix="softpref-faults-") as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        for part in options.parts:
            found[part] = PARTS[part](folder / part, options)
    for part, outcomes in found.items():
        print(f"\n{table(part, outcomes)}")
    outcomes = [outcome for of_a_part in found.values() for outcome in of_a_part]
    cases, faults = sum(one.cases for one in outcomes), sum(len(one.faults) for one in outcomes)
    print(f"\n{cases} times broken, {faults} faults, {(time.monotonic() - began) / 60:.0f} minutes")
    return 1 if faults or not cases else 0


def _say(line: str) -> None:
    print(line, flush=True)


def _mangle(folder: Path, options: argparse.Namespace) -> list[Outcome]:
    return mangle_everything(_place(folder), folder, options.manglings, options.seed, _say)


def _place(folder: Path) -> Workplace:
    """Where the console's commands are given, one for several parts."""
    return Workplace(folder.parent / "console")


PARTS: dict[str, Callable[[Path, argparse.Namespace], list[Outcome]]] = {
    "kills": lambda folder, options: kill_everywhere(folder, options.kills, options.seed, _say),
    "manglings": _mangle,
    "disk": lambda folder, _: fill_disks(_place(folder), _say),
    "trackers": lambda folder, _: trouble_trackers(_place(folder), _say),
    "sweep": lambda folder, options: kill_sweeps(folder, options.sweeps, options.seed, _say),
}

if __name__ == "__main__":
    sys.exit(main())
