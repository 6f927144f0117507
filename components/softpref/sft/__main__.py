"""`accelerate launch -m softpref.sft --config FILE [--key value]`: the SFT stage on several devices."""

import sys

from softpref.cli import main

if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
