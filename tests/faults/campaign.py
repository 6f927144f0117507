"""Breaks softpref on purpose, and counts what is lost: make test-faults.

    python -m tests.faults.campaign --parts kills sweep --kills 100

Prints each fault as it is found, and totals; the exit status is 1 where there is a fault.
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

from tests.faults.kills import Outcome, kill_everywhere
from tests.faults.sweeps import kill_sweeps

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
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=[*PARTS], choices=[*PARTS])
    parser.add_argument("--kills", type=int, default=110, help="of stages, in sum (default 110)")
    parser.add_argument("--sweeps", type=int, default=10, help="sweeps that are killed once (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the places (default 0)")
    parser.add_argument("--folder", type=Path, help="to work in; kept (default: a temporary one)")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    for name in _IMPORTS:
        importlib.import_module(name)
    began, outcomes = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="softpref-faults-") as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        for part in options.parts:
            outcomes += PARTS[part](folder / part, options)
    for name in dict.fromkeys(outcome.name for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.name == name]
        print(f"{name:28} {sum(one.kills for one in own):4} {sum(len(one.faults) for one in own):4} faults")
    total, faults = sum(one.kills for one in outcomes), sum(len(one.faults) for one in outcomes)
    print(f"{total} times broken, {faults} faults, {(time.monotonic() - began) / 60:.0f} minutes")
    return 1 if faults or not total else 0


def _say(line: str) -> None:
    print(line, flush=True)


PARTS: dict[str, Callable[[Path, argparse.Namespace], list[Outcome]]] = {
    "kills": lambda folder, options: kill_everywhere(folder, options.kills, options.seed, _say),
    "sweep": lambda folder, options: kill_sweeps(folder, options.sweeps, options.seed, _say),
}

if __name__ == "__main__":
    sys.exit(main())
