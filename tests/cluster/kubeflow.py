"""What the smoke test asks of a real cluster: runs and their steps, pods, runs in MLflow. Expects nothing."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
_ENDED = re.compile(
    r"^[\d:]{8}  (.+) (succeeded|succeeded, from the cache|failed|was stopped)$", re.MULTILINE
)


def until(true: Callable[[], Any], what: str, seconds: float) -> Any:
    """What `true` returns once that is true of anything; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(2)
    return found


class Submission:
    """A command that submits a run and waits for it. What it prints is shown, and kept in `text`."""

    def __init__(self, command: list[str]) -> None:
        print(f"\n$ {shlex.join(command)}", flush=True)
        self.text = ""
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        submitted = self.says(r"submitted run (\S+) \((\S+)\): (\S+)", 300)
        self.name, self.run_id, self.address = submitted.groups()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self.text += line
            sys.stdout.write(line)
            sys.stdout.flush()

    def says(self, pattern: str, seconds: float = 1200) -> re.Match[str]:
        """The first match in what it prints; fails when the command ends without one."""

        def said() -> re.Match[str] | None:
            ended = not self._reader.is_alive()
            found = re.search(pattern, self.text)
            assert found or not ended, f"the command ended without {pattern!r}:\n{self.text}"
            return found

        return until(said, pattern, seconds)

    @property
    def status(self) -> int:
        """The exit status; waits for the command's end."""
        status = self._process.wait(3600)
        self._reader.join(10)
        return status

    @property
    def steps(self) -> dict[str, str]:
        """How each step ended, by its name."""
        return dict(_ENDED.findall(self.text))


class Tree(NamedTuple):
    """The MLflow run of a pipeline run, and those right below it."""

    root: Any
    children: list[Any]

    def child(self, name: str) -> Any:
        (child,) = [one for one in self.children if one.info.run_name == name]
        return child


