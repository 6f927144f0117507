"""The tracking stack of infra/, really running: logins, hosts, artifacts, backups and the way back.

The sweep through an outage is outage_sweep.py.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..tracking.soak import differences, soak
from .stack import SECRETS, manifests, missing_tools, running_stack

pytestmark = pytest.mark.skipif(
    bool(missing_tools()), reason=f"PostgreSQL is not installed: no {', '.join(missing_tools())}"
)

SOME_ENDPOINT = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
RUNS = (SECRETS["mlflow-credentials"]["username"], SECRETS["mlflow-credentials"]["password"])
SERVING = (
    SECRETS["mlflow-serving-credentials"]["username"],
    SECRETS["mlflow-serving-credentials"]["password"],
)


@pytest.fixture(scope="module")
def stack():
    with running_stack() as stack:
        yield stack


@pytest.fixture
def login(monkeypatch):
    """Log in as one of the stack's users, by the environment, as stages do."""

    def as_user(user):
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user[0])
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", user[1])
        monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)

    return as_user


def test_api_wants_a_login_and_health_does_not(stack):
    assert stack.status("/health") == 200
    assert stack.status(SOME_ENDPOINT) == 401
    assert stack.status(SOME_ENDPOINT, (RUNS[0], "wrong-password")) == 401
    assert stack.status(SOME_ENDPOINT, RUNS) == 200


def test_only_the_servers_own_names_are_answered(stack):
    for host in ("mlflow.softpref-tracking.svc:5000", "mlflow:5000", "localhost:9999"):
        assert stack.status(SOME_ENDPOINT, RUNS, host) == 200
    for host in ("elsewhere.example", "mlflow.softpref-tracking.svc.elsewhere.example"):
        assert stack.status(SOME_ENDPOINT, RUNS, host) == 403


def test_a_worker_that_is_silent_for_a_while_is_not_killed(stack):
    """As one is that imports MLflow on a slow node; uvicorn's own limit is 5 seconds."""
    worker = int(re.findall(r"Started server process \[(\d+)\]", stack.log("mlflow"))[-1])
    os.kill(worker, signal.SIGSTOP)
    time.sleep(7)
    os.kill(worker, signal.SIGCONT)
    time.sleep(1)  # for the one that watches it
    assert "died" not in stack.log("mlflow")
    assert stack.status(SOME_ENDPOINT, RUNS) == 200


def test_no_password_is_in_a_command_or_a_log(stack):
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    for name in ("postgres", "mlflow-admin", "mlflow-credentials", "mlflow-serving-credentials"):
        assert SECRETS[name]["password"] not in stack.log("mlflow")
        assert SECRETS[name]["password"] not in commands


def test_setup_may_be_repeated_and_a_changed_secret_changes_the_password(stack):
    container = stack.objects["Deployment", "mlflow"]["spec"]["template"]["spec"]["initContainers"]
    setup = next(one for one in container if one["name"] == "database")
    path = stack.folder / "mounts/etc/mlflow/users/serving/password"
    path.write_text("another-password-2", encoding="utf-8")
    said = stack.run_container(setup)
    assert "user serving: new password" in said
    assert "made" not in said
    assert stack.status(SOME_ENDPOINT, (SERVING[0], "another-password-2")) == 200
    path.write_text(SERVING[1], encoding="utf-8")
    stack.run_container(setup)
    assert stack.query("SELECT username FROM users WHERE is_admin") == [("admin",)]


def test_artifacts_reach_the_bucket_without_keys_for_it(stack, login, tmp_path, monkeypatch):
    from softpref.tracking import Tracker

    login(RUNS)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "note.txt").write_text("kept")
    with Tracker(tmp_path / "out", experiment="stack", run_name="a", tracking_uri=stack.uri) as tracked:
        tracked.metrics({"loss": 0.5}, 0)
        tracked.artifact(tmp_path / "note.txt", "notes")
    stored = stack.objects_in("mlflow")
    assert any(key.endswith(f"{tracked.run_id}/artifacts/notes/note.txt") for key in stored)
    assert stack.query("SELECT value FROM metrics WHERE run_uuid = %s", tracked.run_id) == [(0.5,)]


