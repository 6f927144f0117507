"""`python -m softpref` is the command `softpref`."""

import sys

from softpref.cli import main

sys.exit(main())
