"""Every object of every overlay: valid, without root, without secrets, and of one piece."""

import re
from collections import Counter

import pytest
import yaml

from .conftest import INFRA, OVERLAYS

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)
# the labels of pods that no manifest makes: steps of runs, and nodes of their TrainJobs
_RUN = {"app.kubernetes.io/part-of": "softpref"}
_PODS_OF_RUNS = (_RUN, {**_RUN, "jobset.sigs.k8s.io/jobset-name": "any"})


def workloads(objects):
    """(kind/name, namespace, pod template) of everything that starts pods."""
    for one in objects:
        name = f"{one['kind']}/{one['metadata']['name']}"
        if one["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield name, one["metadata"]["namespace"], one["spec"]["template"]
        elif one["kind"] == "CronJob":
            yield name, one["metadata"]["namespace"], one["spec"]["jobTemplate"]["spec"]["template"]


def containers(template):
    spec = template["spec"]
    return [*spec.get("initContainers", []), *spec["containers"]]


def of_kind(objects, kind):
    return [one for one in objects if one["kind"] == kind]


def names(objects, kind):
    return {(one["metadata"]["namespace"], one["metadata"]["name"]) for one in of_kind(objects, kind)}


def matches(selector, labels):
    """Whether a label selector takes a pod; an empty one takes all."""
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for rule in selector.get("matchExpressions") or []:
        present = rule["key"] in labels
        right = {
            "In": present and labels.get(rule["key"]) in rule.get("values", []),
            "NotIn": labels.get(rule["key"]) not in rule.get("values", []),
            "Exists": present,
            "DoesNotExist": not present,
        }
        if not right[rule["operator"]]:
            return False
    return True


@each_overlay
def test_every_object_is_valid_for_kubernetes(overlay, overlays):
    import kubernetes_validate

    assert overlays[overlay]
    for one in overlays[overlay]:
        if one["kind"] != "ClusterTrainingRuntime":  # what it holds for Kubernetes is validated below
            kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)


@each_overlay
def test_no_object_is_said_twice_and_each_has_its_namespace(overlay, overlays):
    cluster_wide = {"Namespace", "ClusterRole", "ClusterRoleBinding", "ClusterTrainingRuntime"}
    for one in overlays[overlay]:
        assert ("namespace" in one["metadata"]) != (one["kind"] in cluster_wide), one["metadata"]
    keys = Counter(
        (o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in overlays[overlay]
    )
    assert max(keys.values()) == 1


@each_overlay
def test_no_pod_runs_as_root_or_writes_into_its_image(overlay, overlays):
    for name, _, template in workloads(overlays[overlay]):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] > 0, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert "automountServiceAccountToken" in pod, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        assert not any("hostPath" in volume for volume in pod.get("volumes", [])), name
        for container in containers(template):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, (name, container["name"])
            assert security["readOnlyRootFilesystem"] is True, (name, container["name"])
            assert security["capabilities"] == {"drop": ["ALL"]}, (name, container["name"])


@each_overlay
def test_every_container_says_what_it_needs_and_servers_are_probed(overlay, overlays):
    for name, _, template in workloads(overlays[overlay]):
        for container in containers(template):
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys(), (name, container["name"])
            assert "memory" in resources["limits"], (name, container["name"])
        if name.startswith(("Deployment", "StatefulSet")):
            for container in template["spec"]["containers"]:
                ports = {port["name"] for port in container["ports"]}
                for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                    assert container[probe].get("httpGet", {"port": None})["port"] in {*ports, None}, name


@each_overlay
def test_every_image_has_a_place_and_a_version(overlay, overlays):
    import softpref

    for name, _, template in workloads(overlays[overlay]):
        for container in containers(template):
            place, _, tag = container["image"].rpartition(":")
            assert "/" in place, f"{name}: {container['image']} has no entry in the overlay's images"
            assert tag not in ("", "latest"), name
            if "softpref-" in place:
                assert tag == softpref.__version__, name


