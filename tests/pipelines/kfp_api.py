"""A Kubeflow Pipelines API for tests: the calls that a submission uses, over HTTP, in memory.

What it answers to, and what it takes and gives, is read from the generated client `kfp_server_api`: a path
that the client's description does not have is not found, a field that a message does not have is refused.
"""

from __future__ import annotations

import inspect
import json
import re
import threading
import uuid
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import kfp_server_api as api
import yaml

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


class Refusal(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class PipelinesApi:
    """The server. `url` is its endpoint; `pipelines`, `versions`, `experiments` and `runs` what it was given.

    Args:
        multi_user: it serves several users, and wants a namespace; else it refuses one.
        token: a bearer token without which nothing is answered.
        states: the states that a run is in, one for each time it is asked for.
    """

    def __init__(self, *, multi_user=False, token="", states=("SUCCEEDED",)) -> None:
        self.multi_user, self.token, self.states = multi_user, token, list(states)
        self.pipelines, self.versions, self.experiments, self.runs = [], [], [], []
        self.failures = 0  # looks at a run that are answered with 503
        self.headers = []
        calls = {
            ("GET", "/apis/v2beta1/healthz"): self.healthz,
            ("GET", "/apis/v2beta1/pipelines"): self.list_pipelines,
            ("POST", "/apis/v2beta1/pipelines/upload"): self.upload_pipeline,
            ("POST", "/apis/v2beta1/pipelines/upload_version"): self.upload_version,
            ("GET", "/apis/v2beta1/pipelines/{pipeline_id}/versions"): self.list_versions,
            ("GET", "/apis/v2beta1/experiments"): self.list_experiments,
            ("POST", "/apis/v2beta1/experiments"): self.create_experiment,
            ("POST", "/apis/v2beta1/runs"): self.create_run,
            ("GET", "/apis/v2beta1/runs/{run_id}"): self.get_run,
        }
        assert set(calls) <= described_calls(), "the client's description has no such call"
        self._calls = [
            (method, re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/:]+)", path) + "$"), function)
            for (method, path), function in calls.items()
        ]
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    # ------------------------------------------------------------------ the calls

    def healthz(self, query):
        return api.V2beta1GetHealthzResponse(multi_user=self.multi_user)

    def list_pipelines(self, query):
        self._check_namespace(query.get("namespace"))
        found = _found(self.pipelines, query)
        return api.V2beta1ListPipelinesResponse(pipelines=found or None, total_size=len(found))

    def upload_pipeline(self, query, package):
        self._check_namespace(query.get("namespace"))
        there = {(one.namespace, one.display_name) for one in self.pipelines}
        if (query.get("namespace"), query["name"]) in there:
            raise Refusal(409, f"a pipeline {query['name']} exists")
        pipeline = api.V2beta1Pipeline(
            pipeline_id=_id(), display_name=query["name"], namespace=query.get("namespace")
        )
        self.pipelines.append(pipeline)
        self._add_version(pipeline.pipeline_id, query["name"], package)
        return pipeline

    def upload_version(self, query, package):
        if query["pipelineid"] not in [one.pipeline_id for one in self.pipelines]:
            raise Refusal(404, "no such pipeline")
        return self._add_version(query["pipelineid"], query["name"], package)

    def list_versions(self, query, pipeline_id):
        found = [one for one in self.versions if one.pipeline_id == pipeline_id]
        size, start = int(query["page_size"]), int(query.get("page_token") or 0)
        following = str(start + size) if start + size < len(found) else None
        return api.V2beta1ListPipelineVersionsResponse(
            pipeline_versions=found[start : start + size], next_page_token=following
        )

    def list_experiments(self, query):
        self._check_namespace(query.get("namespace"))
        found = _found(self.experiments, query)
        return api.V2beta1ListExperimentsResponse(experiments=found or None)

    def create_experiment(self, query, body):
        experiment = _message(api.V2beta1Experiment, body)
        self._check_namespace(experiment.namespace)
        experiment.experiment_id = _id()
        self.experiments.append(experiment)
        return experiment

    def create_run(self, query, body):
        run = _message(api.V2beta1Run, body)
        if run.experiment_id not in [one.experiment_id for one in self.experiments]:
            raise Refusal(404, "no such experiment")
        reference = _message(api.V2beta1PipelineVersionReference, body["pipeline_version_reference"])
        version = [one for one in self.versions if one.pipeline_version_id == reference.pipeline_version_id]
        if not version or version[0].pipeline_id != reference.pipeline_id:
            raise Refusal(404, "no such version")
        inputs = version[0].pipeline_spec["root"]["inputDefinitions"]["parameters"]
        if unknown := set(body["runtime_config"]["parameters"]) - set(inputs):
            raise Refusal(400, f"the pipeline has no parameters {sorted(unknown)}")
        run.run_id = _id()
        self.runs.append(run)
        return run

    def get_run(self, query, run_id):
        if self.failures:
            self.failures -= 1
            raise Refusal(503, "later")
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        task = api.V2beta1PipelineTaskDetail(display_name="train-policy", state=state)
        failed = state == "FAILED"
        return api.V2beta1Run(
            run_id=run_id,
            state=state,
            error=api.GoogleRpcStatus(code=2, message="a task failed") if failed else None,
            run_details=api.V2beta1RunDetails(task_details=[task]),
        )

    # ------------------------------------------------------------------ what they share

    def _add_version(self, pipeline_id, name, package):
        spec = next(yaml.safe_load_all(package))
        version = api.V2beta1PipelineVersion(
            pipeline_id=pipeline_id, pipeline_version_id=_id(), display_name=name, pipeline_spec=spec
        )
        self.versions.append(version)
        return version

    def _check_namespace(self, namespace):
        if bool(namespace) != self.multi_user:
            raise Refusal(400, "a namespace must be given exactly where several users are served")

    def _handler(api_server):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self._answer("GET")

            def do_POST(self):
                self._answer("POST")

            def _answer(self, method):
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                api_server.headers.append(dict(self.headers))
                try:
                    status, answer = 200, self._call(method, content)
                except Refusal as refusal:
                    status, answer = refusal.status, {"message": str(refusal)}
                body = json.dumps(api.ApiClient().sanitize_for_serialization(answer)).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _call(self, method, content):
                if api_server.token and self.headers.get("Authorization") != f"Bearer {api_server.token}":
                    raise Refusal(401, "who are you?")
                address = urlsplit(self.path)
                query = {key: values[0] for key, values in parse_qs(address.query).items()}
                for expected, pattern, function in api_server._calls:
                    found = pattern.match(address.path)
                    if method == expected and found:
                        given = dict(found.groupdict())
                        if "upload" in address.path:
                            given["package"] = self._uploaded(content)
                        elif method == "POST":
                            given["body"] = json.loads(content)
                        return function(query, **given)
                raise Refusal(404, f"{method} {address.path} is not here")

            def _uploaded(self, content):
                head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
                (part,) = BytesParser().parsebytes(head + content).get_payload()
                assert part.get_param("name", header="content-disposition") == "uploadfile"
                return part.get_payload(decode=True).decode()

            def log_message(self, *arguments): ...

        return Handler


def _message(kind, body):
    """A message of the client's description from JSON; unknown fields are refused."""
    names = {field: attribute for attribute, field in kind.attribute_map.items()}
    if unknown := set(body) - set(names):
        raise Refusal(400, f"{kind.__name__} has no field {sorted(unknown)}")
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
