"""Dataset folders of stage 1's layout, written by hand, and a tracking store of their own."""

import json

import pytest

STORY = "the fox found a bell, and the owl sang. "
ROWS = [
    {"prompt": f"{who} and {what}:", "completion": f" {who} {verb} {what}."}
    for who in ("fox", "owl", "cat")
    for what in ("bell", "moon", "star")
    for verb in ("sees", "finds")
]


@pytest.fixture(scope="session")
def tracking_uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(scope="session")
def write_dataset():
    """`write_dataset(folder, rows, demonstrations=None, validation=…)` in the layout of stage 1."""

    def write(folder, rows, *, demonstrations=None, validation=()):
        from datasets import Dataset, DatasetDict

        def preferences(pairs):
            return Dataset.from_list(
                [
                    {
                        "prompt": row["prompt"],
                        "completions": [row["completion"], "no."],
                        "kind": "pairwise",
                        "probability": None,
                        "source_row": number,
                    }
                    for number, row in enumerate(pairs, 1)
                ]
            )

        splits = {"train": preferences(rows)}
        if validation:
            splits["validation"] = preferences(validation)
        DatasetDict(splits).save_to_disk(str(folder))
        if demonstrations:
            DatasetDict({"train": Dataset.from_list(demonstrations)}).save_to_disk(str(folder / "sft"))
        (folder / "stats.json").write_text(json.dumps({"dataset_hash": "abc"}))
        return str(folder)

    return write


@pytest.fixture(scope="session")
def rows():
    return ROWS


@pytest.fixture
def settings():
    """Settings of a run that takes a second."""
    return {
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 6,
        "save_strategy": "no",
        "seed": 1,
    }