def test_who_serves_may_read_and_not_write(stack, login, tmp_path):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    login(RUNS)
    MlflowClient(stack.uri).create_experiment("of-the-runs")
    login(SERVING)
    client = MlflowClient(stack.uri)
    experiment = client.get_experiment_by_name("of-the-runs")
    with pytest.raises(MlflowException, match="Permission denied"):
        client.create_run(experiment.experiment_id)


@pytest.mark.slow
def test_fifty_runs_log_at_once_and_nothing_is_lost_doubled_or_left_open(stack, login, tmp_path):
    """As `tests/tracking/test_soak.py` on SQLite."""
    login(RUNS)
    soaked = soak(stack.uri, tmp_path)
    print(soaked)
    assert differences(soaked, stack.query) == []
    assert sum(key.endswith("artifacts/notes/note.txt") for key in stack.objects_in("mlflow")) >= soaked.runs


def test_backup_and_restore_bring_everything_back(stack, login, tmp_path):
    """Through the commands of the CronJobs; the second half deletes what the first has saved."""
    import boto3
    from mlflow import MlflowClient

    login(RUNS)
    client = MlflowClient(stack.uri)
    run = client.create_run(client.create_experiment("backed-up"))
    for step in range(50):
        client.log_metric(run.info.run_id, "loss", 1 / (step + 1), step=step)
    client.log_text(run.info.run_id, "the weights", "model/weights.txt")
    before = stack.query("SELECT key, value, step, timestamp FROM metrics ORDER BY 1, 3, 4")

    def run_job(name):
        pod = stack.objects["CronJob", name]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        return "".join(
            stack.run_container(one) for one in (*pod.get("initContainers", []), *pod["containers"])
        )

    assert ".dump" in run_job("backup-database")
    assert " copied" in run_job("backup-artifacts")
    assert " 0 copied" in run_job("backup-artifacts")

    stack.query("DELETE FROM metrics")
    stack.query("DROP TABLE users CASCADE")
    store = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{stack.ports['store']}",
        aws_access_key_id="a",
        aws_secret_access_key="b",
        region_name="us-east-1",
    )
    artifacts = stack.objects_in("mlflow")
    for key in artifacts:
        store.delete_object(Bucket="mlflow", Key=key)
    stack.kill_server()

    run_job("restore-database")
    run_job("restore-artifacts")
    stack.start_server()
    assert stack.query("SELECT key, value, step, timestamp FROM metrics ORDER BY 1, 3, 4") == before
    assert stack.objects_in("mlflow") == artifacts
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 50
    restored = client.download_artifacts(run.info.run_id, "model/weights.txt", str(tmp_path))
    assert Path(restored).read_text(encoding="utf-8") == "the weights"


