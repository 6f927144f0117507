"""`accelerate launch -m softpref.reward_model --config FILE [--key value]`: on several devices."""

import sys

from softpref.cli import main

if __name__ == "__main__":
    sys.exit(main(["judge", *sys.argv[1:]]))