@each_overlay
def test_no_secret_is_contained(overlay, overlays):
    assert not of_kind(overlays[overlay], "Secret")
    for name, _, template in workloads(overlays[overlay]):
        for container in containers(template):
            for variable in container.get("env", []):
                if re.search("PASSWORD|SECRET|TOKEN|ACCESS_KEY", variable["name"]):
                    assert "secretKeyRef" in variable.get("valueFrom", {}), (name, variable)
    for one in of_kind(overlays[overlay], "ConfigMap"):
        for key, text in one["data"].items():
            if key.endswith(".py"):
                continue
            assert not re.search(r"(?i)(password|secret|token|access_?key)\w*\s*[=:]\s*\S", _values(text)), (
                key
            )


def _values(text):
    """Without the names of a Secret's keys, and without comments."""
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return re.sub(r'"(usernameKey|passwordKey|credentialSecretRef)":.*', "", "\n".join(lines))


@each_overlay
def test_every_secret_that_is_referred_to_is_made_by_the_script(overlay, overlays, made_secrets):
    for name, namespace, template in workloads(overlays[overlay]):
        for secret, key, optional in _secret_references(template):
            if not optional:
                assert key is None or key in made_secrets[namespace, secret], name
                assert (namespace, secret) in made_secrets, name


def _secret_references(template):
    for volume in template["spec"].get("volumes", []):
        if "secret" in volume:
            keys = [item["key"] for item in volume["secret"].get("items", [])] or [None]
            for key in keys:
                yield volume["secret"]["secretName"], key, volume["secret"].get("optional", False)
    for container in containers(template):
        for source in container.get("envFrom", []):
            if "secretRef" in source:
                yield source["secretRef"]["name"], None, source["secretRef"].get("optional", False)
        for variable in container.get("env", []):
            reference = variable.get("valueFrom", {}).get("secretKeyRef")
            if reference:
                yield reference["name"], reference["key"], reference.get("optional", False)


@each_overlay
def test_every_account_config_map_and_claim_exists(overlay, overlays):
    readme = (INFRA / "README.md").read_text(encoding="utf-8")
    objects = overlays[overlay]
    for name, namespace, template in workloads(objects):
        assert (namespace, template["spec"]["serviceAccountName"]) in names(objects, "ServiceAccount"), name
        volumes = template["spec"].get("volumes", [])
        for volume in volumes:
            if "configMap" in volume:
                wanted = volume["configMap"]["name"]
                made_by_hand = f"create configmap {wanted}" in readme
                assert (namespace, wanted) in names(objects, "ConfigMap") or made_by_hand, name
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert (namespace, claim) in names(objects, "PersistentVolumeClaim"), name
        mountable = {volume["name"] for volume in volumes}
        for workload in (*of_kind(objects, "StatefulSet"),):
            if f"StatefulSet/{workload['metadata']['name']}" == name:
                mountable |= {one["metadata"]["name"] for one in workload["spec"]["volumeClaimTemplates"]}
        for container in containers(template):
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= mountable, name
            for source in container.get("envFrom", []):
                if "configMapRef" in source:
                    assert (namespace, source["configMapRef"]["name"]) in names(objects, "ConfigMap"), name


