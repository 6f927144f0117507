"""A Kubeflow Pipelines API for tests: the calls that a submission uses, over HTTP, in memory.

What it answers to, and what it takes and gives, is read from the generated client `kfp_server_api`: a path
that the client's description does not have is not found, a field that a message does not have is refused.
Two calls stand in no description of version 2, and are as the API server of 2.17 answers them: a run's Argo
workflow (v1beta1), and the log of a pod (v1alpha1, or the UI's).
"""

from __future__ import annotations

import inspect
import json
import re
import uuid
import zlib

import kfp_server_api as api
import yaml

from tests.served import refuse, routes, served

_SERVICES = (
    api.ExperimentServiceApi,
    api.HealthzServiceApi,
    api.PipelineServiceApi,
    api.PipelineUploadServiceApi,
    api.RunServiceApi,
)


def described_calls() -> set[tuple[str, str]]:
    """Method and path template of every call in the client's description."""
    found = set()
    for service in _SERVICES:
        found |= {
            (method, path)
            for path, method in re.findall(
                r"'(/apis/v2beta1/[^']*)',\s*'([A-Z]+)'", inspect.getsource(service)
            )
        }
    return found


class PipelinesApi:
    """The server. `url` is its endpoint; `pipelines`, `versions`, `experiments` and `runs` what it was given.

    Args:
        multi_user: it serves several users, and wants a namespace; else it refuses one.
        token: a bearer token without which nothing is answered.
        states: the states that a run is in, one for each time it is asked for.
        workflows: its Argo workflow at these times, each a `Workflow.manifest`; without, it is not given.
        logs: what pods printed, by pod.
        ui: the endpoint is the UI's, which passes on what the API describes and gives logs by itself.
    """

    def __init__(
        self, *, multi_user=False, token="", states=("SUCCEEDED",), workflows=(), logs=None, ui=False
    ) -> None:
        self.multi_user, self.token, self.states = multi_user, token, list(states)
        self.workflows, self.logs, self.ui, self.looks = list(workflows), logs or {}, ui, 0
        self.pipelines, self.versions, self.experiments, self.runs = [], [], [], []
        self.failures = 0  # looks at a run that are answered with 503
        self.headers = []
        calls = {
            ("GET", "/apis/v2beta1/healthz"): self.healthz,
            ("GET", "/apis/v2beta1/pipelines"): self.list_pipelines,
            ("POST", "/apis/v2beta1/pipelines"): self.create_pipeline,
            ("POST", "/apis/v2beta1/pipelines/upload_version"): self.upload_version,
            ("GET", "/apis/v2beta1/pipelines/{pipeline_id}/versions"): self.list_versions,
            ("GET", "/apis/v2beta1/experiments"): self.list_experiments,
            ("POST", "/apis/v2beta1/experiments"): self.create_experiment,
            ("POST", "/apis/v2beta1/runs"): self.create_run,
            ("GET", "/apis/v2beta1/runs/{run_id}"): self.get_run,
        }
        assert set(calls) <= described_calls(), "the client's description has no such call"
        calls["GET", "/apis/v1beta1/runs/{run_id}"] = self.get_workflow
        if ui:
            calls["GET", "/k8s/pod/logs"] = self.get_log_of_ui
        else:
            calls["GET", "/apis/v1alpha1/runs/{run_id}/nodes/{pod}/log"] = self.get_log
        self._call = routes(
            {(way, re.sub(r"\{(\w+)\}", r"<\1>", path)): one for (way, path), one in calls.items()}
        )

    def __enter__(self):
        self._served = served(self._answer)
        self.url = self._served.__enter__()
        return self

    def __exit__(self, *error):
        self._served.__exit__(*error)

    def _answer(self, request):
        self.headers.append(request.headers)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            refuse(401, "who are you?")
        return api.ApiClient().sanitize_for_serialization(self._call(request))

    # ------------------------------------------------------------------ the calls

    def healthz(self, request):
        return api.V2beta1GetHealthzResponse(multi_user=self.multi_user)

    def list_pipelines(self, request):
        self._check_namespace(request.args.get("namespace"))
        found = _found(self.pipelines, request.args)
        return api.V2beta1ListPipelinesResponse(pipelines=found or None, total_size=len(found))

    def create_pipeline(self, request):
        pipeline = _message(api.V2beta1Pipeline, request.json)
        self._check_namespace(pipeline.namespace)
        there = {(one.namespace, one.display_name) for one in self.pipelines}
        if (pipeline.namespace, pipeline.display_name) in there:
            refuse(409, f"a pipeline {pipeline.display_name} exists")
        pipeline.pipeline_id = _id()
        self.pipelines.append(pipeline)
        return pipeline

    def upload_version(self, request):
        if request.args["pipelineid"] not in [one.pipeline_id for one in self.pipelines]:
            refuse(404, "no such pipeline")
        package = request.files["uploadfile"].read()
        return self._add_version(
            request.args["pipelineid"], request.args["name"], package, request.args.get("description")
        )

    def list_versions(self, request, pipeline_id):
        found = [one for one in self.versions if one.pipeline_id == pipeline_id]
        size, start = int(request.args["page_size"]), int(request.args.get("page_token") or 0)
        following = str(start + size) if start + size < len(found) else None
        return api.V2beta1ListPipelineVersionsResponse(
            pipeline_versions=found[start : start + size], next_page_token=following
        )

    def list_experiments(self, request):
        self._check_namespace(request.args.get("namespace"))
        found = _found(self.experiments, request.args)
        return api.V2beta1ListExperimentsResponse(experiments=found or None)

    def create_experiment(self, request):
        experiment = _message(api.V2beta1Experiment, request.json)
        self._check_namespace(experiment.namespace)
        experiment.experiment_id = _id()
        self.experiments.append(experiment)
        return experiment

    def create_run(self, request):
        run = _message(api.V2beta1Run, request.json)
        if run.experiment_id not in [one.experiment_id for one in self.experiments]:
            refuse(404, "no such experiment")
        reference = _message(api.V2beta1PipelineVersionReference, request.json["pipeline_version_reference"])
        version = [one for one in self.versions if one.pipeline_version_id == reference.pipeline_version_id]
        if not version or version[0].pipeline_id != reference.pipeline_id:
            refuse(404, "no such version")
        inputs = version[0].pipeline_spec["root"]["inputDefinitions"]["parameters"]
        if unknown := set(request.json["runtime_config"]["parameters"]) - set(inputs):
            refuse(400, f"the pipeline has no parameters {sorted(unknown)}")
        run.run_id = _id()
        self.runs.append(run)
        return run

    def get_run(self, request, run_id):
        if self.failures:
            self.failures -= 1
            refuse(503, "later")
        state = self.states[min(self.looks, len(self.states) - 1)]
        self.looks += 1
        failed = state == "FAILED"
        return api.V2beta1Run(
            run_id=run_id,
            state=state,
            state_history=[
                api.V2beta1RuntimeStatus(state=one) for one in dict.fromkeys(self.states[: self.looks])
            ],
            error=api.GoogleRpcStatus(code=2, message="a task failed") if failed else None,
        )

    def get_workflow(self, request, run_id):
        if not self.workflows:
            refuse(404, "not here")
        manifest = json.dumps(self.workflows[min(self.looks, len(self.workflows)) - 1])
        return {"run": {"id": run_id}, "pipeline_runtime": {"workflow_manifest": manifest}}

    def get_log(self, request, run_id, pod):
        # a log that is not there comes with status 200: the answer has begun when that turns out
        return self.logs.get(pod) or json.dumps({"error_message": "no log", "error_details": f"pod {pod}"})

    def get_log_of_ui(self, request):
        if request.args["podnamespace"] != NAMESPACE or request.args["podname"] not in self.logs:
            refuse(500, "Could not get main container logs")
        return self.logs[request.args["podname"]]

    # ------------------------------------------------------------------ what they share

    def _add_version(self, pipeline_id, name, package, description):
        spec = next(yaml.safe_load_all(package))
        version = api.V2beta1PipelineVersion(
            pipeline_id=pipeline_id,
            pipeline_version_id=_id(),
            display_name=name,
            description=description,
            pipeline_spec=spec,
        )
        self.versions.append(version)
        return version

    def _check_namespace(self, namespace):
        if bool(namespace) != self.multi_user:
            refuse(400, "a namespace must be given exactly where several users are served")


