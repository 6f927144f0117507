"""How a run of a pipeline ended, as its last step finds out; the answers are those of a real KFP 2.17."""

from contextlib import ExitStack

import pytest
from softpref.preflight.stage import outcome
from softpref.tracking import RUN_ID

from tests.served import routes, served

pytestmark = pytest.mark.fast

TASK = "exit-handler-1"
TERMINATED = [{"state": "RUNNING"}, {"state": "CANCELING"}]


@pytest.fixture
def api(monkeypatch):
    """A function: the address of an API that knows one run."""
    monkeypatch.setenv(RUN_ID, "a-run")

    def serve(history, state):
        # a pod that was deleted has failed, and its step went on in another one
        tasks = [
            {"display_name": TASK, "state": state},
            {"display_name": "executor(0)", "state": "FAILED"},
            {"task_id": "of a step from the cache"},
        ]
        run = {"state": "RUNNING", "state_history": history, "run_details": {"task_details": tasks}}

        return servers.enter_context(
            served(routes({("GET", "/apis/v2beta1/runs/a-run"): lambda request: run}))
        )

    with ExitStack() as servers:
        yield serve


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