@each_overlay
def test_selectors_find_what_they_are_meant_for(overlay, overlays):
    objects = overlays[overlay]
    pods = [(namespace, template) for _, namespace, template in workloads(objects)]
    for one in objects:
        namespace = one["metadata"].get("namespace")
        own = [template for place, template in pods if place == namespace]
        if one["kind"] in ("Deployment", "StatefulSet"):
            assert matches(one["spec"]["selector"], one["spec"]["template"]["metadata"]["labels"])
        elif one["kind"] == "Service":
            found = [
                t for t in own if matches({"matchLabels": one["spec"]["selector"]}, t["metadata"]["labels"])
            ]
            assert len(found) == 1, one["metadata"]["name"]
            ports = {
                port["name"] for container in found[0]["spec"]["containers"] for port in container["ports"]
            }
            assert {port["targetPort"] for port in one["spec"]["ports"]} <= ports
        elif one["kind"] == "PodDisruptionBudget":
            (target,) = [
                workload
                for workload in of_kind(objects, "Deployment")
                if matches(one["spec"]["selector"], workload["spec"]["template"]["metadata"]["labels"])
            ]
            assert target["spec"]["replicas"] > one["spec"]["minAvailable"]
        elif one["kind"] == "NetworkPolicy":
            labels = [t["metadata"]["labels"] for t in own] + list(_PODS_OF_RUNS)
            assert any(matches(one["spec"]["podSelector"], found) for found in labels), one["metadata"][
                "name"
            ]
        elif one["kind"] == "Ingress":
            for rule in one["spec"]["rules"]:
                for path in rule["http"]["paths"]:
                    assert (namespace, path["backend"]["service"]["name"]) in names(objects, "Service")
                assert rule["host"] in one["spec"]["tls"][0]["hosts"]


@each_overlay
def test_accounts_have_the_least_rights(overlay, overlays):
    objects = overlays[overlay]
    made = [*objects, *(overlays["local"] if overlay == "trainer" else [])]  # where base/runs is too
    roles = [one for one in made if one["kind"] in ("Role", "ClusterRole")]
    for role in roles:
        for rule in role["rules"]:
            assert "*" not in (*rule["apiGroups"], *rule["resources"], *rule["verbs"]), role["metadata"]
            if "secrets" in rule["resources"]:
                assert rule["resourceNames"] == ["mlpipeline-minio-artifact"]
                assert rule["verbs"] == ["get"]
            if {"pods", "deployments", "configmaps"} & set(rule["resources"]):
                assert not {"create", "delete", "update"} & set(rule["verbs"])
            if role["kind"] == "ClusterRole":
                assert set(rule["verbs"]) <= {"get", "list", "watch"}
    for binding in (one for one in objects if one["kind"] in ("RoleBinding", "ClusterRoleBinding")):
        kind, name = binding["roleRef"]["kind"], binding["roleRef"]["name"]
        assert any(role["kind"] == kind and role["metadata"]["name"] == name for role in roles)
        for subject in binding["subjects"]:
            namespace = subject.get("namespace", binding["metadata"].get("namespace"))
            assert (namespace, subject["name"]) in names(objects, "ServiceAccount")
    for name, namespace, template in workloads(objects):
        account = template["spec"]["serviceAccountName"]
        bound = any(
            subject["name"] == account and binding["metadata"].get("namespace") == namespace
            for binding in of_kind(objects, "RoleBinding")
            for subject in binding["subjects"]
        )
        assert template["spec"]["automountServiceAccountToken"] == bound, name


def test_only_the_account_for_it_may_make_train_jobs(overlays):
    """Who may, may read every Secret of the namespace: a TrainJob's pods may mount them."""
    for overlay in OVERLAYS:
        objects = overlays[overlay]
        makers = {
            role["metadata"]["name"]
            for role in of_kind(objects, "Role")
            if any("trainjobs" in rule["resources"] for rule in role["rules"])
        }
        may = {
            subject["name"]
            for binding in of_kind(objects, "RoleBinding")
            if binding["roleRef"]["name"] in makers
            for subject in binding["subjects"]
        }
        assert may == ({"softpref-trainer"} if overlay == "trainer" else set())


