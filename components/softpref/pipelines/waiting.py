"""Waits for a run of Kubeflow Pipelines, and reports its steps and why one failed. Starts and ends nothing.

The steps come from the run's Argo workflow, which only the API's old version v1beta1 gives: v2beta1 has
neither the name of a step's pod nor a message. Where a cluster does not give it, only the run's own state is
reported.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict

from softpref.pipelines.screen import outcome, plain_lines, refusal

if TYPE_CHECKING:
    from kfp_server_api import V2beta1Run

SUCCEEDED, FAILED = 0, 1  # exit statuses
TERMINATED = 130  # like a program that was interrupted
_SECONDS_BETWEEN_LOOKS = 10.0
_FAILED_LOOKS = 60  # in a row, until waiting is given up
_MESSAGE_CHARACTERS = 200
_SHOWN_LINES = 20
_ENDED_BADLY = ("FAILED", "CANCELED")


class Api(Protocol):
    """The calls of `submission`'s client that waiting needs."""

    def get_run(self, run_id: str) -> V2beta1Run: ...

    def get_text(self, path: str, query: Sequence[tuple[str, str]] = (), host: str | None = None) -> str: ...


class Node(TypedDict, total=False):
    """A node of an Argo workflow."""

    id: str
    name: str
    type: str
    templateName: str
    phase: str
    message: str
    startedAt: str | None
    finishedAt: str | None


class Status(TypedDict, total=False):
    """The status of an Argo workflow; the nodes of a large one are compressed."""

    nodes: dict[str, Node]
    compressedNodes: str
    message: str


class Workflow(TypedDict, total=False):
    """An Argo workflow."""

    metadata: dict[str, str]
    spec: dict[str, object] | None
    status: Status | None


class Step(NamedTuple):
    """A step at one moment.

    Attributes:
        name: as the UI shows it; in the loop with its model.
        state: `waiting` for a node or an image, `running`, `succeeded`, `cached` (not run again), `failed`.
        attempt: 1 for the first; 0 if the step failed before it could start.
        message: Kubernetes' or Argo's, about what a step waits for, the attempt before, or the failure; may
            be empty.
        pod: the one with the log of the last attempt, or of the driver; empty where there is none.
        ended: end of a failed step, in ISO 8601.
    """

    name: str
    state: str
    attempt: int = 1
    message: str = ""
    pod: str = ""
    ended: str = ""


def wait_for(client: Api, run_id: str, address: str, names: Mapping[str, str], models: Sequence[str]) -> int:
    """Report the run's state and steps as they change until it ends; returns the exit status.

    Args:
        address: of the run in the UI.
        names: see `display_names`.
        models: names of the models in the order of the loop.

    Raises:
        ApiException, HTTPError: the API refuses, or has not answered 60 times in a row.
    """
    import kfp_server_api
    import urllib3

    state, failures = "", 0
    said: dict[tuple[str, ...], tuple[str, int, str]] = {}
    while True:
        try:
            run = client.get_run(run_id)
            workflow = _workflow(client, run_id)
        except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError) as error:
            failures += 1
            if failures > _FAILED_LOOKS or 400 <= (getattr(error, "status", 0) or 0) < 500:
                raise
            if failures == 1:
                _say("the API does not answer; the run goes on; trying again")
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            continue
        if failures:
            _say("the API answers again")
        failures = 0
        terminated = _is_terminated(run, workflow)
        steps = steps_of(workflow, names, models)
        for path, step in steps.items():
            # the rest of such a message changes all the time
            waits_for = step.message.partition(":")[0] if step.state == "waiting" else ""
            event = (step.state, step.attempt, waits_for)
            if said.get(path) != event:
                said[path] = event
                _say(f"{step.name} {_in_words(step, terminated)}")
        if run.state != state:
            state = run.state
            # Kubeflow 2.17 calls a run failed that a person ended
            _say("terminated" if terminated and state in _ENDED_BADLY else (state or "unknown").lower())
        if state in ("SUCCEEDED", "SKIPPED"):
            _report(client, run_id, workflow, steps, address)
            return SUCCEEDED
        if state in _ENDED_BADLY:
            if terminated:
                print(f"error: the run was terminated; see {address}", file=sys.stderr)
                return TERMINATED
            _report(client, run_id, workflow, steps, address)
            _explain(client, run, workflow, steps.values(), address)
            return FAILED
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def display_names(specification: Mapping[str, Any]) -> dict[str, str]:
    """The names that the UI shows for the tasks of a compiled pipeline, by task."""
    parts = [specification["root"], *specification["components"].values()]
    return {
        task: description["taskInfo"]["name"]
        for part in parts
        for task, description in part.get("dag", {}).get("tasks", {}).items()
    }


