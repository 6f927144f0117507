"""Results of a run's folder, used again: KFP's local cache, with a folder for each task's output.

Tasks are told apart by what they are made of: component, image, arguments and the artifacts they read, among
which are the versions of code and data that the first step has found. The same task gets the same folder, so
a training that was cut off finds its checkpoints there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kfp import dsl
from kfp.local import cache, executor_input_utils

_ELSEWHERE = {"tracking_uri"}  # arguments that do not change a result: a server for containers has a new port
_TRAINING = ("train-reference", "train-policy", "train-judge")  # which go on in a folder that was left


class Results(cache.LocalCache):  # type: ignore[misc]  # kfp has no types
    """The results in a pipeline root.

    Args:
        root: the pipeline root.
        anew: use none of those that are there.

    Attributes:
        folders: of the tasks of this run, in the order of their start.
        done: those of them that were done now, not used again.
    """

    def __init__(self, root: Path, *, anew: bool = False) -> None:
        super().__init__(str(root / ".results"))
        self.root, self._anew = root, anew
        self._task = threading.local()  # KFP runs the two functions of a task in one thread
        self.folders: list[Path] = []
        self.done: list[Path] = []

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it KFP's local runner takes and keeps results here."""
        originals = cache.get_local_cache, executor_input_utils.construct_local_task_root
        cache.get_local_cache = lambda: self
        executor_input_utils.construct_local_task_root = self._task_root
        try:
            yield
        finally:
            cache.get_local_cache, executor_input_utils.construct_local_task_root = originals

    def compute_key(self, component_name: str, *, arguments: Mapping[str, Any], **of: Any) -> str:
        kept = {name: value for name, value in arguments.items() if name not in _ELSEWHERE}
        key: str = super().compute_key(component_name=component_name, arguments=kept, **of)
        self._task.name, self._task.model = component_name.removeprefix("comp-"), _model_of(arguments)
        self._task.key = key
        return key

    def get(self, key: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = None if self._anew else super().get(key)
        if found is None:
            return None
        del self._task.key  # no folder is asked for
        name, of = self._task.name, f" ({self._task.model})" if self._task.model else ""
        self.folders.append(self._folder(name, key))
        print(f"{time.strftime('%H:%M:%S')}.000 - INFO - Task '{name}{of}' is done: its result is used again")
        return found

    def put(self, key: str, outputs: Mapping[str, Any]) -> None:
        for output in outputs.values():
            if isinstance(output, dsl.Artifact) and not Path(output.uri).exists():
                Path(output.uri).touch()  # of metrics, which are no file: KFP's cache asks for one
        super().put(key, dict(outputs))

    def _folder(self, name: str, key: str) -> Path:
        return self.root / f"{name}-{key[:12]}"

    def _task_root(self, pipeline_root: str, pipeline_resource_name: str, task_resource_name: str) -> str:
        """Where a task writes; empty but for a training that goes on."""
        if key := self._task.__dict__.pop("key", ""):
            folder = self._folder(task_resource_name, key)
        else:  # a task that always runs
            folder = Path(pipeline_root) / pipeline_resource_name / task_resource_name
        if self._anew or task_resource_name not in _TRAINING:
            shutil.rmtree(folder, ignore_errors=True)
        self.folders.append(folder)
        self.done.append(folder)
        return str(folder)


def _model_of(arguments: Mapping[str, Any]) -> str:
    """The name of the model that a task trains or evaluates; empty for other tasks."""
    if "member" in arguments:
        return str(json.loads(arguments["member"])["name"])
    policy = arguments.get("policy")
    return str(policy.metadata.get("name", "")) if isinstance(policy, dsl.Artifact) else ""
