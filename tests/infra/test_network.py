"""Who may speak to whom: worked out from the network policies of the manifests, compared with one table."""

import ipaddress
import os

import pytest
import yaml

from .conftest import INFRA
from .test_manifests import matches, of_kind, workloads

_INTERNET, _METADATA = "8.8.8.8", "169.254.169.254"
_API = [("10.96.0.1", 443), ("192.168.7.2", 6443), ("172.18.0.2", 8443)]  # of a cluster of one's own
_RUNS = {"local": "kubeflow", "cloud": "softpref"}


class Pods:
    """The pods of an overlay and of its neighbours: name → (namespace, labels, ports by name)."""

    def __init__(self, objects):
        self.policies = of_kind(objects, "NetworkPolicy")
        self.pods = {}
        for _, namespace, template in workloads(objects):
            labels = template["metadata"]["labels"]
            ports = {
                port["name"]: port["containerPort"]
                for container in template["spec"]["containers"]
                for port in container.get("ports", [])
            }
            self.pods[labels["app.kubernetes.io/name"]] = (namespace, labels, ports)

    def add(self, name, namespace, labels=None, ports=None):
        self.pods[name] = (namespace, labels or {}, ports or {})

    def reaches(self, source, target, port):
        """Whether a pod may open a connection to a pod, or to an address."""
        return self._allowed("Egress", source, target, port) and (
            target not in self.pods or self._allowed("Ingress", target, source, port)
        )

    def _allowed(self, direction, pod, peer, port):
        namespace, labels, _ = self.pods[pod]
        chosen = [
            policy
            for policy in self.policies
            if policy["metadata"]["namespace"] == namespace
            and direction in policy["spec"]["policyTypes"]
            and matches(policy["spec"]["podSelector"], labels)
        ]
        key, side = ("egress", "to") if direction == "Egress" else ("ingress", "from")
        target = peer if direction == "Egress" else pod
        return not chosen or any(
            self._peer(rule.get(side), peer, namespace) and self._port(rule.get("ports"), target, port)
            for policy in chosen
            for rule in policy["spec"].get(key) or []
        )

    def _peer(self, peers, pod, namespace):
        if not peers:
            return True
        for one in peers:
            if pod not in self.pods:
                block = one.get("ipBlock")
                address = ipaddress.ip_address(pod)
                closed = block and any(
                    address in ipaddress.ip_network(net) for net in block.get("except", [])
                )
                if block and not closed and address in ipaddress.ip_network(block["cidr"]):
                    return True
                continue
            if "ipBlock" in one:
                continue  # addresses of pods are not for policies to name
            place, labels, _ = self.pods[pod]
            if "namespaceSelector" in one:
                if not matches(one["namespaceSelector"], self._labels_of(place)):
                    continue
            elif place != namespace:
                continue
            if matches(one.get("podSelector") or {}, labels):
                return True
        return False

    def _labels_of(self, namespace):
        more = {"softpref-client": "true"} if namespace == "clients" else {}
        return {"kubernetes.io/metadata.name": namespace, **more}

    def _port(self, ports, target, port):
        named = self.pods[target][2] if target in self.pods else {}
        return not ports or any(one["port"] == port or named.get(one["port"]) == port for one in ports)


def neighbours(pods, runs, labels):
    kfp = {"pipelines.kubeflow.org/v2_component": "true"}  # of all pods of all runs
    pods.add("dns", "kube-system", {"k8s-app": "kube-dns"})
    pods.add("stranger", "default")
    pods.add("kfp-api", "kubeflow", {"app": "ml-pipeline"})
    pods.add("kfp-store", "kubeflow", {"app": "seaweedfs"})
    pods.add("kfp-database", "kubeflow", {"app": "mysql"})
    pods.add("step", runs, {**kfp, **labels})
    pods.add("driver", runs, kfp)
    pods.add("node", runs, {"jobset.sigs.k8s.io/jobset-name": "job", **labels})
    pods.add("ingress", "ingress-nginx")
    return pods


def in_namespace(objects, namespace):
    """What the overlay `trainer` makes, in the namespace that was edited in."""
    policies = of_kind(objects, "NetworkPolicy")
    return [{**one, "metadata": {**one["metadata"], "namespace": namespace}} for one in policies]


@pytest.fixture(params=["local", "cloud"])
def tracking(request, overlays, profile):
    runs = _RUNS[request.param]
    trainer = in_namespace(overlays["trainer"], runs)
    pods = Pods([*overlays[request.param], *overlays["serving"], *trainer])
    pods.add("client", "clients")
    return request.param, neighbours(pods, runs, profile["labels"])


