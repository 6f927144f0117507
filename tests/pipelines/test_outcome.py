"""How a run of a pipeline ended, as its last step finds out; the answers are those of a real KFP 2.17."""

import http.server
import json
import threading

import pytest
from softpref.preflight.stage import outcome
from softpref.tracking import RUN_ID

pytestmark = pytest.mark.fast

TASK = "exit-handler-1"
TERMINATED = [{"state": "RUNNING"}, {"state": "CANCELING"}]


@pytest.fixture
def api(monkeypatch):
    """A function: the address of an API that knows one run."""
    monkeypatch.setenv(RUN_ID, "a-run")
    servers = []

    def serve(history, state):
        # a pod that was deleted has failed, and its step went on in another one
        tasks = [
            {"display_name": TASK, "state": state},
            {"display_name": "executor(0)", "state": "FAILED"},
            {"task_id": "of a step from the cache"},
        ]
        run = {"state": "RUNNING", "state_history": history, "run_details": {"task_details": tasks}}

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                found = self.path == "/apis/v2beta1/runs/a-run"
                self.send_response(200 if found else 404)
                self.end_headers()
                self.wfile.write(json.dumps(run if found else {}).encode())

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("state", "history", "handler", "ended"),
    [
        ("COMPLETE", [], "SUCCEEDED", "FINISHED"),
        ("RUNNING", [], "SUCCEEDED", "FINISHED"),  # the loop ended with a step from the cache
        ("RUNNING", [], "FAILED", "FAILED"),  # a pod was killed before it could say so
        ("FAILED", [], "FAILED", "FAILED"),
        ("RUNNING", TERMINATED, "FAILED", "KILLED"),
        ("FAILED", TERMINATED, "FAILED", "KILLED"),
    ],
)
def test_the_outcome_of_a_run_is_what_its_api_says_of_it(api, state, history, handler, ended):
    assert outcome(state, TASK, api(history, handler)) == ended


@pytest.mark.parametrize(("state", "ended"), [("COMPLETE", "FINISHED"), ("RUNNING", "FAILED")])
def test_without_the_api_only_what_surely_succeeded_is_finished(api, monkeypatch, state, ended):
    address = api([], "SUCCEEDED")
    monkeypatch.setenv(RUN_ID, "another-run")
    assert outcome(state, TASK, address) == ended
    assert outcome(state, TASK, "http://127.0.0.1:9") == ended
