"""The pipelines on a real Kubeflow Pipelines, as users run them: half an hour on two cores.

`make test-cluster ENDPOINT=… NAMESPACE=…` runs it, with the embedded recipe, shortened. The first run is
a sweep of two models; the others are compared with it.
"""

import json
import re
import subprocess
import time
from functools import partial

import pytest

from .kubeflow import until

MODEL, BASELINE, SOFTER = "spo-alpha-0.5", "dpo-beta-1", "spo-alpha-1"
SHARED = ["Prepare preferences", "Train the reference"]
OWN = ["Check, plan the sweep", "Compare and choose", "importer", "Register", "End the run in MLflow"]
CACHED = "succeeded, from the cache"


def of_models(*models):
    return [f"{step} ({model})" for model in models for step in ("Align the policy", "Evaluate")]


def statuses(tree):
    return {run.info.run_name: run.info.status for run in tree.children}


@pytest.fixture(scope="module")
def sweep(cluster):
    run = cluster.submit("spo_sweep")
    assert run.status == 0, run.text
    return run


@pytest.fixture(scope="module")
def hashes(cluster, mlflow):
    """A function: hash of the weights by number of each version that was registered in this session."""

    def registered():
        versions = mlflow.search_model_versions(f"name = '{cluster.name}'")
        return {version.version: version.tags["model_hash"] for version in versions}

    return registered


# ---------------------------------------------------------------------- a sweep


def test_sweep_succeeds_and_says_how_each_step_ended(cluster, sweep):
    expected = [*SHARED, *OWN, *of_models(MODEL, BASELINE)]
    assert sweep.steps == dict.fromkeys(expected, "succeeded")
    assert sweep.address.endswith(f"/#/runs/details/{sweep.run_id}")
    assert cluster.client.get_run(sweep.run_id).state == "SUCCEEDED"


def test_sweep_hands_artifacts_on_that_say_what_they_are(cluster, sweep):
    evaluated = {
        one["policy"]["metadata"]["name"]: one for one in cluster.inputs(sweep.run_id, "evaluate-model")
    }
    assert evaluated.keys() == {MODEL, BASELINE}
    policy, dataset = evaluated[MODEL]["policy"], evaluated[MODEL]["dataset"]
    assert (policy["metadata"]["method"], policy["metadata"]["alpha"]) == ("spo", 0.5)
    assert dataset["metadata"]["source"] == "story"
    assert dataset["metadata"]["train_rows"] > 0
    assert {one["dataset"]["uri"] for one in evaluated.values()} == {dataset["uri"]}
    (registered,) = cluster.inputs(sweep.run_id, "register-model")
    assert registered["model"]["uri"] == policy["uri"]  # the chosen one, where its training put it
    assert registered["evaluation"]["metadata"]["name"] == MODEL


@pytest.mark.usefixtures("kubernetes")
def test_sweep_has_a_pod_for_each_step_of_our_images_and_users_without_gpus(cluster, sweep):
    pods = cluster.pods(sweep.run_id)
    if not pods:
        pytest.skip("this cluster deletes the pods of a run at once")
    assert len(pods) == len(sweep.steps) - 1  # KFP's importer is none of ours
    for pod in pods:
        (main,) = [one for one in pod["spec"]["containers"] if one["name"] == "main"]
        assert main["image"] in cluster.profile.images.values()
        assert main["securityContext"]["runAsUser"] == cluster.profile.user
        assert cluster.profile.gpu.resource not in main["resources"].get("limits", {})


@pytest.mark.usefixtures("mlflow")
def test_sweep_is_one_tree_in_mlflow_and_all_of_it_has_ended(cluster, sweep):
    tree = cluster.tree(sweep.run_id)
    assert (tree.root.info.run_name, tree.root.info.status) == (sweep.name, "FINISHED")
    assert tree.root.data.tags["kfp.pipeline_run_url"] == sweep.address
    assert json.loads(tree.root.data.params["alphas"]) == [0.5]
    files = cluster.mlflow.list_artifacts(tree.root.info.run_id, "comparison")
    assert "comparison/report.html" in [file.path for file in files]
    assert statuses(tree) == dict.fromkeys(["reference", MODEL, BASELINE], "FINISHED")
    assert len(tree.children) == 3
    assert {"loss", "eval_loss"} <= tree.child("reference").data.metrics.keys()
    model = tree.child(MODEL).data
    assert {"loss", "kl/sequence", "eval/win_rate", "eval/expected_reward"} <= model.metrics.keys()
    assert (model.params["method"], float(model.params["alpha"])) == ("spo", 0.5)
    assert "eval/win_rate" in tree.child(BASELINE).data.metrics


