"""What a cluster profile says is what the compiled package carries, read from the package itself."""

import json
import re

import pytest
import yaml
from softpref.pipelines.graph import pipeline
from softpref.pipelines.packages import compile_package
from softpref.pipelines.profiles import read_profile

PROFILE = """
images:
  data: registry.example/team/softpref-data:1.2.3
  train: registry.example/team/softpref-train@sha256:{digest}
  evaluate: registry.example/team/softpref-evaluate:1.2.3
image_pull_policy: Always
image_pull_secrets: [pull-secret]
service_account: trainer
user: 1234
parameters: {{ tracking_uri: "http://tracking.example:5000", gpus: 2 }}
secrets:
  MLFLOW_TRACKING_PASSWORD: {{ secret: tracking, key: password }}
  HF_TOKEN: {{ secret: hub, key: token, optional: true }}
environment: {{ HF_HOME: /cache }}
labels: {{ team: research }}
annotations: {{ sidecar.istio.io/inject: "false" }}
gpu:
  resource: vendor.example/gpu
  node_selector: {{ gpu-type: large }}
  tolerations: [{{ key: gpus-only, operator: Exists, effect: NoSchedule, tolerationSeconds: 60 }}]
  shared_memory: 3Gi
stages:
  all: {{ cpu: "2", memory: 4Gi, timeout: 100, retries: 1 }}
  data: {{ node_selector: {{ disk: fast }}, cache: false }}
  sft: {{ gpus: parameter }}
  train: {{ gpus: parameter, memory: 32Gi, timeout: 7200 }}
  evaluate: {{ gpus: 1 }}
models_at_once: 3
""".format(digest="ab" * 32)


@pytest.fixture(scope="module")
def compiled(sweep, tmp_path_factory):
    """Compiles the sweep with a profile's text; returns its pipeline and its Kubernetes part."""

    def compiled(text, parameters=None):
        folder = tmp_path_factory.mktemp("profile")
        file = folder / "lab.yaml"
        file.write_text(text)
        package = compile_package(sweep, folder / "package.yaml", read_profile(str(file)), parameters)
        spec, platform = yaml.safe_load_all(package.read_text())
        return spec, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]

    return compiled


@pytest.fixture(scope="module")
def package(compiled):
    return compiled(PROFILE)


def containers(spec):
    executors = spec["deploymentSpec"]["executors"]
    return {name: one["container"] for name, one in executors.items() if "container" in one}


def test_only_images_of_the_profile_are_named(package):
    spec, _ = package
    images = {name: container["image"] for name, container in containers(spec).items()}
    training = "registry.example/team/softpref-train@sha256:" + "ab" * 32
    assert images == {
        "exec-plan-sweep": training,
        "exec-prepare-data": "registry.example/team/softpref-data:1.2.3",
        "exec-train-reference": training,
        "exec-train-policy": training,
        "exec-evaluate-model": "registry.example/team/softpref-evaluate:1.2.3",
        "exec-compare-models": "registry.example/team/softpref-evaluate:1.2.3",
        "exec-register-model": "registry.example/team/softpref-evaluate:1.2.3",
        "exec-finish-run": training,
    }


def test_training_stages_ask_for_the_gpus_of_the_form(package):
    spec, platform = package
    field = spec["root"]["inputDefinitions"]["parameters"]["gpus"]
    assert (field["parameterType"], field["defaultValue"]) == (
        "STRING",
        "2",
    )  # KFP limits nothing by a number
    for name in ("exec-train-reference", "exec-train-policy"):
        accelerator = containers(spec)[name]["resources"]["accelerator"]
        assert accelerator["resourceType"] == "vendor.example/gpu"
        assert accelerator["resourceCount"] == "{{$.inputs.parameters['pipelinechannel--gpus']}}"
        assert platform[name]["nodeSelector"]["labels"] == {"gpu-type": "large"}
        (toleration,) = platform[name]["tolerations"]
        assert toleration.pop("tolerationSeconds") in (60, "60")
        assert toleration == {"key": "gpus-only", "operator": "Exists", "effect": "NoSchedule"}
        (volume,) = platform[name]["emptyDirMounts"]
        assert volume["mountPath"] == "/dev/shm"
        assert (volume["medium"], volume["sizeLimit"]) == ("Memory", "3Gi")