def steps_of(
    workflow: Workflow, names: Mapping[str, str], models: Sequence[str]
) -> dict[tuple[str, ...], Step]:
    """The steps of an Argo workflow that have begun, in their order, by the path of tasks to each.

    A step has two templates: the driver, which looks up its inputs and the cache, and the executor, which
    runs its container. The drivers of the graph and of the loop count as steps if they fail.
    """
    found: dict[tuple[str, ...], dict[str, list[Node]]] = {}
    nodes = (workflow.get("status") or {}).get("nodes") or {}
    for node in sorted(nodes.values(), key=lambda node: (node.get("startedAt") or "", node["name"])):
        template = node.get("templateName") or ""
        part = next((part for suffix, part in _TEMPLATES.items() if template.endswith(suffix)), None)
        if part is None:
            continue
        path = _path(node["name"])
        if part == "executor":
            path = path[:-1]  # its task has the same name in every step
        elif part.endswith("driver"):
            path = (*path[:-1], path[-1].removesuffix("-driver"))
        parts = found.setdefault(path, {})
        if node["type"] == "Pod":
            parts.setdefault(f"{part} pods", []).append(node)
        if not _ATTEMPT.search(node["name"]):  # Argo wraps the attempts of a step in a node of its own
            parts.setdefault(part, []).append(node)
    steps = {path: _step(workflow, path, parts, names, models) for path, parts in found.items()}
    return {path: step for path, step in steps.items() if step is not None}


_TEMPLATES = {
    "system-container-driver": "driver",
    "system-dag-driver": "dag driver",
    "system-container-executor": "step",
    "system-container-impl": "executor",
    "system-importer": "importer",
}
_ATTEMPT = re.compile(r"\(\d+\)$")
_ITERATION = re.compile(r"\((\d+):.*?\)")


def _path(node_name: str) -> tuple[str, ...]:
    """The tasks from the graph's root to a node; an iteration keeps its index, as in `name(2)`."""
    parts = []
    for part in node_name.split(".")[1:]:
        index = _ITERATION.search(part)
        parts.append(part.partition("(")[0] + (f"({index[1]})" if index else ""))
    return tuple(parts)


def _step(
    workflow: Workflow,
    path: tuple[str, ...],
    parts: Mapping[str, Sequence[Node]],
    names: Mapping[str, str],
    models: Sequence[str],
) -> Step | None:
    """One step, from its nodes; None while there is nothing to report."""
    name = _name(path, names, models)

    def failed(node: Node, pods: Sequence[Node], attempt: int) -> Step:
        pod = _pod(workflow, pods[-1]) if pods else ""
        message = _message(*reversed(pods), node)
        return Step(name, "failed", attempt, message, pod, node.get("finishedAt") or "")

    for part in ("driver", "dag driver"):
        for driver in parts.get(part, ()):
            if driver.get("phase") in _BAD:
                return failed(driver, parts.get(f"{part} pods", ()), 0)
    whole = next((parts[part][-1] for part in ("step", "importer") if part in parts), None)
    if whole is None:
        return None
    pods = parts.get("executor pods") or parts.get("importer pods") or ()
    pod = _pod(workflow, pods[-1]) if pods else ""
    if whole.get("phase") == "Succeeded":
        return Step(name, "succeeded" if pods else "cached", len(pods), pod=pod)
    if whole.get("phase") in _BAD:
        return failed(whole, pods, len(pods))
    if not pods:
        return None  # not due yet, or skipped
    if pods[-1].get("phase") == "Pending":
        message = _message(pods[-1])
        usual = message in ("", "ContainerCreating", "PodInitializing")
        return None if usual else Step(name, "waiting", len(pods), message, pod)
    return Step(name, "running", len(pods), _message(*pods[-2:-1]), pod)