NAMESPACE = "team"


class Workflow:
    """An Argo workflow as KFP 2.17 makes and reports it, in `manifest`.

    Args:
        wrapped: whether the cluster's defaults give every template a retry strategy, as KFP's manifests do:
            Argo then wraps each node into another, and the inner names end with the attempt's number.
        deadline: `activeDeadlineSeconds`; the API sets 0 when a person terminates the run.
    """

    name = "spo-sweep-x7k2p"

    def __init__(self, *, wrapped=True, deadline=None) -> None:
        self._wrapped, self._nodes = wrapped, {}
        self._root = f"{self.name}(0).root" if wrapped else f"{self.name}.root"
        self._add(self.name, "entrypoint", "DAG", "Running")
        self._add(self._root, "root", "DAG", "Running")
        self.manifest = {
            "metadata": {"name": self.name, "namespace": NAMESPACE},
            "spec": {} if deadline is None else {"activeDeadlineSeconds": deadline},
            "status": {"phase": "Running", "nodes": self._nodes},
        }

    def step(self, path, phase, *attempts):
        """A task, such as `plan-sweep`, in this phase; its pods' phases, with their message after a colon.

        Without attempts it is taken from the cache, or has not begun.
        """
        full = self._full(path)
        self.driver(path, "Succeeded")
        inner = self._add(full, "retry-system-container-executor", "DAG", phase)
        template = "retry-system-container-impl"
        if not attempts:
            if phase == "Succeeded":
                self._node(f"{inner}.executor", template, "Skipped", "Skipped")
            return self
        if self._wrapped:
            self._node(f"{inner}.executor", template, "Retry", phase)
        for number, attempt in enumerate(attempts):
            name = f"{inner}.executor" + (f"({number})" if self._wrapped else "")
            self._node(name, template, "Pod", *attempt.split(":", 1))
        return self

    def driver(self, path, phase, message="", template="system-container-driver"):
        """The driver of a task, which looks up its inputs; of the graph or the loop with another template."""
        self._add(f"{self._full(path)}-driver", template, "Pod", phase, message)
        return self

    def pod(self, path, attempt=0):
        """The name of the pod of a step's attempt."""
        one = f"({attempt})" if self._wrapped else ""
        wrapper = "(0)" if self._wrapped else ""
        return (
            f"{self.name}-retry-system-container-impl-{_hash(f'{self._full(path)}{wrapper}.executor{one}')}"
        )

    def driver_pod(self, path, template="system-container-driver"):
        wrapper = "(0)" if self._wrapped else ""
        return f"{self.name}-{template}-{_hash(f'{self._full(path)}-driver{wrapper}')}"

    def _full(self, path):
        joint = "(0)." if self._wrapped else "."
        return joint.join([self._root, *path.split(".")])

    def _add(self, name, template, kind, phase, message=""):
        """A node of a template, in a wrapper where there are any; returns the inner one's name."""
        if not self._wrapped:
            return self._node(name, template, kind, phase, message)
        self._node(name, template, "Retry", phase, message)
        return self._node(f"{name}(0)", template, kind, phase, message)

    def _node(self, name, template, kind, phase, message=""):
        number = len(self._nodes)
        identity = self.name if name == self.name else f"{self.name}-{_hash(name)}"
        self._nodes[identity] = {
            "id": identity,
            "name": name,
            "displayName": name.rpartition(".")[2],
            "type": kind,
            "templateName": template,
            "phase": phase,
            "startedAt": f"2026-01-01T10:{number:02}:00Z",
            "finishedAt": f"2026-01-01T10:{number:02}:30Z" if phase in ("Succeeded", "Failed") else None,
            **({"message": message} if message else {}),
        }
        return name


def _hash(name):
    return zlib.crc32(name.encode())


def _message(kind, body):
    """A message of the client's description from JSON; unknown fields are refused."""
    names = {field: attribute for attribute, field in kind.attribute_map.items()}
    if unknown := set(body) - set(names):
        refuse(400, f"{kind.__name__} has no field {sorted(unknown)}")
    return kind(**{names[field]: value for field, value in body.items()})


def _found(things, query):
    """Those of the query's namespace that its filter takes."""
    here = [one for one in things if (one.namespace or "") == query.get("namespace", "")]
    return [one for one in here if one.display_name in _named(query, one.display_name)]


def _named(query, default):
    """The display names that a list's filter asks for."""
    if not query.get("filter"):
        return [default]
    predicates = json.loads(query["filter"])["predicates"]
    assert all(one["key"] in ("display_name", "name") for one in predicates)
    return [one.get("stringValue", one.get("string_value")) for one in predicates]


def _id():
    return str(uuid.uuid4())