def test_evaluation_asks_for_its_own_gpu_and_the_others_for_none(package):
    spec, platform = package
    assert containers(spec)["exec-evaluate-model"]["resources"]["accelerator"]["resourceCount"] == "1"
    for name in ("exec-plan-sweep", "exec-prepare-data", "exec-compare-models", "exec-register-model"):
        assert "accelerator" not in containers(spec)[name]["resources"]
        assert "tolerations" not in platform[name]
        assert "emptyDirMounts" not in platform[name]
    assert platform["exec-prepare-data"]["nodeSelector"]["labels"] == {"disk": "fast"}


def test_limits_timeouts_and_retries(package):
    spec, platform = package
    for name, container in containers(spec).items():
        training = name == "exec-train-policy"
        assert container["resources"]["resourceCpuLimit"] == "2"
        assert container["resources"]["resourceCpuRequest"] == "2"
        assert container["resources"]["resourceMemoryLimit"] == ("32Gi" if training else "4Gi")
        assert int(platform[name]["activeDeadlineSeconds"]) == (7200 if training else 100)
    tasks = tasks_of(spec)
    for name in TASKS:
        # KFP's own limit of one hour is for all attempts together
        whole = (1 + 1) * (7200 if name == "train-policy" else 100) + 30 * 2
        assert tasks[name]["retryPolicy"] == {
            "maxRetryCount": 1,
            "backoffDuration": "30s",
            "backoffFactor": 2.0,
            "backoffMaxDuration": f"{whole}s",
        }


def test_what_changes_from_run_to_run_comes_from_the_pod_and_is_in_no_key_of_the_cache(package):
    spec, platform = package
    for name in containers(spec):
        fields = {one["name"]: one["fieldPath"] for one in platform[name]["fieldPathAsEnv"]}
        assert fields["SOFTPREF_RUN_ID"] == "metadata.labels['pipeline/runid']"
    told = {name for name, task in tasks_of(spec).items() if "pipeline_job_name" in json.dumps(task)}
    assert told == {"plan-sweep", "finish-run"}  # neither is ever taken from the cache
    assert not {"parent_run_id", "run_name"} & set(spec["root"]["inputDefinitions"]["parameters"])


def test_packages_are_ascii(package):
    """KFP's API server refuses a package whose letters its database's encoding lacks."""
    spec, platform = package
    assert json.dumps([spec, platform], ensure_ascii=False).isascii()


def test_no_importer_waits_for_a_task(package, compiled):
    spec, _ = package
    (chosen,) = [one["importer"] for one in spec["deploymentSpec"]["executors"].values() if "importer" in one]
    assert chosen["artifactUri"] == {"runtimeParameter": "uri"}
    # it starts with the part that it belongs to, whose input its address is
    (part,) = [
        one["dag"] for one in spec["components"].values() if "importer" in one.get("dag", {}).get("tasks", {})
    ]
    assert part["tasks"]["importer"]["inputs"]["parameters"] == {
        "uri": {"componentInputParameter": "model_uri"}
    }
    assert part["tasks"]["importer"]["taskInfo"] == {
        "name": "importer"
    }  # another name, and KFP does not find it
    artifact = "minio://mlpipeline/v2/artifacts/earlier/dataset"
    spec, _ = compiled(PROFILE, {"source": artifact})
    importers = [one["importer"] for one in spec["deploymentSpec"]["executors"].values() if "importer" in one]
    assert {"constant": artifact} in [one["artifactUri"] for one in importers]
    assert "artifact" in tasks_of(spec)["prepare-data"]["inputs"]["artifacts"]


def test_threads_follow_the_limit_of_cpus(package, compiled):
    spec, _ = package
    for container in containers(spec).values():
        assert {"name": "OMP_NUM_THREADS", "value": "2"} in container["env"]
    spec, _ = compiled(PROFILE.replace('all: { cpu: "2"', "all: { cpu: 1500m"))
    assert {"name": "OMP_NUM_THREADS", "value": "1"} in containers(spec)["exec-train-policy"]["env"]


def test_volumes_are_mounted_where_the_profile_says(compiled):
    volumes = """
volumes:
  - { claim: team-data, path: /data, sub_path: pairs, stages: [plan, data] }
  - { claim: models, path: /models }
"""
    spec, platform = compiled(PROFILE + volumes)
    for name in containers(spec):
        mounts = [(one["mountPath"], one.get("subPath", "")) for one in platform[name]["pvcMount"]]
        some = [("/data", "pairs")] if name in ("exec-plan-sweep", "exec-prepare-data") else []
        assert mounts == [*some, ("/models", "")]


