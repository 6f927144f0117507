"""Names of the container images, the one place that says them. Holds no code that builds or pulls."""

import os

_PREFIX = os.environ.get("SOFTPREF_IMAGE_PREFIX", "localhost/softpref")
_TAG = os.environ.get("SOFTPREF_IMAGE_TAG", "0.1.0")

DATA_IMAGE = f"{_PREFIX}-data:{_TAG}"
TRAIN_IMAGE = f"{_PREFIX}-train:{_TAG}"
EVALUATE_IMAGE = f"{_PREFIX}-evaluate:{_TAG}"
REGISTER_IMAGE = f"{_PREFIX}-evaluate:{_TAG}"
