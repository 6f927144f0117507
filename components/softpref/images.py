"""Default names of the container images; a cluster's profile replaces them when a pipeline is compiled."""

from softpref import __version__

PREFIX = "localhost/softpref"
STAGES = ("data", "train", "evaluate", "tracking")


def image_name(stage: str, prefix: str = PREFIX, tag: str = __version__) -> str:
    """The full name of one of the `STAGES`' images, such as localhost/softpref-train:0.1.0."""
    return f"{prefix}-{stage}:{tag}"


DATA_IMAGE = image_name("data")
TRAIN_IMAGE = image_name("train")
EVALUATE_IMAGE = image_name("evaluate")
REGISTER_IMAGE = EVALUATE_IMAGE
