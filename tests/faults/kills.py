"""Kills stages anywhere, also within the writing of a checkpoint, of the final model and of MLflow's store.

Each is called again with the same arguments then, and must end as if it had never been killed.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.faults.forks import Fuse, in_fork
from tests.faults.outcomes import Outcome, Say
from tests.faults.tracked import differences, tracked_in

LENGTHS = {"max_prompt_length": 32, "max_completion_length": 32}
TRAINING = {
    **{"per_device_train_batch_size": 16, "save_steps": 4, "logging_steps": 2, "max_steps": 18},
    **{"save_strategy": "steps", "use_cpu": True, "seed": 3},
}
MODEL = {
    **{"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"intermediate_size": 32, "max_position_embeddings": 96},
}
ALIGNING = {**TRAINING, **LENGTHS, "beta": 0.1, "samples_per_refresh": 16, "sampling_interval": 3}
POLICIES = {
    "spo": {"alpha": 0.5},
    "dpo": {"method": "dpo"},
    "spo, LoRA": {"alpha": 0.5, "lora_r": 2},
    "spo, rounds": {"alpha": 0.5, "rounds": 3, "train_on": "samples", "judge": "auto"},
    "spo, accumulated": {
        "alpha": 0.5,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
    },
}


class Case(NamedTuple):
    """A stage with its arguments.

    Attributes:
        work: does it in a folder, whose `mlflow.db` is its store.
        result: what must come out alike, of that folder.
        store: the store it begins with; None for none.
    """

    name: str
    work: Callable[[Path], object]
    result: Callable[[Path], object]
    store: Path | None = None


def kill_everywhere(folder: Path, kills: int, seed: int, say: Say) -> list[Outcome]:
    """Kill each case in turn; returns the outcomes.

    Args:
        folder: to work in.
        kills: in sum.
        seed: of the places.
    """
    chance, outcomes = random.Random(seed), []
    prepared = folder / "prepared"
    cases = list(_cases(prepared))
    shares = [kills // len(cases) + (place < kills % len(cases)) for place in range(len(cases))]
    for case, share in zip(cases, shares, strict=True):
        outcome = _kill(case, folder / case.name.replace(", ", "-"), share, chance)
        outcomes.append(outcome)
        say(f"{case.name}: killed {outcome.cases} times, {len(outcome.faults)} faults")
        for fault in outcome.faults:
            say(f"    {fault}")
    return outcomes


def _kill(case: Case, folder: Path, kills: int, chance: random.Random) -> Outcome:
    whole = _begun(case, folder / "whole")
    began = time.monotonic()
    ended = in_fork(partial(case.work, whole), folder / "whole.log", Fuse(whole, 10**9))
    took = time.monotonic() - began
    if ended.status:
        return Outcome(case.name, 1, faults=[f"fails without being killed: {ended.said[-2000:]}"])
    result, tracked = case.result(whole), tracked_in(whole / "mlflow.db")
    outcome = Outcome(case.name)
    while outcome.cases < kills:
        here = _begun(case, folder / f"kill-{outcome.cases}")
        by_change = chance.random() < 0.75
        fuse = (
            Fuse(here, change=chance.randint(1, ended.changes))
            if by_change
            else Fuse(here, seconds=chance.uniform(0.0, took))
        )
        where = f"at change {fuse.change}" if by_change else f"after {fuse.seconds:.2f} s"
        first = in_fork(partial(case.work, here), folder / f"kill-{outcome.cases}.log", fuse)
        if first.status != -9:  # it was faster this time
            shutil.rmtree(here)
            continue
        log = folder / f"kill-{outcome.cases}-again.log"
        again = in_fork(partial(case.work, here), log)
        said = f"killed {where} of {ended.changes} ({log}): "
        if again.status:
            unlike = [f"called again, it ends with {again.status}: {again.said[-600:]}"]
        else:
            try:
                unlike = [] if case.result(here) == result else ["its result is another"]
                unlike += differences(tracked_in(here / "mlflow.db"), tracked)
            except (OSError, ValueError, KeyError, sqlite3.DatabaseError) as error:
                unlike = [f"its result cannot be read: {error}"]
        outcome.note(fault=said + "; ".join(unlike) if unlike else "")
        if not unlike:
            shutil.rmtree(here)
    return outcome


def _begun(case: Case, folder: Path) -> Path:
    folder.mkdir(parents=True)
    if case.store:
        shutil.copytree(case.store.parent, folder, dirs_exist_ok=True)
    return folder


def _cases(prepared: Path) -> Iterator[Case]:
    """Each stage; the later ones work on what is prepared by the ones before."""
    prepared.mkdir(parents=True)
    log = prepared / "log"

    def prepare(work: Callable[[Path], object], name: str) -> Path:
        ended = in_fork(lambda: work(prepared / name), log)
        assert ended.status == 0, ended.said
        return prepared / name

    yield Case(
        "data", _data, lambda folder: json.loads((folder / "out/stats.json").read_text())["dataset_hash"]
    )
    data = prepare(_data, "data") / "out"
    sft = partial(_sft, data=data)
    yield Case("sft, no store yet", sft, _weights)
    empty = prepare(_empty_store, "store") / "mlflow.db"
    yield Case("sft", sft, _weights, empty)
    reference = prepare(sft, "sft") / "out"
    for name, options in POLICIES.items():
        yield Case(name, partial(_spo, data=data, reference=reference, options=options), _weights, empty)
    spo = partial(_spo, data=data, reference=reference, options=POLICIES["spo"])
    trained = prepare(spo, "spo")
    kept = prepared / "trained"
    kept.mkdir()
    shutil.copy(trained / "mlflow.db", kept)
    evaluate = partial(_evaluate, data=data, reference=reference, policy=trained / "out")
    yield Case("evaluate", evaluate, _figures, kept / "mlflow.db")

    def evaluated(folder: Path) -> None:
        shutil.copytree(kept, folder)
        evaluate(folder)

    evaluation = prepare(evaluated, "evaluated")
    kept = prepared / "to-register"
    kept.mkdir()
    shutil.copy(evaluation / "mlflow.db", kept)
    register = partial(_register, policy=trained / "out", evaluation=evaluation / "out")
    yield Case("register", register, _versions, kept / "mlflow.db")


def _data(folder: Path) -> None:
    from softpref.data.config import DataConfig
    from softpref.data.stage import run

    run(DataConfig(rows=160, sft_rows=160, votes=5, seed=3), str(folder / "out"))


def _empty_store(folder: Path) -> None:
    from softpref.tracking import mlflow_ready, open_client

    folder.mkdir()
    uri = f"sqlite:///{folder}/mlflow.db"
    assert mlflow_ready(uri)
    open_client(uri)


def _sft(folder: Path, *, data: Path) -> None:
    from softpref.config import build_config
    from softpref.sft.config import SFTConfig
    from softpref.sft.stage import run

    options = {**TRAINING, **LENGTHS, "model_config": MODEL, "vocab_size": 600, "learning_rate": 5e-3}
    config = build_config(SFTConfig, {**options, "max_steps": 20, "base_model": ""})
    run(config, dataset_dir=data, output_dir=folder / "out", tracking_uri=f"sqlite:///{folder}/mlflow.db")


def _spo(folder: Path, *, data: Path, reference: Path, options: dict[str, object]) -> None:
    from softpref.config import build_config
    from softpref.spo.config import SPOConfig
    from softpref.spo.stage import run

    run(
        build_config(SPOConfig, {**ALIGNING, "learning_rate": 1e-3, **options}),
        dataset_dir=data,
        reference_dir=reference,
        output_dir=folder / "out",
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
    )


def _evaluate(folder: Path, *, data: Path, reference: Path, policy: Path) -> None:
    from softpref.config import build_config
    from softpref.evaluation.config import EvaluationConfig
    from softpref.evaluation.stage import run

    options = {"samples_per_prompt": 4, "exact_prompts": 1, "bootstrap_samples": 100, "seed": 3}
    options |= {"max_prompts": 4, "max_new_tokens": 32}
    run(
        build_config(EvaluationConfig, {**options, "tracking_uri": f"sqlite:///{folder}/mlflow.db"}),
        dataset_dir=str(data),
        reference_dir=str(reference),
        policy_dir=str(policy),
        output_dir=str(folder / "out"),
    )


def _register(folder: Path, *, policy: Path, evaluation: Path) -> None:
    from unittest.mock import patch

    from softpref.registry import stage
    from softpref.registry.config import RegistryConfig

    config = RegistryConfig("softpref", min_win_rate=0, tracking_uri=f"sqlite:///{folder}/mlflow.db")
    with patch.object(stage, "gate_failures", lambda *_: []):  # a model of 18 steps is broken
        stage.run(config, policy, evaluation, folder / "out")


def _weights(folder: Path) -> object:
    return weights(folder / "out")


def _figures(folder: Path) -> object:
    return figures(folder / "out")


def weights(output: Path) -> object:
    """Hashes of a model folder's weights; what training leaves beside them must be gone."""
    files = sorted(output.rglob("*.safetensors"))
    left = [path.name for path in output.iterdir() if path.name.startswith("checkpoint")]
    return left, [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]


def figures(output: Path) -> object:
    """Those of an evaluation folder, over all and by prompt."""
    evaluation = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
    return evaluation["metrics"], evaluation["by_prompt"]


def _versions(folder: Path) -> object:
    """The registry's versions and aliases, and what the stage says."""
    said = json.loads((folder / "out/registration.json").read_text(encoding="utf-8"))
    connection = sqlite3.connect(folder / "mlflow.db")
    try:
        versions = connection.execute("SELECT name, version, current_stage FROM model_versions").fetchall()
        aliases = connection.execute("SELECT alias, version FROM registered_model_aliases").fetchall()
    finally:
        connection.close()
    return versions, sorted(aliases), said["registered"], said["version"], said["model_hash"]