TASKS = {
    "plan-sweep",
    "prepare-data",
    "train-reference",
    "train-policy",
    "evaluate-model",
    "compare-models",
    "register-model",
}


def tasks_of(spec):
    groups = [spec["root"], *spec["components"].values()]
    return {name: task for group in groups for name, task in group.get("dag", {}).get("tasks", {}).items()}


def test_secrets_are_referenced_in_every_task(package):
    spec, platform = package
    for name in containers(spec):
        found = {
            one["keyToEnv"][0]["envVar"]: (
                one["secretName"],
                one["keyToEnv"][0]["secretKey"],
                one["optional"],
            )
            for one in platform[name]["secretAsEnv"]
        }
        assert found == {
            "MLFLOW_TRACKING_PASSWORD": ("tracking", "password", False),
            "HF_TOKEN": ("hub", "token", True),
        }
        assert {"name": "HF_HOME", "value": "/cache"} in containers(spec)[name]["env"]


def test_caching_as_the_profile_says_and_never_where_a_task_must_run_anew(package):
    spec, _ = package
    cached = {
        name: bool(task["cachingOptions"].get("enableCache"))
        for name, task in tasks_of(spec).items()
        if name in TASKS
    }
    assert cached == {
        "plan-sweep": False,  # opens a tracking run
        "prepare-data": False,  # the profile says so
        "train-reference": True,
        "train-policy": True,
        "evaluate-model": True,
        "compare-models": False,  # this run's tree in MLflow gets it
        "register-model": False,  # the registry decides
    }


def test_pods_carry_user_labels_and_pull_settings(package):
    spec, platform = package
    for name in containers(spec):
        pod = platform[name]
        assert pod["podMetadata"]["labels"] == {"team": "research"}
        assert pod["podMetadata"]["annotations"] == {"sidecar.istio.io/inject": "false"}
        assert pod["imagePullPolicy"] == "Always"
        assert [one["secretName"] for one in pod["imagePullSecret"]] == ["pull-secret"]
        context = pod["securityContext"]
        assert (int(context["runAsUser"]), context["runAsNonRoot"]) == (1234, True)


def test_models_at_once(package, compiled):
    spec, _ = package
    loops = [task["iteratorPolicy"] for task in tasks_of(spec).values() if "iteratorPolicy" in task]
    assert loops == [{"parallelismLimit": 3}]
    spec, _ = compiled(PROFILE.replace("models_at_once: 3", "models_at_once: 0"))
    assert not [task for task in tasks_of(spec).values() if "iteratorPolicy" in task]


def test_a_fixed_number_of_gpus_takes_the_field_from_the_form(compiled):
    text = PROFILE.replace("gpus: parameter", "gpus: 4").replace(", gpus: 2", "")
    spec, _ = compiled(text)
    assert "gpus" not in spec["root"]["inputDefinitions"]["parameters"]
    assert containers(spec)["exec-train-policy"]["resources"]["accelerator"]["resourceCount"] == "4"
    given = tasks_of(spec)["train-policy"]["inputs"]["parameters"]["gpus"]
    assert given["runtimeValue"]["constant"] == "4"  # what the stage checks at its start


def test_the_form_shows_the_parameters_given(compiled):
    spec, _ = compiled(PROFILE, {"alphas": [0.25], "experiment": "tone", "tracking_uri": "http://other:1"})
    shown = {
        name: one.get("defaultValue") for name, one in spec["root"]["inputDefinitions"]["parameters"].items()
    }
    assert (shown["alphas"], shown["experiment"]) == ([0.25], "tone")
    assert shown["tracking_uri"] == "http://other:1"
    spec, _ = compiled(PROFILE)
    shown = spec["root"]["inputDefinitions"]["parameters"]
    assert shown["tracking_uri"]["defaultValue"] == "http://tracking.example:5000"


