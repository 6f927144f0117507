"""A cluster's API for the tests: takes TrainJobs over HTTP, checks them by the recorded schema, runs them.

It does what Kubeflow Trainer and a kubelet would do with them, as far as a training step can tell: a node is
a process with the command and the variables of the specification, and those of the torch policy. Nothing
isolates it.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import jsonschema
from werkzeug import Response

from tests.served import free_port, refuse, routes, served

RECORDED = json.loads((Path(__file__).parent / "trainjob_schema.json").read_text())
NAMESPACE = "softpref"
CREATED = "2026-01-01T00:00:00Z"
RUNTIME = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "ClusterTrainingRuntime",
    "metadata": {"name": "torch-distributed", "labels": {"trainer.kubeflow.org/framework": "torch"}},
    "spec": {
        "mlPolicy": {"numNodes": 1, "torch": {}},
        "template": {
            "spec": {
                "replicatedJobs": [
                    {
                        "name": "node",
                        "template": {
                            "metadata": {
                                "labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
                            },
                            "spec": {
                                "template": {"spec": {"containers": [{"name": "node", "image": "torch:1"}]}}
                            },
                        },
                    }
                ]
            }
        },
    },
}


def strict(schema):
    """The schema as an API server with strict field validation reads it: what it does not name is refused."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
        if "apiVersion" in schema["properties"]:  # the schema leaves an object's metadata to the API server
            made["properties"]["metadata"] = {"type": "object"}
    return made


SCHEMA = strict(RECORDED["schema"])


