"""A cluster's API for the tests: takes TrainJobs over HTTP, checks them by the recorded schema, runs them.

It does what Kubeflow Trainer and a kubelet would do with them, as far as a training step can tell: a node is
a process with the command and the variables of the specification, and those of the torch policy. Nothing
isolates it.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import jsonschema

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
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

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
        self._server.shutdown()
        self._server.server_close()

    # ------------------------------------------------------------------ what controllers do

    def create(self, body):
        jsonschema.validate(body, SCHEMA)
        name, trainer = body["metadata"]["name"], body["spec"]["trainer"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name), name
        assert len(name) <= 50, name  # pods are NAME-node-0-0-xxxxx, hosts NAME-node-0-0.NAME
        body["metadata"] |= {"namespace": NAMESPACE, "creationTimestamp": CREATED}
        self.jobs[name] = {"body": body, "nodes": []}
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
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
        for rank, (process, _) in enumerate(self.jobs.get(name, {"nodes": []})["nodes"]):
            labels = {
                "jobset.sigs.k8s.io/jobset-name": name,
                "jobset.sigs.k8s.io/replicatedjob-name": "node",
                "batch.kubernetes.io/job-completion-index": str(rank),
            }
            metadata = {"name": f"{name}-node-0-{rank}-x", "labels": labels, "creationTimestamp": CREATED}
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

    def _handler(cluster):
        jobs = f"/apis/{RECORDED['api_version']}/namespaces/{NAMESPACE}/trainjobs"
        pods = f"/api/v1/namespaces/{NAMESPACE}/pods"

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments): ...

            def answer(self, status, body):
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def none(self):
                self.answer(404, {"kind": "Status", "message": f"{self.path} not found", "code": 404})

            def body(self):
                return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

            def path_and_query(self):
                cluster.calls.append(f"{self.command} {self.path}")
                parts = urlsplit(self.path)
                return parts.path, {key: value[0] for key, value in parse_qs(parts.query).items()}

            def do_GET(self):
                path, query = self.path_and_query()
                name = path.rpartition("/")[2]
                if path == f"{jobs}/{name}" and name in cluster.jobs:
                    self.answer(200, cluster.job(name))
                elif path == f"/apis/{RECORDED['api_version']}/clustertrainingruntimes/{name}":
                    self.answer(200, RUNTIME) if name == RUNTIME["metadata"]["name"] else self.none()
                elif path == pods:
                    self.answer(
                        200, cluster.pods(re.search("jobset-name=([^,]+)", query["labelSelector"])[1])
                    )
                elif path.startswith(pods) and path.endswith("/log"):
                    self.log(path.split("/")[-2], "follow" in query)
                elif path == f"/api/v1/namespaces/{NAMESPACE}/events":
                    self.answer(200, {"apiVersion": "v1", "kind": "EventList", "metadata": {}, "items": []})
                else:
                    self.none()

            def do_POST(self):
                path, _ = self.path_and_query()
                try:
                    assert path == jobs, path
                    self.answer(201, cluster.create(self.body()))
                except (AssertionError, jsonschema.ValidationError) as error:
                    self.answer(422, {"kind": "Status", "message": str(error), "code": 422})

            def do_PATCH(self):
                path, _ = self.path_and_query()
                name = path.rpartition("/")[2]
                cluster.patched.append(self.body())
                self.answer(200, cluster.job(name)) if name in cluster.jobs else self.none()

            def do_DELETE(self):
                path, _ = self.path_and_query()
                name = path.rpartition("/")[2]
                if name not in cluster.jobs:
                    return self.none()
                cluster.delete(name)
                self.answer(200, {"kind": "Status", "status": "Success"})

            def log(self, pod, follow):
                name, rank = re.fullmatch(r"(.+)-node-0-(\d+)-x", pod).groups()
                process, file = cluster.jobs[name]["nodes"][int(rank)]
                self.send_response(200)
                self.send_header("Content-Type", "text/plain")
                self.end_headers()
                with file.open("rb") as stream:
                    while True:
                        ended = process.poll() is not None
                        self.wfile.write(stream.read())
                        self.wfile.flush()
                        if ended or not follow:
                            return
                        time.sleep(0.05)

        return Handler