def test_sweep_registers_the_chosen_model_as_challenger_and_champion(cluster, sweep, mlflow):
    version = mlflow.get_model_version_by_alias(cluster.name, "champion")
    assert mlflow.get_model_version_by_alias(cluster.name, "challenger").version == version.version
    assert (version.tags["name"], version.status) == (MODEL, "READY")
    assert version.run_id == cluster.tree(sweep.run_id).child(MODEL).info.run_id


# ---------------------------------------------------------------------- the cache


@pytest.fixture(scope="module")
def one_more(cluster, sweep):
    """The same sweep with one more softness."""
    run = cluster.submit("spo_sweep", "--alphas", "0.5", "1")
    assert run.status == 0, run.text
    return run


def test_cache_serves_data_and_models_of_an_earlier_sweep_and_one_more_softness_trains_alone(one_more):
    cached, anew = [*SHARED, *of_models(MODEL, BASELINE)], [*OWN, *of_models(SOFTER)]
    assert one_more.steps == dict.fromkeys(cached, CACHED) | dict.fromkeys(anew, "succeeded")


@pytest.mark.usefixtures("mlflow")
def test_cache_leaves_the_tree_in_mlflow_to_what_ran(cluster, one_more):
    tree = cluster.tree(one_more.run_id)
    assert (tree.root.info.run_name, tree.root.info.status) == (one_more.name, "FINISHED")
    assert statuses(tree) == {SOFTER: "FINISHED"}


# ---------------------------------------------------------------------- a deleted pod


def _reaches(cluster, run_id, step):
    return max(cluster.losses(run_id, MODEL), default=0) >= step


@pytest.fixture(scope="module")
def deleted(cluster, sweep, hashes, kubernetes):
    """The chosen model trained again, its pod deleted at half: the run, and what was registered before."""
    train = cluster.profile.stages["train"]
    if cluster.profile.trainjob or not (cluster.profile.checkpoints and train.retries):
        pytest.skip("the profile keeps no checkpoints for a step that is tried again")
    before, last = hashes(), max(cluster.losses(sweep.run_id, MODEL))
    for _ in range(3):
        run = cluster.submit("spo_sweep", "--alphas", "0.5", "--baselines", uncached="train")
        run.says(r"Align the policy \(.*\) started")
        (pod,) = cluster.pods(run.run_id, "train-policy")
        half = partial(_reaches, cluster, run.run_id, last / 2)
        until(half, "half of the training", 1200)
        kubernetes("delete", "pod", pod["metadata"]["name"], "--wait=false")
        if run.status == 0:
            break
        # Argo has seen the pod end before it was gone, and calls that a failure, which is not tried again
        assert "its pod was ended from outside" in run.text
    assert run.status == 0, run.text
    return run, before


def test_deleted_pod_is_replaced_and_goes_on_from_the_checkpoint(cluster, deleted, kubernetes):
    run, _ = deleted
    assert f"Align the policy ({MODEL}) started again, attempt 2" in run.text
    pod = cluster.pods(run.run_id, "train-policy")[-1]
    log = kubernetes("logs", pod["metadata"]["name"], "-c", "main")
    step = re.search(r"continuing from \S*/checkpoint-(\d+)", log)
    assert step, log
    assert int(step[1]) > 0


def test_deleted_pod_leaves_one_run_in_mlflow_and_the_same_weights(cluster, sweep, deleted, hashes):
    run, before = deleted
    tree = cluster.tree(run.run_id)
    assert (tree.root.info.status, statuses(tree)) == ("FINISHED", {MODEL: "FINISHED"})
    assert len(tree.children) == 1
    assert cluster.losses(run.run_id, MODEL) == cluster.losses(sweep.run_id, MODEL)
    assert hashes() == before  # the registry knew these weights: no version of its own


# ---------------------------------------------------------------------- a failing step


@pytest.fixture(scope="module")
def failing(cluster):
    run = cluster.submit("spo_sweep", "--data-overrides", json.dumps({"max_characters": 1}))
    assert run.status == 1, run.text
    return run


def test_failing_step_is_named_with_its_reason(failing):
    assert failing.steps["Prepare preferences"] == "failed"
    reason = r"error: Prepare preferences failed: none of the 6000 rows of story can be used: longer than"
    assert re.search(reason, failing.text), failing.text
    assert failing.text.rstrip().endswith(failing.address)


@pytest.mark.usefixtures("mlflow")
def test_failing_run_is_failed_in_mlflow(cluster, failing):
    tree = cluster.tree(failing.run_id)
    assert (tree.root.info.run_name, tree.root.info.status, tree.children) == (failing.name, "FAILED", [])


