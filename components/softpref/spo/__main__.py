"""`accelerate launch -m softpref.spo --config FILE [--key value]`: the training stage on several devices."""

import sys

from softpref.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
