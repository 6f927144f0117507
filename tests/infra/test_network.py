"""Who may speak to whom: worked out from the network policies of the manifests, compared with one table."""

import ipaddress

import pytest

from .test_manifests import matches, of_kind, workloads

DNS = ("kube-system", "dns", 53)
_INTERNET, _METADATA = "8.8.8.8", "169.254.169.254"


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


def neighbours(pods, runs):
    pods.add("dns", "kube-system", {"k8s-app": "kube-dns"})
    pods.add("stranger", "default")
    pods.add("kfp-api", "kubeflow", {"app": "ml-pipeline"})
    pods.add("kfp-store", "kubeflow", {"app": "seaweedfs"})
    pods.add("kfp-database", "kubeflow", {"app": "mysql"})
    pods.add("step", runs, {"pipelines.kubeflow.org/v2_component": "true"})
    pods.add("node", runs, {"jobset.sigs.k8s.io/jobset-name": "job"})
    pods.add("ingress", "ingress-nginx")
    return pods


@pytest.fixture(params=["local", "cloud"])
def tracking(request, overlays):
    pods = Pods([*overlays[request.param], *overlays["serving"]])
    pods.add("client", "clients")
    return request.param, neighbours(pods, {"local": "kubeflow", "cloud": "softpref"}[request.param])


def test_who_reaches_what_inside_the_cluster(tracking):
    overlay, pods = tracking
    wanted = {
        *(("step", "mlflow", 5000), ("node", "mlflow", 5000), ("kfp-api", "mlflow", 5000)),
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


def test_steps_reach_kubeflow_pipelines_and_the_hub_and_no_instance_metadata(tracking):
    _, pods = tracking
    assert all(pods.reaches("step", "kfp-api", port) for port in (8887, 8888, 8080))
    assert pods.reaches("step", "kfp-store", 8333)
    assert not pods.reaches("step", "kfp-database", 3306)
    assert pods.reaches("step", _INTERNET, 443)
    for name in ("step", "node", "mlflow", "softpref-serving", "follow-champion"):
        assert not any(pods.reaches(name, _METADATA, port) for port in (80, 443))


def test_servers_reach_outside_only_where_their_stores_are(tracking):
    overlay, pods = tracking
    for name in ("mlflow", "backup"):
        assert pods.reaches(name, _INTERNET, 443) == (overlay == "cloud")
        assert not pods.reaches(name, _INTERNET, 22)
    assert not pods.reaches("softpref-serving", _INTERNET, 443)
    assert pods.reaches("follow-champion", _INTERNET, 443)  # the API server has no label
    if overlay == "local":
        assert not pods.reaches("postgres", _INTERNET, 443)
        assert not pods.reaches("object-store", _INTERNET, 443)


def test_nodes_of_a_job_speak_to_one_another_and_nobody_speaks_to_a_step(tracking):
    _, pods = tracking
    pods.add("other-node", pods.pods["node"][0], pods.pods["node"][1])
    assert all(pods.reaches("node", "other-node", port) for port in (29500, 40001))
    assert not pods.reaches("stranger", "node", 29500)
    assert not any(pods.reaches(name, "step", 8080) for name in ("stranger", "node", "kfp-api", "mlflow"))