_BAD = ("Failed", "Error")


def _name(path: tuple[str, ...], names: Mapping[str, str], models: Sequence[str]) -> str:
    """A step's name in the UI, with its model; for the drivers of pipeline and loop, theirs."""
    own = [part for part in path if not part.startswith("iteration")]
    name = names.get(own[-1], own[-1]) if own and own[-1] != "root" else "the pipeline"
    indices = [int(part.partition("(")[2].rstrip(")")) for part in path if "(" in part]
    if not indices:
        return name
    return f"{name} ({models[indices[0]] if indices[0] < len(models) else indices[0]})"


def _pod(workflow: Workflow, node: Node) -> str:
    """A pod's name as Argo builds it: workflow, template, and the hash at the end of the node's id."""
    return f"{workflow['metadata']['name']}-{node['templateName']}-{node['id'].rpartition('-')[2]}"


def _message(*nodes: Node) -> str:
    return next((node["message"] for node in nodes if node.get("message")), "")


def _in_words(step: Step, terminated: bool) -> str:
    if step.state == "waiting":
        return f"waits: {step.message.partition('. ')[0][:_MESSAGE_CHARACTERS]}"
    if step.state == "running" and step.attempt > 1:
        return f"started again, attempt {step.attempt}" + (f" ({step.message})" if step.message else "")
    if step.state == "failed":
        return "was stopped" if terminated else "failed" if step.attempt else "failed before its start"
    return {"running": "started", "cached": "succeeded, from the cache"}.get(step.state, step.state)


def _is_terminated(run: V2beta1Run, workflow: Workflow) -> bool:
    """Whether a person ended the run: Kubeflow then sets the workflow's deadline to zero."""
    states = [run.state, *(status.state for status in run.state_history or ())]
    deadline = (workflow.get("spec") or {}).get("activeDeadlineSeconds")
    return deadline == 0 or any(state in ("CANCELING", "CANCELED") for state in states)


# ---------------------------------------------------------------------- what a run came to


def _report(
    client: Api, run_id: str, workflow: Workflow, steps: Mapping[tuple[str, ...], Step], address: str
) -> None:
    """Print the outcome from the last steps' logs: figures, choice, warnings, places.

    In a sweep the comparison's log covers the evaluations. Kubeflow may have no log of a pod that succeeded.
    """
    said_by: dict[str, list[str]] = {}
    logs = []
    for path, step in steps.items():
        if path and path[-1] in _SPEAKERS and step.pod:
            logs.append(_log(client, run_id, workflow, step.pod, address))
            said_by.setdefault(path[-1], []).extend(outcome(logs[-1]))
    if logs and not any(logs):
        print(f"what the run came to is in its steps' logs, which are not available here; see {address}")
    if said_by.get("compare-models"):
        said_by.pop("evaluate-model", None)
    for line in dict.fromkeys(line for name in _SPEAKERS for line in said_by.get(name, ())):
        print(line)


_SPEAKERS = ("evaluate-model", "compare-models", "register-model")


# ---------------------------------------------------------------------- why a run failed


def _explain(client: Api, run: V2beta1Run, workflow: Workflow, steps: Iterable[Step], address: str) -> None:
    """Print what failed and why: the end of the first failed step's log, then a sentence for each step."""
    failed = sorted((step for step in steps if step.state == "failed"), key=lambda step: step.ended)
    logs = [_log(client, run.run_id, workflow, step.pod, address) if step.pod else [] for step in failed]
    shown = [line for line in next(filter(None, logs), []) if not outcome([line])]
    for line in shown[-_SHOWN_LINES:]:
        print(f"    {line}", file=sys.stderr)
    for step, log in zip(failed, logs, strict=True):
        print(f"error: {step.name} {_in_words(step, False)}: {_reason(log, step.message)}", file=sys.stderr)
    if not failed:
        status = workflow.get("status") or {}
        message = (run.error.message if run.error else "") or status.get("message") or "no step says why"
        print(f"error: the run failed: {message}", file=sys.stderr)
    print(f"error: the run failed; see {address}", file=sys.stderr)