@pytest.fixture(params=["local", "cloud"])
def closed(request, build, profile, tmp_path):
    """The same with components/no-internet."""
    here = tmp_path.resolve()
    folders = [INFRA / "overlays" / request.param, INFRA / "overlays/serving"]
    content = {
        "resources": [os.path.relpath(folder, here) for folder in folders],
        "components": [os.path.relpath(INFRA / "components/no-internet", here)],
    }
    (here / "kustomization.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return neighbours(Pods(build(here)), _RUNS[request.param], profile["labels"])


def test_who_reaches_what_inside_the_cluster(tracking):
    overlay, pods = tracking
    wanted = {
        *(("step", "mlflow", 5000), ("node", "mlflow", 5000), ("kfp-api", "mlflow", 5000)),
        ("driver", "mlflow", 5000),  # for KFP's plugin
        *(("softpref-serving", "mlflow", 5000), ("follow-champion", "mlflow", 5000)),
        ("client", "softpref-serving", 8080),
    }
    if overlay == "local":
        for source in ("mlflow", "backup"):
            wanted |= {(source, "postgres", 5432), (source, "object-store", 8333)}
    else:
        wanted |= {("ingress", "mlflow", 5000)}
    servers = [
        name for name in ("mlflow", "postgres", "object-store", "softpref-serving") if name in pods.pods
    ]
    ports = (5000, 5432, 8333, 8080, 9333, 22)
    found = {
        (source, target, port)
        for source in pods.pods
        for target in servers
        for port in ports
        if source != target and pods.reaches(source, target, port)
    }
    assert found == wanted


def test_everything_finds_names(tracking):
    _, pods = tracking
    for name in pods.pods:
        if name != "dns":
            assert pods.reaches(name, "dns", 53), name


@pytest.mark.parametrize("pod", ["step", "node"])
def test_pods_of_runs_reach_kubeflow_pipelines_the_hub_and_the_kubernetes_api(tracking, pod):
    _, pods = tracking
    assert all(pods.reaches(pod, "kfp-api", port) for port in (8887, 8888, 8080))
    assert pods.reaches(pod, "kfp-store", 8333)
    assert not pods.reaches(pod, "kfp-database", 3306)
    assert all(pods.reaches(pod, address, port) for address, port in _API)
    reached = [port for port in (22, 80, 443, 6443, 8443) if pods.reaches(pod, _INTERNET, port)]
    assert reached == [443]


def test_nobody_reaches_the_metadata_of_a_cloud_instance(tracking):
    _, pods = tracking
    for name in ("step", "node", "mlflow", "softpref-serving", "follow-champion"):
        assert not any(pods.reaches(name, _METADATA, port) for port in (80, 443))


def test_other_pods_of_pipelines_are_left_alone(tracking):
    _, pods = tracking
    assert pods.reaches("driver", "kfp-database", 3306)
    assert pods.reaches("driver", _INTERNET, 22)
    assert pods.reaches("stranger", "driver", 8080)


@pytest.mark.parametrize("pod", ["step", "node", "follow-champion"])
def test_without_internet_the_cluster_is_reached_and_nothing_else(closed, pod):
    assert all(closed.reaches(pod, *one) for one in (("10.96.0.1", 443), ("192.0.2.10", 6443)))
    assert not any(closed.reaches(pod, _INTERNET, port) for port in (443, 6443, 8443))
    assert not any(closed.reaches(pod, "10.1.2.3", port) for port in (443, 6443, 8443))
    assert closed.reaches(pod, "mlflow", 5000)
    assert closed.reaches(pod, "dns", 53)
    assert closed.reaches(pod, "kfp-api", 8887) == (pod != "follow-champion")


def test_servers_reach_outside_only_where_their_stores_are(tracking):
    overlay, pods = tracking
    for name in ("mlflow", "backup"):
        assert pods.reaches(name, _INTERNET, 443) == (overlay == "cloud")
        assert not pods.reaches(name, _INTERNET, 22)
    assert not pods.reaches("softpref-serving", _INTERNET, 443)
    assert all(pods.reaches("follow-champion", address, port) for address, port in _API)
    if overlay == "local":
        assert not pods.reaches("postgres", _INTERNET, 443)
        assert not pods.reaches("object-store", _INTERNET, 443)


def test_nodes_of_a_job_speak_to_one_another_and_nobody_speaks_to_a_step(tracking):
    _, pods = tracking
    pods.add("other-node", pods.pods["node"][0], pods.pods["node"][1])
    assert all(pods.reaches("node", "other-node", port) for port in (29500, 40001))
    assert not pods.reaches("stranger", "node", 29500)
    assert not any(pods.reaches(name, "step", 8080) for name in ("stranger", "node", "kfp-api", "mlflow"))