def test_training_as_jobs_moves_gpus_and_secrets_to_the_nodes(compiled):
    from softpref.distributed.config import parse_launcher

    spec, platform = compiled(
        PROFILE + "trainjob: { volume_claim: team-volume, mount_path: /data, nodes: 3 }\n"
    )
    for name in ("train-reference", "train-policy"):
        assert "accelerator" not in containers(spec)[f"exec-{name}"]["resources"]
        (mount,) = platform[f"exec-{name}"]["pvcMount"]
        assert mount["mountPath"] == "/data"
        assert mount["constant"] == "team-volume"
        text = tasks_of(spec)[name]["inputs"]["parameters"]["launcher"]["runtimeValue"]["constant"]
        job = parse_launcher(text).job
        assert (job.nodes, job.volume_claim, job.gpu_resource) == (3, "team-volume", "vendor.example/gpu")
        assert job.image.endswith("ab" * 32)
        assert job.node_selector == {"gpu-type": "large"}
        assert job.secrets == {"MLFLOW_TRACKING_PASSWORD": "tracking/password", "HF_TOKEN": "hub/token?"}
        assert (job.user, job.pod_labels, job.timeout) == (1234, {"team": "research"}, 7200)
        assert job.pod_annotations == {"sidecar.istio.io/inject": "false"}
        assert job.shared_memory == "3Gi"
    assert "pvcMount" not in platform["exec-evaluate-model"]
    assert containers(spec)["exec-evaluate-model"]["resources"]["accelerator"]["resourceCount"] == "1"


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("softpref-data:1.2.3", "softpref-data:latest", "images.data"),
        ("softpref-data:1.2.3", "softpref-data", "images.data"),
        ("  evaluate: registry", "  judge: registry", "images needs evaluate"),
        ("memory: 32Gi", "memory: 32GB", "stages.train.memory"),
        ("memory: 32Gi", "memry: 32Gi", "did you mean 'memory'"),
        ("  data: {", "  dataset: {", "did you mean 'data'"),
        ("gpus: 1", "gpus: parameter", "stages.evaluate.gpus"),
        ("  sft: { gpus: parameter }", "  sft: { gpus: 1 }", "must be the same"),
        ("timeout: 7200", "timeout: -1", "stages.train.timeout"),
        ("key: token", "entry: token", "'entry'"),
        ("tolerationSeconds", "toleration_seconds", "tolerationSeconds"),
        ("gpus: 2", "gpu: 2", "did you mean 'gpus'"),
        ("models_at_once", "models_together", "did you mean 'models_at_once'"),
        ("models_at_once: 3", "models_at_once: -1", "models_at_once must be"),
        ("team: research", "team: 7", 'write it in quotes, "7"'),
        ("gpu-type: large", "gpu-type: true", "gpu.node_selector.gpu-type must be text"),
        ("{ secret: hub, key: token, optional: true }", "hub/token", "secrets.HF_TOKEN must be"),
        ("user: 1234", "user: 0", "no stage runs as root"),
        ("operator: Exists", "operator: Exist", "Equal or Exists"),
        ("service_account: trainer", "service_account: The Trainer", "service_account"),
        ("shared_memory: 3Gi", "shared_memory: 3GB", "gpu.shared_memory"),
    ],
)
def test_a_wrong_profile_is_refused_with_its_file_and_entry(sweep, tmp_path, old, new, complaint):
    from softpref.errors import ConfigError

    file = tmp_path / "lab.yaml"
    assert old in PROFILE
    file.write_text(PROFILE.replace(old, new))
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        pipeline(sweep.name, read_profile(str(file)))


def test_an_unknown_profile_names_the_closest():
    from softpref.errors import ConfigError

    with pytest.raises(ConfigError, match="did you mean 'default'"):
        read_profile("defualt")


def test_the_default_profile_names_the_images_that_are_built_here():
    from softpref import images

    names = read_profile("default").images
    assert names == {
        "data": images.DATA_IMAGE,
        "train": images.TRAIN_IMAGE,
        "evaluate": images.EVALUATE_IMAGE,
    }


def test_without_a_profile_nothing_of_kubernetes_is_asked_for(sweep):
    from google.protobuf import json_format

    spec = json_format.MessageToDict(sweep.pipeline_spec)
    assert not sweep.platform_spec.platforms
    assert not [name for name, container in containers(spec).items() if "resources" in container]


def test_checkpoints_on_a_volume_that_outlives_the_pod(compiled):
    from softpref.distributed.config import parse_launcher

    spec, platform = compiled(PROFILE + "checkpoints: { volume_claim: team-volume, mount_path: /data }\n")
    for name in ("train-reference", "train-policy"):
        (mount,) = platform[f"exec-{name}"]["pvcMount"]
        assert (mount["mountPath"], mount["constant"]) == ("/data", "team-volume")
        text = tasks_of(spec)[name]["inputs"]["parameters"]["launcher"]["runtimeValue"]["constant"]
        assert parse_launcher(text).checkpoints == "/data/checkpoints"
        assert "accelerator" in containers(spec)[f"exec-{name}"]["resources"]
    assert "pvcMount" not in platform["exec-evaluate-model"]
