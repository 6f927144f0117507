"""`python -m tests.distributed.one_after_another FILE`: several trainings in the processes of one launch.

FILE holds a module to import first and the arguments of each training, as for the console command.
"""

import importlib
import json
import sys
from pathlib import Path

from softpref.cli import main

if __name__ == "__main__":
    first, trainings = json.loads(Path(sys.argv[1]).read_text())
    importlib.import_module(f"tests.distributed.{first}")
    for arguments in trainings:
        main(arguments)
