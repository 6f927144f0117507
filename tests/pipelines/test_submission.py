"""Submitting to Kubeflow Pipelines, against a server made from the client's own description of the API."""

import json
import logging
import re

import pytest
from softpref.errors import ConfigError
from softpref.pipelines import command, submission, waiting
from softpref.pipelines.profiles import CLUSTERS, read_profile

from tests.pipelines.conftest import PACKAGES
from tests.pipelines.kfp_api import PipelinesApi, Workflow

LOOP = "for-loop-2.iteration-iterations({0}:{0}).iteration-item."


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch, tmp_path):
    for name in ("KFP_TOKEN", "KFP_COOKIES", "KFP_OTHER_CLIENT_SECRET"):
        monkeypatch.delenv(name, raising=False)


def submit(sweep, server, *more):
    return command.main(sweep, ["--runner", "cluster", "--endpoint", server.url, *more])


def test_a_version_and_a_run_in_an_experiment(sweep, capsys):
    with PipelinesApi() as server:
        on_gpus = [f"--{stage}-overrides={json.dumps({'use_cpu': False})}" for stage in ("sft", "train")]
        assert submit(sweep, server, "--alphas", "0.25", "--gpus", "2", *on_gpus) == 0
    (run,) = server.runs
    address = f"{server.url}/#/runs/details/{run.run_id}"
    printed = capsys.readouterr()
    assert f"submitted run {run.display_name} ({run.run_id}): {address}" in printed.out
    assert (printed.out.count("http"), printed.err) == (1, "")  # neither kfp's links nor its warnings
    assert run.display_name.startswith("spo-sweep-embedded-")
    assert run.service_account == "softpref-runner"
    parameters = run.runtime_config["parameters"]
    assert (parameters["alphas"], parameters["gpus"]) == ([0.25], "2")
    assert parameters["train_overrides"]["sampling_batch_size"] == 256
    assert parameters["tracking_uri"] == "http://mlflow.softpref-tracking.svc:5000"
    assert [one.display_name for one in server.experiments] == [parameters["experiment"]]
    (version,) = server.versions
    assert version.display_name.startswith("embedded-")
    assert run.pipeline_version_reference["pipeline_version_id"] == version.pipeline_version_id
    form = version.pipeline_spec["root"]["inputDefinitions"]["parameters"]
    assert form["alphas"]["defaultValue"] == [0.5, 1, 2]  # the recipe's: the form is for every run


def test_the_ui_gets_the_description_with_the_pipeline_and_its_version(sweep):
    with PipelinesApi() as server:
        assert submit(sweep, server) == 0
    for shown in (*server.pipelines, *server.versions):
        assert shown.description.startswith("Align a language model")
        assert "- alphas: Softness values" in shown.description


def test_the_same_pipeline_is_not_uploaded_twice_and_a_changed_one_is_a_new_version(sweep, capsys, tmp_path):

    profile = tmp_path / "lab.yaml"
    profile.write_text((CLUSTERS / "default.yaml").read_text().replace("retries: 2", "retries: 1"))
    with PipelinesApi() as server:
        assert submit(sweep, server) == 0
        assert submit(sweep, server, "--beta", "0.2") == 0
        first = {run.pipeline_version_reference["pipeline_version_id"] for run in server.runs}
        assert len(first) == 1
        assert submit(sweep, server, "--cluster", str(profile)) == 0
    assert len(server.pipelines) == 1
    assert len(server.versions) == 2
    assert server.runs[2].pipeline_version_reference["pipeline_version_id"] not in first
    assert len({run.experiment_id for run in server.runs}) == 1


def test_several_users_need_a_namespace(sweep, capsys):
    with PipelinesApi(multi_user=True) as server:
        assert submit(sweep, server) == 2
        assert "--namespace" in capsys.readouterr().err
        assert submit(sweep, server, "--namespace", "team") == 0
        assert submit(sweep, server, "--namespace", "team") == 0
        assert len(server.pipelines) == 1
        assert submit(sweep, server, "--namespace", "others") == 0
    assert [one.namespace for one in server.pipelines] == ["team", "others"]
    assert server.experiments[0].namespace == "team"
    assert [one.pipeline_id for one in server.versions] == [one.pipeline_id for one in server.pipelines]


