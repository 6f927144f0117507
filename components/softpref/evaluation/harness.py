"""Tasks of the LM Evaluation Harness (`lm-eval`), as figures of a model beside its others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from softpref.errors import ConfigError
from softpref.records.figures import Figure, Figures

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


class Tasks(NamedTuple):
    """What is asked, and the manager that knows it: names of the harness, or its configurations."""

    asked: list[str | dict[str, Any]]
    manager: TaskManager


def find_tasks(names: Sequence[str]) -> Tasks | None:
    """Look tasks up, before anything costly runs; None where none is asked for.

    Args:
        names: of tasks and groups of the harness; one that ends in `.yaml` is the file of a task.

    Raises:
        ConfigError: lm-eval is not installed, or it knows no such task.
    """
    if not names:
        return None
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "lm_eval_tasks needs the LM Evaluation Harness: pip install 'softpref[lm-eval]'"
        ) from error
    files = [name for name in names if name.endswith(".yaml")]
    manager = TaskManager(include_defaults=len(files) < len(names))  # to list its own takes seconds
    if unknown := sorted({*names} - {*files, *manager.all_tasks}):
        raise ConfigError(
            f"the LM Evaluation Harness has no task {', '.join(unknown)}; `lm-eval ls tasks` lists them"
        )
    return Tasks([_read(name) if name in files else name for name in names], manager)


def _read(file: str) -> dict[str, Any]:
    """A task's configuration; plain YAML alone, for the harness's tags would run code."""
    try:
        task = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"lm_eval_tasks: {file} is no file of a task in plain YAML: {error}") from error
    if not isinstance(task, dict):
        raise ConfigError(f"lm_eval_tasks: {file} holds no task")
    return task


def measured(tasks: Tasks, model: Any, tokenizer: Any, *, batch_size: int, confidence: float) -> Figures:
    """The harness's metrics of a model by `lm_eval/TASK/METRIC`, with intervals of its standard errors.

    A model with a chat template is asked through it.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from scipy import stats

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = lm_eval.simple_evaluate(
        wrapped,
        tasks=tasks.asked,
        task_manager=tasks.manager,
        apply_chat_template=bool(tokenizer.chat_template),
        log_samples=False,
    )
    assert found is not None  # of the first process, which is the only one
    reach = float(stats.norm.ppf((1 + confidence) / 2))
    figures: dict[str, Figure] = {}
    for task, results in found["results"].items():
        number = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in results.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = results.get(f"{metric}_stderr,{filtered}")
            spread = reach * error if isinstance(error, (int, float)) else None
            name = metric if filtered == "none" else f"{metric}-{filtered}"
            figures[f"lm_eval/{task}/{name}"] = Figure(
                float(value),
                None if spread is None else value - spread,
                None if spread is None else value + spread,
                number,
                number,
            )
    return figures
