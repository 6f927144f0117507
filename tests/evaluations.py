"""Evaluations for tests that look at a few figures: what is not given is blank."""

from softpref.records.evaluation import Evaluation

_BLANK = {
    "name": "a model",
    "method": "spo",
    "alpha": 1.0,
    "beta": 0.1,
    "rounds": 1,
    "train_on": "preferences",
    "extrapolation": 0.0,
    "model_uri": "",
    "run_id": None,
    "evaluation_id": "same",
    "judge": {"name": "expert"},
    "metrics": {},
    "exact": None,
    "softmax_frontier": None,
    "by_prompt": {},
    "warnings": [],
}


def evaluation(**known) -> Evaluation:
    """Known values as `evaluation.json` has them."""
    return Evaluation.of({**_BLANK, **known})


def evaluations(members) -> list[Evaluation]:
    return [evaluation(**member) for member in members]
