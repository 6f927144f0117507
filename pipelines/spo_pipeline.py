"""The pipeline for one softness value: check → data → reference → train → evaluate → register.

python pipelines/spo_pipeline.py                         # the embedded story world, on this machine
python pipelines/spo_pipeline.py --recipe NAME --alpha 0.5
python pipelines/spo_pipeline.py compile                 # writes pipelines/packages/spo_pipeline.yaml
"""

import sys

from softpref.pipelines.command import main
from softpref.pipelines.graph import spo_pipeline

if __name__ == "__main__":
    sys.exit(main(spo_pipeline, sys.argv[1:]))