@pytest.mark.parametrize("way", ["environment", "file"])
def test_a_token_from_the_environment_or_a_file(sweep, capsys, monkeypatch, tmp_path, way):
    with PipelinesApi(token="secret") as server:
        assert submit(sweep, server) == 2
        assert "KFP_TOKEN" in capsys.readouterr().err
        more = []
        if way == "environment":
            monkeypatch.setenv("KFP_TOKEN", "secret")
        else:
            (tmp_path / "token").write_text("secret")
            more = ["--token-file", str(tmp_path / "token")]
        assert submit(sweep, server, *more) == 0
    assert len(server.runs) == 1
    printed = capsys.readouterr()
    assert "secret" not in printed.out + printed.err


def test_cookies_of_a_session(sweep, monkeypatch):
    monkeypatch.setenv("KFP_COOKIES", "authservice_session=abc")
    with PipelinesApi() as server:
        assert submit(sweep, server) == 0
    assert all(headers.get("Cookie") == "authservice_session=abc" for headers in server.headers)


@pytest.fixture
def wait(capsys, monkeypatch):
    """Submits the checked-in package of the sweep and waits; returns the status and what is printed then."""
    import argparse

    monkeypatch.setattr(waiting, "_SECONDS_BETWEEN_LOOKS", 0.01)

    def submit_and_wait(server, *more):
        parser = argparse.ArgumentParser()
        submission.add_client_options(parser)
        options = parser.parse_args(["--endpoint", server.url, "--wait", *more])
        options.recipe = "embedded"
        status = submission.submit(
            "spo-sweep",
            PACKAGES / "spo_sweep.yaml",
            {"experiment": "softpref"},
            read_profile("default"),
            options,
            ["spo-alpha-0.5", "dpo-beta-1"],
        )
        printed = capsys.readouterr()
        return status, re.sub(r"(?m)^[\d:]{8}  ", "", printed.out).splitlines()[1:], printed.err

    return submit_and_wait


def test_waiting_says_what_each_step_does_once(wait):
    began = Workflow().step("plan-sweep", "Running", "Running")
    data = Workflow().step("plan-sweep", "Succeeded", "Succeeded").step("prepare-data", "Succeeded")
    pending = "Pending:Unschedulable: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu. preemption: 0/1"
    data.step(LOOP.format(0) + "train-policy", "Running", pending)
    data.step(LOOP.format(1) + "train-policy", "Running", "Failed:pod deleted", "Running")
    with PipelinesApi(
        states=["PENDING", "RUNNING", "RUNNING", "RUNNING", "SUCCEEDED"],
        workflows=[{}, began.manifest, began.manifest, data.manifest],
    ) as server:
        status, lines, errors = wait(server)
    assert lines == [
        "pending",
        "Check, plan the sweep started",
        "running",
        "Check, plan the sweep succeeded",
        "Prepare preferences succeeded, from the cache",
        "Align the policy (spo-alpha-0.5) waits: Unschedulable: 0/1 nodes are available: 1 Insufficient "
        "nvidia.com/gpu",
        "Align the policy (dpo-beta-1) started again, attempt 2 (pod deleted)",
        "succeeded",
    ]
    assert (status, errors) == (0, "")