# ---------------------------------------------------------------------- a terminated run


@pytest.fixture(scope="module")
def terminated(cluster):
    # far longer than it takes to stop it
    run = cluster.submit("spo_sweep", "--alphas", "2", "--baselines", "--num-train-epochs", "50")
    run.says(r"Align the policy \(.*\) started")
    if cluster.mlflow:
        until(lambda: cluster.losses(run.run_id, "spo-alpha-2"), "the first loss", 600)
    cluster.client.terminate_run(run.run_id)
    assert run.status == 130, run.text
    return run


def test_terminated_run_is_no_failed_one(terminated):
    assert f"error: the run was terminated; see {terminated.address}" in terminated.text
    assert terminated.steps["Align the policy (spo-alpha-2)"] == "was stopped"


@pytest.mark.usefixtures("kubernetes")
def test_terminated_run_leaves_no_pod_running(cluster, terminated):
    def gone():
        pods = json.loads(
            cluster.kubernetes("get", "pods", "-l", f"pipeline/runid={terminated.run_id}", "-o", "json")
        )
        return not [pod for pod in pods["items"] if pod["status"]["phase"] in ("Pending", "Running")]

    until(gone, "the end of all pods", 45)


@pytest.mark.usefixtures("mlflow")
def test_terminated_run_is_killed_in_mlflow(cluster, terminated):
    def ended():
        tree = cluster.tree(terminated.run_id)
        return tree if tree and tree.root.info.status != "RUNNING" else None

    tree = until(ended, "the end of the run in MLflow", 60)
    by_plugin = "mlflow" in (cluster.client.get_run(terminated.run_id).plugins_output or {})
    # KFP's MLflow plugin writes what KFP calls a terminated run, after the last step
    assert tree.root.info.status in ("KILLED", *(["FAILED"] if by_plugin else []))
    assert tree.root.data.tags["softpref.ended"] == "KILLED"
    found = statuses(tree)
    assert found.pop("reference", "FINISHED") == "FINISHED"  # there where this test came first and trained it
    assert found == {"spo-alpha-2": "KILLED"}


# ---------------------------------------------------------------------- GPUs


@pytest.mark.usefixtures("kubernetes")
def test_gpus_are_what_the_pod_of_a_training_asks_for(cluster):
    """Where there is none it waits; either way the run is ended once the pod is there."""
    if cluster.profile.trainjob or cluster.profile.fixed_gpus is not None:
        pytest.skip("the profile says how many GPUs a training has")
    use = json.dumps({"use_cpu": False})
    run = cluster.submit("spo_sweep", "--gpus", "1", "--sft-overrides", use, "--train-overrides", use)
    (pod, *_) = until(lambda: cluster.pods(run.run_id, "train-reference"), "the pod of the training", 900)
    (main,) = [one for one in pod["spec"]["containers"] if one["name"] == "main"]
    assert main["resources"]["limits"][cluster.profile.gpu.resource] == "1"
    cluster.client.terminate_run(run.run_id)
    assert run.status == 130, run.text


# ---------------------------------------------------------------------- a package of the UI


def test_single_package_is_uploaded_and_succeeds_with_its_form_left_alone(cluster, tmp_path):
    client, package = cluster.client, tmp_path / "spo_pipeline.yaml"
    short = json.dumps({"max_steps": 20})
    command = cluster.command("spo_pipeline", "compile", "--train-overrides", short, "--output", str(package))
    subprocess.run(command, check=True, timeout=300)
    pipeline = client.upload_pipeline(str(package), cluster.name, namespace=cluster.kfp_namespace)
    cluster.pipelines.append(pipeline.pipeline_id)
    (version,) = client.list_pipeline_versions(pipeline.pipeline_id).pipeline_versions
    experiment = client.create_experiment(cluster.name, namespace=cluster.kfp_namespace)
    run = client.run_pipeline(
        experiment.experiment_id,
        f"spo-pipeline-{time.strftime('%H%M%S')}",
        pipeline_id=pipeline.pipeline_id,
        version_id=version.pipeline_version_id,
        service_account=cluster.profile.service_account or None,
    )
    cluster.runs.append(run.run_id)
    assert client.wait_for_run_completion(run.run_id, 2400).state == "SUCCEEDED"
    if cluster.mlflow:
        tree = cluster.tree(run.run_id)
        assert (tree.root.info.run_name, tree.root.info.status) == (run.display_name, "FINISHED")
        assert statuses(tree) == {"reference": "FINISHED", SOFTER: "FINISHED"}
