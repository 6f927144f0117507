"""The softness sweep: plan → data → reference → for each model [train → evaluate] → compare → register.

python pipelines/spo_sweep.py                            # the embedded story world, on this machine
python pipelines/spo_sweep.py --recipe convarg --alphas 0.5 1 2 --baselines dpo:0.1
python pipelines/spo_sweep.py --runner cluster --endpoint URL
python pipelines/spo_sweep.py compile                    # writes pipelines/packages/spo_sweep.yaml
"""

import sys

from softpref.pipelines.command import main
from softpref.pipelines.graph import spo_sweep

if __name__ == "__main__":
    sys.exit(main(spo_sweep, sys.argv[1:]))