def test_a_run_that_succeeded_says_what_it_came_to(wait):
    """Each warning once: of a sweep the comparison has those of the evaluations, with their models."""
    evaluated, names = LOOP.format(0) + "evaluate-model", ("compare-models", "register-chosen.register-model")
    end = Workflow().step(evaluated, "Succeeded", "Succeeded")
    for name in names:
        end.step(name, "Succeeded", "Succeeded")
    said = {
        evaluated: "[softpref] warning:  few prompts\n",
        "compare-models": "[KFP Executor 2026-01-01 10:00:00,842 INFO]: Got executor_input:\n{\n}\n"
        "[softpref] chosen:   spo-alpha-0.5. It is soft.\nreading\n"
        "[softpref] warning:  dpo-beta-1: few prompts\n",
        "register-chosen.register-model": "[softpref] serve:    mlflow models serve -m models:/a@champion\n",
    }
    logs = {end.pod(path): text for path, text in said.items()}
    with PipelinesApi(states=["SUCCEEDED"], workflows=[end.manifest], logs=logs) as server:
        status, lines, errors = wait(server)
    assert lines[lines.index("succeeded") + 1 :] == [
        "chosen:   spo-alpha-0.5. It is soft.",
        "warning:  dpo-beta-1: few prompts",
        "serve:    mlflow models serve -m models:/a@champion",
    ]
    assert (status, errors) == (0, "")


def test_what_the_api_has_no_log_of_any_more_the_ui_is_asked_for(wait):
    """Of a pod that succeeded KFP's API has a log only where one is archived; the UI asks Kubernetes."""
    end = Workflow().step("compare-models", "Succeeded", "Succeeded")
    logs = {end.pod("compare-models"): "[softpref] chosen:   spo-alpha-1. It is soft.\n"}
    with (
        PipelinesApi(logs=logs, ui=True) as ui,
        PipelinesApi(states=["SUCCEEDED"], workflows=[end.manifest]) as server,
    ):
        _, lines, _ = wait(server, "--ui-host", ui.url)
    assert lines[-1] == "chosen:   spo-alpha-1. It is soft."


def test_where_no_log_can_be_had_the_run_says_where_its_outcome_is(wait):
    end = Workflow().step("compare-models", "Succeeded", "Succeeded")
    with PipelinesApi(states=["SUCCEEDED"], workflows=[end.manifest]) as server:
        status, lines, errors = wait(server)
    assert lines[-2] == "succeeded"
    assert re.fullmatch(
        r"what the run came to is in its steps' logs, .*; see http\S+/#/runs/details/\S+", lines[-1]
    )
    assert (status, errors) == (0, "")


def test_a_run_of_which_no_model_passes_the_gate_says_so_once_and_fails(wait):
    end = Workflow().step("compare-models", "Failed", "Failed:main: Error (exit code 1)")
    log = (
        "[softpref] chosen:   none. No member passes the gate.\n[softpref] warning:  few prompts\n"
        'Traceback (most recent call last):\n  File "x.py", line 5, in compare_models\n'
        "softpref.errors.DataError: No member passes the gate.\n"
    )
    logs = {end.pod("compare-models"): log}
    with PipelinesApi(states=["FAILED"], workflows=[end.manifest], logs=logs) as server:
        status, lines, errors = wait(server)
    assert status == 1
    assert lines[-2:] == ["chosen:   none. No member passes the gate.", "warning:  few prompts"]
    assert "error: Compare and choose failed: No member passes the gate.\n" in errors
    assert "few prompts" not in errors


LOG = """\
I0101 10:00:00.028680      16 registry.go:68] No task-level plugins enabled, returning no-op dispatcher
[KFP Executor 2026-01-01 10:00:00,842 INFO]: Got executor_input:
{
    "inputs": {}
}
reading the table
training:  50%|█████     | 5/10 [00:10<00:10,  1.0s/it]\rtraining: 100%|██████████| 10/10 [00:20<00:00]
Traceback (most recent call last):
  File "/tmp/executor.py", line 5, in prepare_data
    run(config)
softpref.errors.DataError: row 7 has no prompt; name its column in columns
E0101 10:00:01.876036      16 launcher_v2.go:449] Component failed to execute successfully: exit status 1
I0101 10:00:01.902942      16 launcher_v2.go:206] publish success.
F0101 10:00:01.931275      16 main.go:59] failed to execute component: exit status 1
time=2026-01-01T10:00:02.628Z level=INFO msg="sub-process exited" error="exit status 1" argo=true
Error: exit status 1
"""