@each_overlay
def test_namespaces_bound_what_their_pods_may(overlay, overlays):
    made = {
        one["metadata"]["name"]: one["metadata"]["labels"] for one in of_kind(overlays[overlay], "Namespace")
    }
    for _, namespace, _ in workloads(overlays[overlay]):
        assert made[namespace]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_jobs_name_settings_that_exist(overlays):
    """$(NAME) in arguments comes from the container's environment; Kubernetes leaves unknown ones as text."""
    for overlay in OVERLAYS:
        settings = {
            (one["metadata"]["namespace"], one["metadata"]["name"]): one["data"]
            for one in of_kind(overlays[overlay], "ConfigMap")
        }
        for name, namespace, template in workloads(overlays[overlay]):
            for container in containers(template):
                known = {variable["name"] for variable in container.get("env", [])}
                for source in container.get("envFrom", []):
                    if "configMapRef" in source:
                        known |= settings[namespace, source["configMapRef"]["name"]].keys()
                text = " ".join([*container.get("command", []), *container.get("args", [])])
                assert set(re.findall(r"\$\((\w+)\)", text)) <= known, name


def test_one_address_of_the_server_everywhere(overlays, profile):
    import json

    address = "http://mlflow.softpref-tracking.svc:5000"
    assert profile["parameters"]["tracking_uri"] == address
    (kfp,) = of_kind(overlays["kfp"], "ConfigMap")
    assert json.loads(kfp["data"]["config.json"])["plugins"]["mlflow"]["endpoint"] == address
    serving = next(one for one in of_kind(overlays["serving"], "ConfigMap") if "MODEL_NAME" in one["data"])
    assert serving["data"]["MLFLOW_TRACKING_URI"] == address
    for overlay in ("local", "cloud"):
        settings = next(one for one in of_kind(overlays[overlay], "ConfigMap") if "PGHOST" in one["data"])
        hosts = settings["data"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
        assert "mlflow.softpref-tracking.svc:*" in hosts
        assert not any(host.startswith("*") or host.endswith(".*") for host in hosts)
        (service,) = [
            one for one in of_kind(overlays[overlay], "Service") if one["metadata"]["name"] == "mlflow"
        ]
        assert (service["metadata"]["namespace"], service["spec"]["ports"][0]["port"]) == (
            "softpref-tracking",
            5000,
        )
    (ingress,) = of_kind(overlays["cloud"], "Ingress")
    host = ingress["spec"]["rules"][0]["host"]
    assert host in hosts
    assert settings["data"]["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] == f"https://{host}"


def test_the_cluster_profile_names_what_the_manifests_make(overlays, made_secrets, profile):
    for overlay, namespace in (("local", "kubeflow"), ("cloud", "softpref")):
        assert (namespace, profile["service_account"]) in names(overlays[overlay], "ServiceAccount")
        for reference in profile["secrets"].values():
            assert reference["key"] in made_secrets[namespace, reference["secret"]]
        assert (namespace, "softpref-shared") in names(overlays[overlay], "PersistentVolumeClaim")
        policies = [
            one
            for one in of_kind(overlays[overlay], "NetworkPolicy")
            if one["metadata"]["namespace"] == namespace
        ]
        assert policies
        assert all(matches(one["spec"]["podSelector"], profile["labels"]) for one in policies)


def test_the_plugin_of_kfp_is_told_what_it_knows(overlays, made_secrets):
    """Names as the 2.17 backend reads them (backend/src/common/plugins/mlflow/config.go)."""
    import json

    (config,) = of_kind(overlays["kfp"], "ConfigMap")
    plugin = json.loads(config["data"]["config.json"])["plugins"]["mlflow"]
    assert plugin.keys() <= {"endpoint", "timeout", "tls", "settings"}
    settings = plugin["settings"]
    assert settings.keys() <= {
        *("workspacesEnabled", "authType", "credentialSecretRef", "experimentDescription"),
        *("defaultExperimentName", "kfpBaseURL", "kfpRunURLPathTemplate", "mlflowBaseURL"),
        *("mlflowUIPathPrefix", "injectUserEnvVars"),
    }
    assert settings["injectUserEnvVars"] is True
    keys = settings["credentialSecretRef"]
    assert keys.keys() == {"usernameKey", "passwordKey"}  # the Secret's name is fixed
    for namespace in ("kubeflow", "softpref"):
        assert set(keys.values()) <= made_secrets[namespace, "kfp-mlflow-credentials"]

    launcher = yaml.safe_load((INFRA / "overlays/kfp/kfp-launcher-patch.yaml").read_text(encoding="utf-8"))
    own = json.loads(launcher["data"]["plugins.mlflow"])["settings"]
    assert own["credentialSecretRef"] == keys
    mounted = yaml.safe_load((INFRA / "overlays/kfp/ml-pipeline-patch.yaml").read_text(encoding="utf-8"))
    volume = mounted["spec"]["template"]["spec"]["volumes"][0]
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    policy = yaml.safe_load((INFRA / "overlays/gpu/cluster-policy-patch.yaml").read_text(encoding="utf-8"))
    (plugin_config,) = of_kind(overlays["gpu"], "ConfigMap")
    chosen = policy["spec"]["devicePlugin"]["config"]
    assert chosen["name"] == plugin_config["metadata"]["name"]
    assert chosen["default"] in plugin_config["data"]


def test_secrets_are_kept_random_and_unprinted(kubectl, tmp_path):
    import base64

    from .cluster import api_server, run_secrets_script

    script = INFRA / "secrets.sh"
    with api_server(tmp_path) as cluster:
        with pytest.raises(RuntimeError, match="no namespace kubeflow"):
            run_secrets_script(cluster, script, kubectl, "kubeflow")
        cluster.add("/api/v1/namespaces/kubeflow", apiVersion="v1", kind="Namespace")
        given = {"DATABASE_USERNAME": "team", "DATABASE_PASSWORD": 'a"b\\c d$e'}
        printed = run_secrets_script(cluster, script, kubectl, "kubeflow", **given)
        first = {path: dict(one) for path, one in cluster.objects.items()}
        printed += run_secrets_script(cluster, script, kubectl, "kubeflow")
        assert cluster.objects == first
        values = [
            base64.b64decode(value).decode()
            for path, one in cluster.objects.items()
            if "/secrets/" in path
            for value in one["data"].values()
        ]
        database = cluster.objects["/api/v1/namespaces/softpref-tracking/secrets/postgres"]["data"]
        assert base64.b64decode(database["password"]).decode() == given["DATABASE_PASSWORD"]
        assert not {("kubeflow", "hub-token"), ("kubeflow", "data-store")} & cluster.secrets().keys()
        run_secrets_script(cluster, script, kubectl, "kubeflow", DATA_ACCESS_KEY="a", DATA_SECRET_KEY="b")
        assert cluster.secrets()["kubeflow", "data-store"] == {"access-key", "secret-key"}
    long = [value for value in values if len(value) > 20 or value == given["DATABASE_PASSWORD"]]
    assert len(set(long)) >= 7
    assert not any(value in printed for value in long)
    for runs, tracking in (
        ("mlflow-credentials", "mlflow-credentials"),
        ("kfp-mlflow-credentials", "mlflow-credentials"),
    ):
        assert (
            first[f"/api/v1/namespaces/kubeflow/secrets/{runs}"]["data"]
            == first[f"/api/v1/namespaces/softpref-tracking/secrets/{tracking}"]["data"]
        )


def test_nodes_of_a_training_start_again_together(overlays):
    import kubernetes_validate

    (runtime,) = of_kind(overlays["trainer"], "ClusterTrainingRuntime")
    assert runtime["spec"]["mlPolicy"] == {"numNodes": 2, "torch": {}}  # Trainer 2.3 has no more of it
    jobs = runtime["spec"]["template"]["spec"]
    assert jobs["failurePolicy"]["maxRestarts"] > 0
    (node,) = jobs["replicatedJobs"]
    job = node["template"]["spec"]
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}, "spec": job}
    kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)
    assert (node["name"], job["template"]["spec"]["containers"][0]["name"]) == ("node", "node")
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")
