"""Waits for a run of Kubeflow Pipelines: says what its steps do, and why one failed. Starts and ends nothing.

What steps do stands in the run's Argo workflow. The API gives it with a run of its older version v1beta1
alone: in v2beta1 a step has neither its pod's name nor a message. Where a cluster does not give it, the
states of the run are all that is said.
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
from pathlib import Path
from typing import Any, NamedTuple

from softpref.pipelines.screen import outcome, plain_lines, refusal

SUCCEEDED, FAILED = 0, 1  # exit statuses
TERMINATED = 130  # as of a program that a person interrupted
_SECONDS_BETWEEN_LOOKS = 10.0
_FAILED_LOOKS = 60  # one after the other, until waiting is given up
_MESSAGE_CHARACTERS = 200
_SHOWN_LINES = 20


class Step(NamedTuple):
    """A step as it is seen at one moment.

    Attributes:
        name: as the UI shows it; in the loop with its model.
        state: `waiting` for a node or an image, `running`, `succeeded`, `cached` (not run again), `failed`.
        attempt: 1 for the first; 0 when the step failed before it could start.
        message: what Kubernetes or Argo says of a step that waits, of the attempt before, or of the failure;
            may be empty.
        pod: whose log tells of the last attempt, or of the driver; empty where there is none.
        ended: when a failed one ended, in ISO 8601.
    """

    name: str
    state: str
    attempt: int = 1
    message: str = ""
    pod: str = ""
    ended: str = ""


def wait_for(client: Any, run_id: str, address: str, names: Mapping[str, str], models: Sequence[str]) -> int:
    """Until the run has ended: its state as it changes, each step as it begins and ends; the exit status.

    Args:
        client: the `kfp.Client` of a submission, with `get_text`.
        address: of the run in the UI.
        names: display names by task, of `display_names`.
        models: names of the models in the order of the loop.

    Raises:
        ApiException, HTTPError: the API refuses, or has not answered in 60 looks.
    """
    import kfp_server_api
    import urllib3

    state, failures = "", 0
    said: dict[tuple[str, ...], tuple[Any, ...]] = {}
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
            waits_for = step.message.partition(":")[0] if step.state == "waiting" else ""  # the rest varies
            event = (step.state, step.attempt, waits_for)
            if said.get(path) != event:
                said[path] = event
                _say(f"{step.name} {_in_words(step, terminated)}")
        if run.state != state:
            state = run.state
            # Kubeflow 2.17 calls a run that a person ended failed
            _say("terminated" if terminated and state in _ENDED_BADLY else (state or "unknown").lower())
        if state in ("SUCCEEDED", "SKIPPED"):
            _report(client, run_id, workflow, steps, address)
            return SUCCEEDED
        if state in _ENDED_BADLY:
            if terminated:
                print(f"error: the run was terminated; what it did is shown at {address}", file=sys.stderr)
                return TERMINATED
            _report(client, run_id, workflow, steps, address)
            _explain(client, run, workflow, steps.values(), address)
            return FAILED
        time.sleep(_SECONDS_BETWEEN_LOOKS)


_ENDED_BADLY = ("FAILED", "CANCELED")


def display_names(package: Path) -> dict[str, str]:
    """The names that the UI shows, by the task's name, of a compiled pipeline."""
    import yaml

    specification = next(yaml.safe_load_all(package.read_text(encoding="utf-8")))
    parts = [specification["root"], *specification["components"].values()]
    return {
        task: description["taskInfo"]["name"]
        for part in parts
        for task, description in part.get("dag", {}).get("tasks", {}).items()
    }


def steps_of(
    workflow: Mapping[str, Any], names: Mapping[str, str], models: Sequence[str]
) -> dict[tuple[str, ...], Step]:
    """The steps of an Argo workflow that have begun, by the tasks that lead to each, in the order of events.

    A step has two templates: the driver, which looks up its inputs and the cache, and the executor, which
    runs its container. The drivers of the graph and of the loop are steps when they fail.
    """
    found: dict[tuple[str, ...], dict[str, list[Mapping[str, Any]]]] = {}
    nodes = (workflow.get("status") or {}).get("nodes") or {}
    for node in sorted(nodes.values(), key=lambda node: (node.get("startedAt") or "", node["name"])):
        template = node.get("templateName") or ""
        part = next((part for suffix, part in _TEMPLATES.items() if template.endswith(suffix)), None)
        if part is None:
            continue
        path = _path(node["name"])
        if part == "executor":
            path = path[:-1]  # it has this name in every step
        elif part.endswith("driver"):
            path = (*path[:-1], path[-1].removesuffix("-driver"))
        parts = found.setdefault(path, {})
        if node["type"] == "Pod":
            parts.setdefault(f"{part} pods", []).append(node)
        if not _ATTEMPT.search(node["name"]):  # Argo wraps what may be tried again into a node of its own
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
    """The tasks from the graph's root to a node of this name; an iteration keeps its index, as `name(2)`."""
    parts = []
    for part in node_name.split(".")[1:]:
        index = _ITERATION.search(part)
        parts.append(part.partition("(")[0] + (f"({index[1]})" if index else ""))
    return tuple(parts)