@pytest.mark.parametrize("ui", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_failed_step_is_named_with_the_reason_that_its_log_gives(wait, wrapped, ui):
    end = Workflow(wrapped=wrapped).step("plan-sweep", "Succeeded", "Succeeded")
    end.step("prepare-data", "Failed", "Failed:main: Error (exit code 1)")
    with PipelinesApi(
        states=["RUNNING", "FAILED"], workflows=[end.manifest], logs={end.pod("prepare-data"): LOG}, ui=ui
    ) as server:
        status, lines, errors = wait(server)
        (run,) = server.runs
    assert status == 1
    assert lines[1:] == ["Prepare preferences failed", "running", "failed"]
    assert errors.splitlines() == [
        "    reading the table",
        "    Traceback (most recent call last):",
        '      File "/tmp/executor.py", line 5, in prepare_data',
        "        run(config)",
        "    softpref.errors.DataError: row 7 has no prompt; name its column in columns",
        "error: Prepare preferences failed: row 7 has no prompt; name its column in columns",
        f"error: the run failed; see {server.url}/#/runs/details/{run.run_id}",
    ]


@pytest.mark.parametrize(
    ("message", "log", "reason"),
    [
        ("main: Error (exit code 1)", "one\nKeyError: 'prompt'\nbye\n", "KeyError: 'prompt'"),
        ("main: Error (exit code 1)", "the last word\n", "the last word"),
        (
            "main: Error (exit code 143)",
            "bye\n",
            "its pod was ended from outside, as by a deletion or an eviction (exit code 143)",
        ),
        ("OOMKilled (exit code 137)", "the last word\n", "OOMKilled (exit code 137)"),
        ("main: Error (exit code 1)", "", "main: Error (exit code 1); its log is not available here"),
    ],
)
def test_a_failed_step_of_the_loop_is_named_with_its_model(wait, message, log, reason):
    path = LOOP.format(1) + "evaluate-model"
    end = Workflow().step(path, "Failed", "Failed:pod deleted", f"Failed:{message}")
    with PipelinesApi(
        states=["FAILED"], workflows=[end.manifest], logs={end.pod(path, attempt=1): log}
    ) as server:
        status, _, errors = wait(server, "--ui-host", "https://kubeflow.example/pipeline/")
    assert status == 1
    assert f"error: Evaluate (dpo-beta-1) failed: {reason}\n" in errors
    assert "see https://kubeflow.example/pipeline/#/runs/details/" in errors


def test_a_failed_driver_is_named_with_its_message(wait):
    when = "0101 10:00:00.000000 1 main.go:9]"
    log = f"I{when} go\nF{when} KFP driver: driver.DAG(a, b) failed: no x\n"
    end = Workflow().driver("for-loop-2.iteration", "Failed", "Error (exit code 1)", "system-dag-driver")
    end.driver("prepare-data", "Error", "ImagePullBackOff: Back-off pulling image driver")
    pod = end.driver_pod("for-loop-2.iteration", "system-dag-driver")
    with PipelinesApi(states=["FAILED"], workflows=[end.manifest], logs={pod: log}) as server:
        status, _, errors = wait(server)
    assert status == 1
    assert "error: models failed before its start: no x\n" in errors
    assert "error: Prepare preferences failed before its start: ImagePullBackOff: Back-off pulling" in errors


@pytest.mark.parametrize("end", ["CANCELED", "FAILED"])  # KFP 2.17 calls it failed in the end
def test_a_terminated_run_is_no_failed_one(wait, end):
    stopped = Workflow(deadline=0).step("prepare-data", "Failed", "Failed:Step exceeded its deadline")
    with PipelinesApi(
        states=["RUNNING", "CANCELING", end], workflows=[Workflow().manifest, stopped.manifest]
    ) as server:
        status, lines, errors = wait(server)
    assert status == 130
    assert lines == ["running", "Prepare preferences was stopped", "canceling", "terminated"]
    assert "error: the run was terminated" in errors
    assert "failed" not in errors


def test_without_the_workflow_the_states_are_said(wait):
    with PipelinesApi(states=["RUNNING", "FAILED"]) as server:
        status, lines, errors = wait(server)
    assert (status, lines) == (1, ["running", "failed"])
    assert "error: the run failed: a task failed" in errors


def test_an_api_that_is_away_for_a_while_is_mentioned_once(wait):
    with PipelinesApi(states=["RUNNING", "SUCCEEDED"]) as server:
        server.failures = 3
        status, lines, errors = wait(server)
    assert lines == [
        "the API does not answer; the run goes on; trying again",
        "the API answers again",
        "running",
        "succeeded",
    ]
    assert (status, errors) == (0, "")


def test_an_api_that_stays_away_ends_the_waiting_but_not_the_run(wait, monkeypatch):

    monkeypatch.setattr(waiting, "_FAILED_LOOKS", 2)
    with PipelinesApi(states=["RUNNING"]) as server:
        server.failures = 4
        with pytest.raises(ConfigError, match=f"answered 503 .*; the run goes on: {server.url}/#/runs/det"):
            wait(server)


def test_requests_that_are_tried_again_are_not_warned_of(sweep, capsys, caplog):
    with PipelinesApi() as server:
        gone = server.url
    with caplog.at_level(logging.WARNING):
        assert command.main(sweep, ["--runner", "cluster", "--endpoint", gone]) == 2
    assert not [record for record in caplog.records if "Retrying" in record.getMessage()]
    assert "Connection refused" in capsys.readouterr().err


def test_interrupted_waiting_leaves_the_run(wait, monkeypatch):

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(waiting.time, "sleep", interrupt)
    with PipelinesApi(states=["RUNNING"]) as server:
        status, lines, errors = wait(server)
    assert (status, lines) == (130, ["running"])
    assert f"error: waiting was interrupted; the run goes on: {server.url}/#/runs/details/" in errors


def test_what_is_wrong_is_said_before_anything_is_uploaded(sweep, capsys):
    with PipelinesApi() as server:
        assert submit(sweep, server, "--alphas", "-1") == 2
        assert submit(sweep, server, "--cluster", "nowhere") == 2
        assert submit(sweep, server, "--token-file", "/does/not/exist") == 2
        assert submit(sweep, server, "--gpus", "2") == 2
        assert "use_cpu" in capsys.readouterr().err
        assert submit(sweep, server, "--source", __file__) == 2
        assert "no step of the cluster sees it" in capsys.readouterr().err
        assert submit(sweep, server, "--alphas", "-1") == 2
    assert "alpha" in capsys.readouterr().err
    assert not server.pipelines


def test_an_endpoint_is_asked_for_and_an_absent_server_named(sweep, capsys):
    assert command.main(sweep, ["--runner", "cluster"]) == 2
    assert "--endpoint" in capsys.readouterr().err
    with PipelinesApi() as server:
        gone = server.url
    assert command.main(sweep, ["--runner", "cluster", "--endpoint", gone]) == 2
    assert gone in capsys.readouterr().err


def test_fixed_gpus_cannot_be_asked_otherwise(sweep, capsys, tmp_path):

    text = (CLUSTERS / "default.yaml").read_text().replace("gpus: parameter", "gpus: 4")
    profile = tmp_path / "lab.yaml"
    profile.write_text(text)
    with PipelinesApi() as server:
        assert submit(sweep, server, "--cluster", str(profile), "--gpus", "2") == 2
        assert "4 GPUs" in capsys.readouterr().err
        assert submit(sweep, server, "--cluster", str(profile)) == 0
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
def test_an_option_that_would_have_no_effect_is_refused(sweep, capsys, arguments, complaint):
    with pytest.raises(SystemExit):
        command.main(sweep, arguments)
    assert complaint in capsys.readouterr().err
