"""What a run on this machine says at its end of where to look."""

import pytest
from werkzeug.exceptions import abort

from tests.served import served


@pytest.fixture
def server():
    """An MLflow server that knows one run, "r1", of experiment 7; its address."""

    def answer(request):
        if request.path != "/api/2.0/mlflow/runs/get" or request.args.get("run_id") != "r1":
            abort(404)
        info = {"run_id": "r1", "experiment_id": "7", "status": "FINISHED", "artifact_uri": "x"}
        return {"run": {"info": info, "data": {}}}

    with served(answer) as url:
        yield url


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