def _step(
    workflow: Mapping[str, Any],
    path: tuple[str, ...],
    parts: Mapping[str, Sequence[Mapping[str, Any]]],
    names: Mapping[str, str],
    models: Sequence[str],
) -> Step | None:
    """What the nodes of one step say of it, or None while there is nothing to say."""
    name = _name(path, names, models)
    for part in ("driver", "dag driver"):
        for driver in parts.get(part, ()):
            if driver.get("phase") in _BAD:
                pods = parts.get(f"{part} pods", ())
                pod = _pod(workflow, pods[-1]) if pods else ""
                return Step(name, "failed", 0, _message(*reversed(pods), driver), pod, _ended(driver))
    whole = next((parts[part][-1] for part in ("step", "importer") if part in parts), None)
    if whole is None:
        return None
    pods = parts.get("executor pods") or parts.get("importer pods") or ()
    pod = _pod(workflow, pods[-1]) if pods else ""
    if whole.get("phase") == "Succeeded":
        return Step(name, "succeeded" if pods else "cached", len(pods), pod=pod)
    if whole.get("phase") in _BAD:
        return Step(name, "failed", len(pods), _message(*reversed(pods), whole), pod, _ended(whole))
    if not pods:
        return None  # not due yet, or left out
    if pods[-1].get("phase") == "Pending":
        message = _message(pods[-1])
        usual = message in ("", "ContainerCreating", "PodInitializing")
        return None if usual else Step(name, "waiting", len(pods), message, pod)
    return Step(name, "running", len(pods), _message(*pods[-2:-1]), pod)


_BAD = ("Failed", "Error")


def _name(path: tuple[str, ...], names: Mapping[str, str], models: Sequence[str]) -> str:
    """A step's name in the UI, with the model it is for; the pipeline's or the loop's for their drivers."""
    own = [part for part in path if not part.startswith("iteration")]
    name = names.get(own[-1], own[-1]) if own and own[-1] != "root" else "the pipeline"
    indices = [int(part.partition("(")[2].rstrip(")")) for part in path if "(" in part]
    if not indices:
        return name
    return f"{name} ({models[indices[0]] if indices[0] < len(models) else indices[0]})"