def test_old_dumps_go_and_an_empty_one_changes_nothing(stack):
    pod = stack.objects["CronJob", "backup-database"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    dump, store = pod["initContainers"][0], pod["containers"][0]
    stack.run_container(dump)
    for _ in range(3):
        time.sleep(1.1)  # a dump's name is the second it was stored in
        text = stack.run_container(store, BACKUP_KEEP="2")
    assert "removed" in text
    kept = [key for key in stack.objects_in("mlflow-backup") if key.startswith("database/")]
    assert len(kept) == 2
    (stack.folder / "mounts/backup/mlflow.dump").write_bytes(b"")
    with pytest.raises(RuntimeError, match="the dump failed"):
        stack.run_container(store, BACKUP_KEEP="2")
    assert [key for key in stack.objects_in("mlflow-backup") if key.startswith("database/")] == kept


def test_a_refused_login_and_an_experiment_of_another_user_are_said_before_anything_starts(
    stack, login, monkeypatch
):
    from mlflow import MlflowClient
    from softpref.errors import ConfigError
    from softpref.tracking import check_server

    monkeypatch.setenv("SOFTPREF_RUN_ID", "0a1b")
    login((RUNS[0], "wrong"))
    with pytest.raises(ConfigError) as refused:
        check_server("softpref", stack.uri)
    for part in ("refuses the login", "'softpref'", "MLFLOW_TRACKING_PASSWORD", stack.uri):
        assert part in str(refused.value)
    assert "wrong" not in str(refused.value)
    login(tuple(SECRETS["mlflow-admin"].values()))
    MlflowClient(stack.uri).create_experiment("of-the-administrator")
    login(RUNS)
    with pytest.raises(ConfigError, match="does not let user 'softpref' write there"):
        check_server("of-the-administrator", stack.uri)


def test_a_password_that_is_changed_while_training_is_a_warning_with_the_reason(
    stack, login, tmp_path, caplog
):
    from softpref.tracking import Tracker, sync

    login((RUNS[0], "wrong"))
    with Tracker(
        tmp_path / "out", experiment="stack", run_name="late", tracking_uri=stack.uri, exit_wait=2
    ) as tracked:
        tracked.metrics({"loss": 1.0}, 0)
    assert "refuses the login of user 'softpref'" in caplog.text
    login(RUNS)
    assert sync(tmp_path / "out").delivered == 2


def test_the_service_is_rolled_over_when_the_alias_moves(stack, login, tmp_path):
    """follow.py as its CronJob starts it, between the real registry and an API server with the Deployment."""
    from mlflow import MlflowClient

    from ..infra.cluster import api_server

    login(RUNS)
    client = MlflowClient(stack.uri)
    run = client.create_run(client.create_experiment("served"))
    client.log_text(run.info.run_id, "a model", "model/MLmodel")
    client.create_registered_model("softpref-story")
    versions = [
        client.create_model_version(
            "softpref-story", f"runs:/{run.info.run_id}/model", run.info.run_id
        ).version
        for _ in range(2)
    ]
    objects = manifests("overlays/serving")
    pod = objects["CronJob", "follow-champion"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    script = tmp_path / "follow.py"
    script.write_text(objects["ConfigMap", "serving-files"]["data"]["follow.py"], encoding="utf-8")
    assert container["command"] == ["python", "/etc/serving/follow.py"]
    (role,) = objects["Role", "follow-champion"]["rules"]
    assert (role["resources"], role["resourceNames"]) == (["deployments"], container["args"])

    account = tmp_path / "account"
    account.mkdir()
    with api_server(account) as cluster:
        (account / "token").write_text("t")
        path = f"/apis/apps/v1/namespaces/softpref-serving/deployments/{container['args'][0]}"
        cluster.add(path, spec={"template": objects["Deployment", "softpref-serving"]["spec"]["template"]})
        host, port = cluster.url.removeprefix("https://").split(":")
        environment = objects["ConfigMap", "serving-settings"]["data"] | {
            "PATH": os.environ["PATH"],
            "MLFLOW_TRACKING_URI": stack.uri,
            "MLFLOW_TRACKING_USERNAME": SERVING[0],
            "MLFLOW_TRACKING_PASSWORD": SERVING[1],
            "NAMESPACE": "softpref-serving",
            "SERVICE_ACCOUNT_FOLDER": str(account),
            "KUBERNETES_SERVICE_HOST": host,
            "KUBERNETES_SERVICE_PORT": port,
        }

        def follow():
            command = [sys.executable, str(script), *container["args"]]
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

        nothing = follow()
        assert nothing.returncode == 1
        assert "MLflow" in nothing.stderr
        assert not cluster.requests
        for version in versions:
            client.set_registered_model_alias("softpref-story", "champion", version)
            assert "is rolled over" in follow().stdout
            assert "is served" in follow().stdout
            template = cluster.objects[path]["spec"]["template"]
            assert template["metadata"]["annotations"] == {"softpref/model-version": version}
        assert [method for method, _, _ in cluster.requests].count("PATCH") == 2
        assert template["spec"]["containers"][0]["image"]  # nothing else of the Deployment is touched
        assert {method for method, _, _ in cluster.requests} == {"GET", "PATCH"}
