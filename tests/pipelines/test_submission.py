"""Submitting to Kubeflow Pipelines, against a server made from the client's own description of the API."""

import json

import pytest

from tests.pipelines.kfp_api import PipelinesApi


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch, tmp_path):
    for name in ("KFP_TOKEN", "KFP_COOKIES", "KFP_OTHER_CLIENT_SECRET"):
        monkeypatch.delenv(name, raising=False)


def submit(launch, sweep, server, *more):
    return launch.main(sweep, ["--runner", "cluster", "--endpoint", server.url, *more])


def test_a_version_and_a_run_in_an_experiment(launch, sweep, capsys):
    with PipelinesApi() as server:
        on_gpus = [f"--{stage}-overrides={json.dumps({'use_cpu': False})}" for stage in ("sft", "train")]
        assert submit(launch, sweep, server, "--alphas", "0.25", "--gpus", "2", *on_gpus) == 0
    (run,) = server.runs
    assert f"submitted run {run.run_id}" in capsys.readouterr().out
    assert run.display_name.startswith("spo-sweep-embedded-")
    assert run.service_account == "softpref-runner"
    parameters = run.runtime_config["parameters"]
    assert (parameters["alphas"], parameters["gpus"]) == ([0.25], 2)
    assert json.loads(parameters["train_overrides"])["sampling_batch_size"] == 256
    assert parameters["tracking_uri"] == "http://mlflow.softpref-tracking.svc:5000"
    assert [one.display_name for one in server.experiments] == [parameters["experiment"]]
    version = server.versions[-1]
    assert run.pipeline_version_reference["pipeline_version_id"] == version.pipeline_version_id
    form = version.pipeline_spec["root"]["inputDefinitions"]["parameters"]
    assert form["alphas"]["defaultValue"] == [0.5, 1, 2]  # the recipe's: the form is for every run


def test_the_same_pipeline_is_not_uploaded_twice_and_a_changed_one_is_a_new_version(
    launch, sweep, capsys, tmp_path
):
    import clusters

    profile = tmp_path / "lab.yaml"
    profile.write_text((clusters.CLUSTERS / "default.yaml").read_text().replace("retries: 2", "retries: 1"))
    with PipelinesApi() as server:
        assert submit(launch, sweep, server) == 0
        assert submit(launch, sweep, server, "--beta", "0.2") == 0
        first = {run.pipeline_version_reference["pipeline_version_id"] for run in server.runs}
        assert len(first) == 1
        assert submit(launch, sweep, server, "--cluster", str(profile)) == 0
    assert len(server.pipelines) == 1
    assert server.runs[2].pipeline_version_reference["pipeline_version_id"] not in first
    assert len({run.experiment_id for run in server.runs}) == 1


def test_several_users_need_a_namespace(launch, sweep, capsys):
    with PipelinesApi(multi_user=True) as server:
        assert submit(launch, sweep, server) == 2
        assert "--namespace" in capsys.readouterr().err
        assert submit(launch, sweep, server, "--namespace", "team") == 0
        assert submit(launch, sweep, server, "--namespace", "team") == 0
        assert len(server.pipelines) == 1
        assert submit(launch, sweep, server, "--namespace", "others") == 0
    assert [one.namespace for one in server.pipelines] == ["team", "others"]
    assert server.experiments[0].namespace == "team"
    assert server.pipelines[0].namespace == "team"


@pytest.mark.parametrize("way", ["environment", "file"])
def test_a_token_from_the_environment_or_a_file(launch, sweep, capsys, monkeypatch, tmp_path, way):
    with PipelinesApi(token="secret") as server:
        assert submit(launch, sweep, server) == 2
        assert "KFP_TOKEN" in capsys.readouterr().err
        more = []
        if way == "environment":
            monkeypatch.setenv("KFP_TOKEN", "secret")
        else:
            (tmp_path / "token").write_text("secret")
            more = ["--token-file", str(tmp_path / "token")]
        assert submit(launch, sweep, server, *more) == 0
    assert len(server.runs) == 1
    printed = capsys.readouterr()
    assert "secret" not in printed.out + printed.err


def test_cookies_of_a_session(launch, sweep, monkeypatch):
    monkeypatch.setenv("KFP_COOKIES", "authservice_session=abc")
    with PipelinesApi() as server:
        assert submit(launch, sweep, server) == 0
    assert all(headers.get("Cookie") == "authservice_session=abc" for headers in server.headers)


@pytest.mark.parametrize(("end", "status"), [("SUCCEEDED", 0), ("FAILED", 1), ("CANCELED", 1)])
def test_waiting_tells_how_the_run_ended(launch, sweep, capsys, monkeypatch, end, status):
    import submission

    monkeypatch.setattr(submission, "_SECONDS_BETWEEN_LOOKS", 0.01)
    with PipelinesApi(states=["PENDING", "RUNNING", "RUNNING", end]) as server:
        server.failures = 2
        assert submit(launch, sweep, server, "--wait") == status
    printed = capsys.readouterr().out
    assert printed.count("running") == 1
    assert end.lower() in printed
    assert ("train-policy" in printed) == (end == "FAILED")


def test_what_is_wrong_is_said_before_anything_is_uploaded(launch, sweep, capsys):
    with PipelinesApi() as server:
        assert submit(launch, sweep, server, "--alphas", "-1") == 2
        assert submit(launch, sweep, server, "--cluster", "nowhere") == 2
        assert submit(launch, sweep, server, "--token-file", "/does/not/exist") == 2
        assert submit(launch, sweep, server, "--gpus", "2") == 2
        assert "use_cpu" in capsys.readouterr().err
        assert submit(launch, sweep, server, "--source", __file__) == 2
        assert "no step of the cluster sees it" in capsys.readouterr().err
        assert submit(launch, sweep, server, "--alphas", "-1") == 2
    assert "alpha" in capsys.readouterr().err
    assert not server.pipelines


def test_an_endpoint_is_asked_for_and_an_absent_server_named(launch, sweep, capsys):
    assert launch.main(sweep, ["--runner", "cluster"]) == 2
    assert "--endpoint" in capsys.readouterr().err
    with PipelinesApi() as server:
        gone = server.url
    assert launch.main(sweep, ["--runner", "cluster", "--endpoint", gone]) == 2
    assert gone in capsys.readouterr().err


def test_fixed_gpus_cannot_be_asked_otherwise(launch, sweep, capsys, tmp_path):
    import clusters

    text = (clusters.CLUSTERS / "default.yaml").read_text().replace("gpus: parameter", "gpus: 4")
    profile = tmp_path / "lab.yaml"
    profile.write_text(text)
    with PipelinesApi() as server:
        assert submit(launch, sweep, server, "--cluster", str(profile), "--gpus", "2") == 2
        assert "4 GPUs" in capsys.readouterr().err
        assert submit(launch, sweep, server, "--cluster", str(profile)) == 0
    assert "gpus" not in server.runs[0].runtime_config["parameters"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--endpoint", "http://kfp"], "--endpoint is for --runner cluster, and this run is local"),
        (["--runner", "docker", "--cluster", "lab"], "--cluster is for --runner cluster"),
        (
            ["--runner", "cluster", "--endpoint", "http://kfp", "--output", "here"],
            "--output is for runs on this",
        ),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(launch, sweep, capsys, arguments, complaint):
    with pytest.raises(SystemExit):
        launch.main(sweep, arguments)
    assert complaint in capsys.readouterr().err
