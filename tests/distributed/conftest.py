"""A small dataset and reference, and the training faces run as the pipeline runs them, wherever they run."""

import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from softpref.distributed.command import stage_arguments
from softpref.distributed.processes import MODULES, launch_command, launch_environment, run_watched
from softpref.lm.row_files import read_rows

STEP = 8  # rows of an optimizer step, in one process or in several
OPTIONS = {
    "optim": "sgd",  # Adam would blow rounding errors of tiny gradients up to whole steps
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "max_prompt_length": 40,
    "max_completion_length": 24,
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
}
SETTINGS = {  # parameters of the face of stage 3
    "learning_rate": 0.05,
    "num_train_epochs": 2,
    "samples_per_refresh": 26,
    "sampling_interval": 3,
    "seed": 3,
}
# what tells of time, or of the place within an epoch
UNLIKE = ("epoch", "sampling/t", "seconds/", "total_flos")
UNLIKE += tuple(
    f"{split}_{what}" for split in ("train", "eval") for what in ("runtime", "samples_", "steps_")
)


def options_of(world_size, **options):
    """The stage's other options: as many rows in a step, whatever the processes."""
    batch = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    return {**OPTIONS, **batch, "gradient_accumulation_steps": STEP // (2 * world_size), **options}


@pytest.fixture(scope="session")
def folders(tmp_path_factory, make_tokenizer, make_model):
    """Folders of a dataset and of a reference model."""
    from datasets import Dataset, DatasetDict

    folder = tmp_path_factory.mktemp("inputs")
    rng = random.Random(0)

    def text():
        return "".join(rng.choices("abcdefgh", k=rng.choice((1, 2, 5, 20))))

    def row(number):
        size = 2 if number % 2 else 3
        return {
            "prompt": text(),
            "completions": [text() for _ in range(size)],
            "kind": "pairwise" if size == 2 else "ranking",
            "probability": round(rng.uniform(0.05, 0.95), 3) if size == 2 else None,
        }

    splits = {"train": [row(i) for i in range(20)], "validation": [row(i) for i in range(8)]}
    dataset, reference = folder / "dataset", folder / "reference"
    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(str(dataset))
    Dataset.from_list([{"prompt": "abcdefgh"[: 1 + i % 7]} for i in range(20)]).save_to_disk(
        str(dataset / "prompts")
    )
    (dataset / "stats.json").write_text(json.dumps({"dataset_hash": "abc"}))
    tokenizer = make_tokenizer("abcdefgh")
    make_model(tokenizer, layers=2).save_pretrained(reference)
    tokenizer.save_pretrained(reference)
    return SimpleNamespace(dataset=str(dataset), reference=str(reference))


@pytest.fixture
def train(tmp_path, folders, store, monkeypatch):
    """`train(name, launcher, world_size, **options)`: the face of stage 3; its metrics and model folder."""
    from softpref.spo.component import train_policy

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(name, launcher="", world_size=1, **options):
        logged = {}
        policy = SimpleNamespace(path=str(tmp_path / name), metadata={})
        train_policy.python_func(
            SimpleNamespace(path=folders.dataset),
            SimpleNamespace(path=folders.reference),
            policy,
            SimpleNamespace(log_metric=logged.__setitem__, metadata={}),
            json.dumps({"name": name, "method": "spo", "alpha": 0.5, "beta": 0.3, "options": {}}),
            **SETTINGS,
            overrides=json.dumps(options_of(world_size, **options)),
            launcher=json.dumps(launcher) if launcher else "",
        )
        said = {key: policy.metadata[key] for key in ("name", "stage", "method", "alpha", "beta")}
        assert said == {"name": name, "stage": "train", "method": "spo", "alpha": 0.5, "beta": 0.3}
        return logged, tmp_path / name

    return run


def reference_options(world_size, **options):
    """The same of stage 2; of eight rows to evaluate, two processes fill up their last batches."""
    once = {"num_train_epochs": 1, "learning_rate": 0.05, "per_device_eval_batch_size": 3}
    return options_of(world_size, **once, **options)


@pytest.fixture(scope="session")
def in_two_processes(folders):
    """`in_two_processes(folder, runs, first)`: the stage of each of `runs`, one after another in one launch.

    `runs` has the options of each by its name, and may have its `stage` and its `reference`. Both processes
    import the module `first` of `tests/distributed` before, to change what they do. `folder` gets `NAME`, the
    model, and `NAME.json`, the stage's result.
    """

    def launch(folder, runs, first):
        cases = []
        for name, options in runs.items():
            stage, reference = options.get("stage", "train"), options.get("reference", folders.reference)
            options = {key: options[key] for key in options.keys() - {"stage", "reference"}}
            places = {"dataset": folders.dataset, "output": str(folder / name)}
            if stage == "sft":
                values = {"base_model": reference, **reference_options(2, **options)}
            else:
                values = {"method": "spo", "alpha": 0.5, "beta": 0.3, **SETTINGS, **options_of(2, **options)}
                places["reference"] = reference
            config, result = folder / f"{name}.parameters.json", folder / f"{name}.json"
            config.write_text(json.dumps(values))
            cases.append([stage, *stage_arguments(places, {"name": name}, config=config, result=result)])
        (folder / "cases.json").write_text(json.dumps([first, cases]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(MODULES, "train", "tests.distributed.one_after_another")
            patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
            patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
            patch.setenv("OMP_NUM_THREADS", "1")
            command = launch_command("train", [str(folder / "cases.json")], processes=2)
            run_watched(command, env=launch_environment(2, gpus=0), what="the trainings")

    return launch


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster's API that runs what is submitted, and the kubeconfig that leads to it."""
    from tests.distributed.cluster import Cluster

    (tmp_path / "cluster").mkdir()
    cluster = Cluster(tmp_path / "cluster")
    monkeypatch.setenv("KUBECONFIG", cluster.kubeconfig())
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", cluster.kubeconfig())
    yield cluster
    cluster.close()


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """`launcher(**options)`: two nodes of the cluster; the shared volume is a folder, mounted in name."""
    monkeypatch.setattr("os.path.ismount", lambda path: path == str(tmp_path / "shared"))

    def make(**options):
        defaults = {"volume_claim": "softpref-shared", "mount_path": str(tmp_path / "shared")}
        return {"trainjob": {**defaults, "poll_interval": 0.3, **options}}

    return make


@pytest.fixture
def train_reference(tmp_path, folders, store, monkeypatch):
    """`train_reference(name, processes, **options)`: the face of stage 2; its metrics and model folder."""
    from softpref.sft.component import train_reference

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(name, processes=1, **options):
        logged = {}
        train_reference.python_func(
            SimpleNamespace(path=folders.dataset),
            SimpleNamespace(path=str(tmp_path / name), metadata={}),
            SimpleNamespace(log_metric=logged.__setitem__, metadata={}),
            base_model=folders.reference,
            overrides=json.dumps(reference_options(processes, **options)),
            launcher=json.dumps({"processes": processes}),
        )
        return logged, tmp_path / name

    return run


@pytest.fixture
def same_trajectory():
    """Asserts that two model folders were reached by the same steps, and hold the same weights.

    A run that was `resumed` sums its loss up from there, as transformers does.
    """

    def check(one, other, *, resumed=False):
        unlike = (*UNLIKE, "train_loss") if resumed else UNLIKE
        expected, found = _steps(one), _steps(other)
        assert found.keys() == expected.keys()
        assert len(expected) >= 6
        for step, values in expected.items():
            assert found[step].keys() == values.keys(), step
            for key, value in values.items():
                if not key.startswith(unlike):
                    assert found[step][key] == pytest.approx(value, rel=2e-4, abs=2e-4), (step, key)
        same_weights(one, other)

    return check


def _steps(folder):
    """Every logged metric by step: `{step: {name: value}}`."""
    metrics = {}
    for line in (folder / "tracking.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "metrics":
            metrics.setdefault(record["step"], {}).update(record["values"])
    return metrics


@pytest.fixture
def same_reference():
    """Asserts that a reference of `in_two_processes` has the face's figures, weights, rows and logps."""
    from softpref.sft.stage import headline

    def check(figures, one, other):
        result = json.loads(other.with_suffix(".json").read_text())["result"]
        assert headline(result) == pytest.approx(figures, rel=1e-4)
        same_weights(one, other)
        kept, others = (
            [sequence for row in read_rows(folder / "rows" / "train") for sequence in row]
            for folder in (one, other)
        )
        assert [sequence[:-1] for sequence in others] == [sequence[:-1] for sequence in kept]
        logps = [[sequence.reference_logp for sequence in sequences] for sequences in (kept, others)]
        assert logps[1] == pytest.approx(logps[0], abs=1e-3)

    return check


def same_weights(one, other):
    weights, others = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == others.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(others[key], tensor, rtol=0, atol=1e-5, msg=key)
