"""What a run on this machine says at its end of where to look."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@pytest.fixture
def server():
    """An MLflow server that knows one run, "r1", of experiment 7; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path.startswith("/api/2.0/mlflow/runs/get?") and "run_id=r1" in self.path
            info = {"run_id": "r1", "experiment_id": "7", "status": "FINISHED", "artifact_uri": "x"}
            body = json.dumps({"run": {"info": info, "data": {}}} if known else {}).encode()
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments): ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def where_to_look():
    from softpref.tracking import where_to_look

    return where_to_look


def test_a_store_in_a_file_is_shown_by_a_command(where_to_look):
    uri = "sqlite:////data/mlflow.db"
    assert where_to_look(uri, "r1") == f"{uri}; look at it with: mlflow ui --backend-store-uri {uri}"


def test_a_store_in_a_file_that_knows_the_run_is_shown_with_the_page_to_open(where_to_look, tmp_path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    run = client.create_run(client.create_experiment("softpref"))
    page = f"http://127.0.0.1:5000/#/experiments/{run.info.experiment_id}?workflowType=machine_learning"
    assert where_to_look(uri, run.info.run_id).endswith(f"--backend-store-uri {uri}, then open {page}")


def test_a_server_shows_the_runs_experiment_by_itself(where_to_look, server):
    assert where_to_look(server + "/", "r1") == f"{server}/#/experiments/7?workflowType=machine_learning"


@pytest.mark.parametrize("run_id", [None, "another"])
def test_a_server_that_does_not_know_the_run_is_named(where_to_look, server, run_id):
    assert where_to_look(server, run_id) == server