def _pod(workflow: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    """A pod's name as Argo makes it: workflow, template, and the hash that ends the node's id."""
    return f"{workflow['metadata']['name']}-{node['templateName']}-{node['id'].rpartition('-')[2]}"


def _message(*nodes: Mapping[str, Any]) -> str:
    return next((node["message"] for node in nodes if node.get("message")), "")


def _ended(node: Mapping[str, Any]) -> str:
    return node.get("finishedAt") or ""


def _in_words(step: Step, terminated: bool) -> str:
    if step.state == "waiting":
        return f"waits: {step.message.partition('. ')[0][:_MESSAGE_CHARACTERS]}"
    if step.state == "running" and step.attempt > 1:
        return f"started again, attempt {step.attempt}" + (f" ({step.message})" if step.message else "")
    if step.state == "failed":
        return "was stopped" if terminated else "failed" if step.attempt else "failed before its start"
    return {"running": "started", "cached": "succeeded, from the cache"}.get(step.state, step.state)


def _is_terminated(run: Any, workflow: Mapping[str, Any]) -> bool:
    """Whether a person ended the run, for which Kubeflow sets the workflow's deadline to zero."""
    states = [run.state, *(status.state for status in run.state_history or ())]
    deadline = (workflow.get("spec") or {}).get("activeDeadlineSeconds")
    return deadline == 0 or any(state in ("CANCELING", "CANCELED") for state in states)


# ---------------------------------------------------------------------- what a run came to


def _report(
    client: Any,
    run_id: str,
    workflow: Mapping[str, Any],
    steps: Mapping[tuple[str, ...], Step],
    address: str,
) -> None:
    """Print what the last steps said of the outcome, if they did: figures, choice, warnings, where it all is.

    Of a sweep, the comparison speaks for the evaluations.
    """
    said_by: dict[str, list[str]] = {}
    for path, step in steps.items():
        if path and path[-1] in _SPEAKERS and step.pod:
            log = _log(client, run_id, workflow, step.pod, address)
            said_by.setdefault(path[-1], []).extend(outcome(log))
    if said_by.get("compare-models"):
        said_by.pop("evaluate-model", None)
    for line in dict.fromkeys(line for name in _SPEAKERS for line in said_by.get(name, ())):
        print(line)


_SPEAKERS = ("evaluate-model", "compare-models", "register-model")


# ---------------------------------------------------------------------- why a run failed


def _explain(client: Any, run: Any, workflow: Mapping[str, Any], steps: Iterable[Step], address: str) -> None:
    """Print what failed and why: the end of the first failed step's log, then a sentence for each."""
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
    print(f"error: the run failed; all of it is shown at {address}", file=sys.stderr)


def _reason(log: Sequence[str], message: str) -> str:
    """Why a step failed: a stage's own sentence, what Kubernetes says of it, or what was printed last."""
    said = refusal(log)
    if said:
        return said
    exited = _EXIT_STATUS.match(message)
    if message and not exited:  # killed for memory, no image …
        return message
    if exited and exited[1] in ("137", "143"):  # of SIGKILL and SIGTERM
        return f"its pod was ended from outside, as by a deletion or an eviction (exit code {exited[1]})"
    if not log:
        return f"{message or 'no reason is given'}; its log is not to be had from here"
    return next((line for line in reversed(log) if _RAISED.match(line)), log[-1])


_EXIT_STATUS = re.compile(r"^(?:main: )?Error \(exit code (\d+)\)")
_RAISED = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b")
# lines of KFP's launcher and driver, the driver's words before what went wrong, what follows a step's own
_GO = re.compile(r"^([IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ [\w.-]+:\d+\] ")
_DRIVER = re.compile(r"^KFP driver: driver\.\w+\(.*\) failed: ")
_EXITED = re.compile(r"(Error|.*failed to execute.*): (exit status \d+|signal: [\w ]+)$")
_ARGO = re.compile(r'^(time=|\{").*\bargo"?[=:] ?true')


def _log(client: Any, run_id: str, workflow: Mapping[str, Any], pod: str, address: str) -> list[str]:
    """What a step printed, without Kubeflow's and Argo's own lines; empty if there is no log.

    The API gives logs, but of what has succeeded only where an archive keeps them, and so does the UI: an
    endpoint may be the one or the other, and `address` is the UI's.
    """
    import kfp_server_api
    import urllib3

    namespace = workflow["metadata"].get("namespace", "")
    of_pod = [("podname", pod), ("runid", run_id), ("podnamespace", namespace)]
    places: list[tuple[Any, ...]] = [
        (f"/apis/v1alpha1/runs/{run_id}/nodes/{pod}/log", []),
        ("/k8s/pod/logs", of_pod),
        ("/k8s/pod/logs", of_pod, address.partition("/#")[0]),
    ]
    for place in places:
        with contextlib.suppress(kfp_server_api.ApiException, urllib3.exceptions.HTTPError):
            text = client.get_text(*place)
            if text and not text.startswith(("<!", '{"error')):  # a page, or a refusal with status 200
                return _own_lines(text)
    return []


def _own_lines(text: str) -> list[str]:
    """The lines that a step wrote itself, or that say what went wrong with it."""
    lines, theirs = [], False
    for line in plain_lines(text):
        go = _GO.match(line)
        if _ARGO.match(line) or line.startswith("[KFP Executor ") or (go and go[1] in "IW"):
            theirs = True
        elif not (theirs and line[0] in " {}"):  # else what they say goes on: JSON over many lines
            theirs = False
            lines.append(_DRIVER.sub("", _GO.sub("", line)))
    return [line for line in lines if not _EXITED.match(line)]


def _workflow(client: Any, run_id: str) -> dict[str, Any]:
    """The run's Argo workflow as the cluster last reported it; empty where the API does not give it."""
    import kfp_server_api

    try:
        run = json.loads(client.get_text(f"/apis/v1beta1/runs/{run_id}"))
        workflow = json.loads(run["pipeline_runtime"]["workflow_manifest"])
        if packed := workflow["status"].get("compressedNodes"):  # of a workflow with many
            workflow["status"]["nodes"] = json.loads(gzip.decompress(base64.b64decode(packed)))
        return workflow
    except (ValueError, KeyError, TypeError, OSError):
        return {}
    except kfp_server_api.ApiException as error:
        if error.status in (502, 503, 504):  # it is away, or on its way back
            raise
        return {}


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {what}", flush=True)