def _reason(log: Sequence[str], message: str) -> str:
    """Why a step failed: a stage's own sentence, Kubernetes' message, or the last line printed."""
    said = refusal(log)
    if said:
        return said
    exited = _EXIT_STATUS.match(message)
    if message and not exited:  # killed for memory, no image …
        return message
    if exited and exited[1] in ("137", "143"):  # of SIGKILL and SIGTERM
        return f"its pod was ended from outside, as by a deletion or an eviction (exit code {exited[1]})"
    if not log:
        return f"{message or 'no reason is given'}; its log is not available here"
    return next((line for line in reversed(log) if _RAISED.match(line)), log[-1])


_EXIT_STATUS = re.compile(r"^(?:main: )?Error \(exit code (\d+)\)")
_RAISED = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b")
# lines of KFP's launcher and driver, the driver's prefix of an error, the lines after a step's own
_GO = re.compile(r"^([IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ [\w.-]+:\d+\] ")
_DRIVER = re.compile(r"^KFP driver: driver\.\w+\(.*\) failed: ")
_EXITED = re.compile(r"(Error|.*failed to execute.*): (exit status \d+|signal: [\w ]+)$")
_ARGO = re.compile(r'^(time=|\{").*\bargo"?[=:] ?true')


def _log(client: Api, run_id: str, workflow: Workflow, pod: str, address: str) -> list[str]:
    """A step's output, without Kubeflow's and Argo's own lines; empty if there is no log.

    Both the API and the UI serve logs, those of succeeded pods only from an archive. The endpoint may be
    either; `address` is the UI's.
    """
    import kfp_server_api
    import urllib3

    namespace = workflow["metadata"].get("namespace", "")
    of_pod = [("podname", pod), ("runid", run_id), ("podnamespace", namespace)]
    for path, query, host in (
        (f"/apis/v1alpha1/runs/{run_id}/nodes/{pod}/log", [], None),
        ("/k8s/pod/logs", of_pod, None),
        ("/k8s/pod/logs", of_pod, address.partition("/#")[0]),
    ):
        with contextlib.suppress(kfp_server_api.ApiException, urllib3.exceptions.HTTPError):
            text = client.get_text(path, query, host)
            if text and not text.startswith(("<!", '{"error')):  # a page, or a refusal with status 200
                return _own_lines(text)
    return []


def _own_lines(text: str) -> list[str]:
    """The lines that a step printed itself, and errors of KFP about it."""
    lines, theirs = [], False
    for line in plain_lines(text):
        go = _GO.match(line)
        if _ARGO.match(line) or line.startswith("[KFP Executor ") or (go and go[1] in "IW"):
            theirs = True
        elif not (theirs and line[0] in " {}"):  # else a continuation of theirs: JSON over many lines
            theirs = False
            lines.append(_DRIVER.sub("", _GO.sub("", line)))
    return [line for line in lines if not _EXITED.match(line)]


def _workflow(client: Api, run_id: str) -> Workflow:
    """The run's Argo workflow as last reported; empty where the API does not give it."""
    import kfp_server_api

    try:
        run = json.loads(client.get_text(f"/apis/v1beta1/runs/{run_id}"))
        workflow: Workflow = json.loads(run["pipeline_runtime"]["workflow_manifest"])
        if (status := workflow["status"]) and (packed := status.get("compressedNodes")):
            status["nodes"] = json.loads(gzip.decompress(base64.b64decode(packed)))
        return workflow
    except (ValueError, KeyError, TypeError, OSError):
        return {}
    except kfp_server_api.ApiException as error:
        if error.status in (502, 503, 504):  # the API is away
            raise
        return {}


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {what}", flush=True)