class Cluster:
    """One Kubeflow Pipelines with a profile.

    Attributes:
        name: of all that a session makes: experiment, registered model, pipeline.
        runs, pipelines: their ids, for the end.
        mlflow: a client of the tracking server, and `kubectl` the first words of a command; None where
            `lacks` says why they are not to be had.
    """

    def __init__(self, endpoint: str, namespace: str, profile: str, options: list[str], folder: Path) -> None:
        from softpref.pipelines.profiles import CLUSTERS, read_profile
        from softpref.pipelines.submission import _client, _namespace, add_client_options

        self.namespace, self._folder = namespace, folder
        self._options = ["--endpoint", endpoint, "--namespace", namespace, *options]
        parser = argparse.ArgumentParser()
        add_client_options(parser)
        parsed = parser.parse_args(self._options)
        self.client = _client(parsed)
        self.kfp_namespace = _namespace(self.client, parsed)
        self.profile = read_profile(profile)
        self._profile_file = (
            Path(profile) if profile.endswith((".yaml", ".yml")) else CLUSTERS / f"{profile}.yaml"
        )
        self.name = f"softpref-smoke-{time.strftime('%Y%m%d-%H%M%S')}"
        self._seed = str(int(time.time()))  # what earlier sessions left in the cache does not serve
        self.runs: list[str] = []
        self.pipelines: list[str] = []
        self.lacks: dict[str, str] = {}
        self.mlflow, self.kubectl = self._find_mlflow(), self._find_kubectl()

    def _find_mlflow(self) -> Any:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            self.lacks["mlflow"] = "MLFLOW_TRACKING_URI is not given"
            return None
        from mlflow import MlflowClient

        client = MlflowClient(uri)
        try:
            client.search_experiments(max_results=1)
        except Exception as error:  # whatever the network or the server came up with
            self.lacks["mlflow"] = f"MLflow at {uri}: {error}"
            return None
        return client

    def _find_kubectl(self) -> list[str] | None:
        command = ["kubectl", "--namespace", self.namespace]
        try:
            subprocess.run([*command, "get", "pods"], check=True, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip()
            self.lacks["kubectl"] = f"kubectl: {said.splitlines()[-1]}"
            return None
        return command

    # ------------------------------------------------------------------ runs

    def command(self, pipeline: str, *arguments: str, uncached: str = "") -> list[str]:
        """The product's command line for this cluster.

        Args:
            uncached: a stage that the cache shall not serve.
        """
        profile = self._profile_file
        if uncached:
            values = yaml.safe_load(profile.read_text(encoding="utf-8"))
            values["stages"][uncached] = {**(values["stages"].get(uncached) or {}), "cache": False}
            profile = self._folder / f"{profile.stem}-uncached.yaml"
            profile.write_text(yaml.safe_dump(values), encoding="utf-8")
        own = ["--recipe", str(self._recipe()), "--seed", self._seed]
        own += ["--experiment", self.name, "--registered-model-name", self.name]
        script = str(REPOSITORY / f"pipelines/{pipeline}.py")
        return [sys.executable, script, *arguments, "--cluster", str(profile), *own]

    def submit(self, pipeline: str, *arguments: str, uncached: str = "") -> Submission:
        to_cluster = ["--runner", "cluster", *self._options, "--wait"]
        run = Submission(self.command(pipeline, *to_cluster, *arguments, uncached=uncached))
        self.runs.append(run.run_id)
        return run

    def _recipe(self) -> Path:
        """The embedded recipe, with training of a minute or so; the baseline stays what the reference is."""
        recipe = yaml.safe_load((REPOSITORY / "pipelines/recipes/embedded.yaml").read_text(encoding="utf-8"))
        recipe |= {"rows": 6000, "samples_per_prompt": 16, "min_win_rate": 0.0}
        recipe |= {"sft_num_train_epochs": 1, "num_train_epochs": 1}
        recipe |= {"alphas": [0.5], "baselines": ["dpo:1,max_steps=2,learning_rate=1e-9"]}
        recipe["data_overrides"] |= {"sft_rows": 6000}
        recipe["train_overrides"] |= {"per_device_train_batch_size": 32, "logging_steps": 5, "save_steps": 20}
        recipe["evaluation_overrides"] = {"exact_prompts": 1, "bootstrap_samples": 100}
        path = self._folder / "smoke.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return path

    def inputs(self, run_id: str, task: str) -> list[dict[str, dict[str, Any]]]:
        """The artifacts that each pod of a task was given, by name, as Kubeflow's metadata store had them."""
        from softpref.pipelines.waiting import _workflow

        found = []
        for node in _workflow(self.client, run_id)["status"]["nodes"].values():
            if node["type"] == "Pod" and f".{task}(" in node["name"] and ".executor" in node["name"]:
                parameters = {one["name"]: one["value"] for one in node["inputs"]["parameters"]}
                launcher = json.loads(parameters["pod-spec-patch"])["containers"][0]["command"]
                given = json.loads(launcher[launcher.index("--executor_input") + 1])["inputs"]
                found.append({name: one["artifacts"][0] for name, one in given["artifacts"].items()})
        return found

    # ------------------------------------------------------------------ pods and MLflow

    def kubernetes(self, *arguments: str) -> str:
        command = [*(self.kubectl or ()), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout

    def pods(self, run_id: str, task: str = "") -> list[dict[str, Any]]:
        """The pods that steps of a run have for their containers, or those of one task; oldest first."""
        found = self.kubernetes("get", "pods", "-l", f"pipeline/runid={run_id}", "-o", "json")
        pods = sorted(json.loads(found)["items"], key=lambda pod: pod["metadata"]["creationTimestamp"])
        node = "workflows.argoproj.io/node-name"
        return [
            pod
            for pod in pods
            if f".{task}" in (name := pod["metadata"]["annotations"].get(node, "")) and ".executor" in name
        ]

    def tree(self, run_id: str) -> Tree | None:
        """What MLflow has of a pipeline run, in whatever experiment; None as long as it has nothing."""
        places = [experiment.experiment_id for experiment in self.mlflow.search_experiments()]
        roots = self.mlflow.search_runs(places, f"tags.`kfp.pipeline_run_id` = '{run_id}'")
        roots = [root for root in roots if "mlflow.parentRunId" not in root.data.tags]
        if not roots:
            return None
        (root,) = roots
        below = f"tags.`mlflow.parentRunId` = '{root.info.run_id}'"
        return Tree(root, self.mlflow.search_runs(places, below))

    def losses(self, run_id: str, model: str) -> dict[int, float]:
        """The training loss of a model by step, as far as MLflow has it."""
        tree = self.tree(run_id)
        if not (tree and model in [child.info.run_name for child in tree.children]):
            return {}
        points = self.mlflow.get_metric_history(tree.child(model).info.run_id, "loss")
        return {point.step: point.value for point in points}

    # ------------------------------------------------------------------ the end

    def clean_up(self) -> None:
        """End what runs, archive the runs, delete what MLflow has of them; the sweep's version stays."""
        for run_id in self.runs:
            if self.client.get_run(run_id).state in ("PENDING", "RUNNING"):
                self.client.terminate_run(run_id)
            self.client.archive_run(run_id)
        for pipeline_id in self.pipelines:
            for version in self.client.list_pipeline_versions(pipeline_id).pipeline_versions:
                self.client.delete_pipeline_version(pipeline_id, version.pipeline_version_id)
            self.client.delete_pipeline(pipeline_id)
        if not self.mlflow:
            return
        for tree in filter(None, map(self.tree, self.runs)):
            for run in (*tree.children, tree.root):
                self.mlflow.delete_run(run.info.run_id)
        for model in self.mlflow.search_registered_models(f"name = '{self.name}'"):
            self.mlflow.delete_registered_model(model.name)
        if experiment := self.mlflow.get_experiment_by_name(self.name):
            self.mlflow.delete_experiment(experiment.experiment_id)