class Cluster:
    """Runs until `close`. `jobs` are the TrainJobs that are there, `calls` every request as `METHOD path`."""

    def __init__(self, folder):
        self.folder, self.jobs, self.calls, self.posted, self.patched = folder, {}, [], [], []
        self.node_environment, self.held = {}, False  # held: a queue keeps nodes from starting
        # what to run for a node's command with its variables: by itself the same, by this Python
        self.started_as = lambda command, variables: [sys.executable, *command[1:]]
        api, core = f"/apis/{RECORDED['api_version']}", f"/api/v1/namespaces/{NAMESPACE}"
        jobs = f"{api}/namespaces/{NAMESPACE}/trainjobs"
        runtime = f"{api}/clustertrainingruntimes/{RUNTIME['metadata']['name']}"
        self._call = routes(
            {
                ("POST", jobs): self._create,
                ("GET", f"{jobs}/<name>"): lambda request, name: self.job(name),
                ("PATCH", f"{jobs}/<name>"): self._patch,
                ("DELETE", f"{jobs}/<name>"): self._delete,
                ("GET", runtime): lambda request: RUNTIME,
                ("GET", f"{core}/pods"): self._pods,
                ("GET", f"{core}/pods/<pod>/log"): self._log,
                ("GET", f"{core}/events"): lambda request: {"kind": "EventList", "metadata": {}, "items": []},
            }
        )
        self._open = ExitStack()
        self.url = self._open.enter_context(served(self._answer))

    def kubeconfig(self):
        """A file for `KUBECONFIG`."""
        file = self.folder / "kubeconfig"
        context = {"cluster": "test", "user": "test", "namespace": NAMESPACE}
        file.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "test",
                    "clusters": [{"name": "test", "cluster": {"server": self.url}}],
                    "users": [{"name": "test", "user": {"token": "x"}}],
                    "contexts": [{"name": "test", "context": context}],
                }
            )
        )
        return str(file)

    def close(self):
        for name in list(self.jobs):
            self.delete(name)
        self._open.close()

    # ------------------------------------------------------------------ what controllers do

    def create(self, body):
        jsonschema.validate(body, SCHEMA)
        name, trainer = body["metadata"]["name"], body["spec"]["trainer"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name), name
        assert len(name) <= 50, name  # pods are NAME-node-0-0-xxxxx, hosts NAME-node-0-0.NAME
        body["metadata"] |= {"namespace": NAMESPACE, "creationTimestamp": CREATED}
        self.jobs[name] = {"body": body, "nodes": [], "pods": f"x{len(self.posted)}"}
        port = free_port()
        given = {each["name"]: each["value"] for each in trainer.get("env", [])}
        for rank in range(0 if self.held else trainer["numNodes"]):
            policy = {
                "PET_NNODES": str(trainer["numNodes"]),
                "PET_NPROC_PER_NODE": "auto",
                "PET_NODE_RANK": str(rank),
                "PET_MASTER_ADDR": "127.0.0.1",  # a cluster gives the name of the first pod
                "PET_MASTER_PORT": str(port),
            }
            log = self.folder / f"{name}-{rank}-{len(self.posted)}.log"
            process = subprocess.Popen(
                self.started_as(trainer["command"], given | policy),
                stdout=log.open("wb"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    **os.environ,
                    **given,
                    **self.node_environment,
                    **policy,
                    "HOME": os.environ["HOME"],
                },
            )
            self.jobs[name]["nodes"].append((process, log))
        self.posted.append(body)
        return body

    def delete(self, name):
        for process, _ in self.jobs.pop(name)["nodes"]:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def job(self, name):
        if name not in self.jobs:
            refuse(404, f"trainjob {name} not found")
        body = self.jobs[name]["body"]
        states = [self._phase(process) for process, _ in self.jobs[name]["nodes"]]
        done = "Failed" if "Failed" in states else "Complete" if set(states) == {"Succeeded"} else ""
        if done:
            condition = {
                "type": done,
                "status": "True",
                "reason": "JobsEnded",
                "message": "",
                "lastTransitionTime": CREATED,
            }
            return {**body, "status": {"conditions": [condition]}}
        return body

    def pods(self, name):
        items = []
        job = self.jobs.get(name, {"nodes": [], "pods": ""})
        for rank, (process, _) in enumerate(job["nodes"]):
            labels = {
                "jobset.sigs.k8s.io/jobset-name": name,
                "jobset.sigs.k8s.io/replicatedjob-name": "node",
                "batch.kubernetes.io/job-completion-index": str(rank),
            }
            metadata = {
                "name": f"{name}-node-0-{rank}-{job['pods']}",
                "labels": labels,
                "creationTimestamp": CREATED,
            }
            items.append(
                {
                    "metadata": metadata,
                    "spec": {"containers": [{"name": "node", "image": "torch:1"}]},
                    "status": {"phase": self._phase(process)},
                }
            )
        return {"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": items}

    @staticmethod
    def _phase(process):
        status = process.poll()
        return "Running" if status is None else "Failed" if status else "Succeeded"

    # ------------------------------------------------------------------ the API

    def _answer(self, request):
        self.calls.append(f"{request.method} {request.full_path}")
        return self._call(request)

    def _create(self, request):
        try:
            return Response(json.dumps(self.create(request.json)), 201, mimetype="application/json")
        except (AssertionError, jsonschema.ValidationError) as error:
            refuse(422, str(error))

    def _patch(self, request, name):
        self.patched.append(request.get_json(force=True))
        return self.job(name)

    def _delete(self, request, name):
        self.job(name)
        self.delete(name)
        return {"kind": "Status", "status": "Success"}

    def _pods(self, request):
        return self.pods(re.search("jobset-name=([^,]+)", request.args["labelSelector"])[1])

    def _log(self, request, pod):
        name, rank = re.fullmatch(r"(.+)-node-0-(\d+)-x\d+", pod).groups()
        process, file = self.jobs[name]["nodes"][int(rank)]

        def lines():
            with file.open("rb") as stream:
                while True:
                    ended = process.poll() is not None
                    yield stream.read()
                    if ended or "follow" not in request.args:
                        return
                    time.sleep(0.05)

        return Response(lines(), mimetype="text/plain")
