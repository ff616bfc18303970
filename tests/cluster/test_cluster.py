"""The test cluster is a Kubernetes cluster: what an operator relies on works on its nodes."""

from __future__ import annotations

import time

import pytest
from tests.cluster import kwok
from tests.cluster.cluster import Cluster
from tests.cluster.pods import SLEEPER, Pods, pod, service, spread_set
from tests.cluster.processes import wait_until

pytestmark = pytest.mark.cluster

FETCH = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=5).status)"


@pytest.fixture
def pods(node_cluster: Cluster, namespace: str) -> Pods:
    return Pods(node_cluster.api, namespace)


@pytest.fixture
def pair(node_cluster: Cluster, namespace: str, pods: Pods) -> Pods:
    """web-0 and web-1 on different nodes, behind the service `web` and the headless service `web-pods`."""
    objects = [service("web", "web"), service("web-pods", "web", headless=True), spread_set("web", 2)]
    node_cluster.kubectl(namespace).apply(*objects)
    pods.wait_ready("web-0", "web-1")
    return pods


def test_it_starts_within_a_minute(own_cluster: Cluster) -> None:
    print(f"ready in {own_cluster.started_in:.1f} s with {len(own_cluster.nodes)} nodes")
    assert 0 < own_cluster.started_in < 60


def test_both_nodes_are_ready_with_their_gpus(node_cluster: Cluster) -> None:
    nodes = {node["metadata"]["name"]: node for node in node_cluster.api.get("/api/v1/nodes")["items"]}
    for name in ("node-1", "node-2"):
        assert node_cluster.is_node_ready(name)
        assert nodes[name]["status"]["allocatable"]["nvidia.com/gpu"] == "8"
        assert nodes[name]["status"]["nodeInfo"]["kubeletVersion"] == "v1.34.4"


def test_pods_on_two_nodes_reach_each_other(node_cluster: Cluster, namespace: str, pair: Pods) -> None:
    found = [pair.get(name) for name in ("web-0", "web-1")]
    assert len({entry["spec"]["nodeName"] for entry in found}) == 2
    kubectl = node_cluster.kubectl(namespace)
    targets = {
        "address": f"http://{found[1]['status']['podIP']}:8000/",
        "service": "http://web/",
        "service by its full name": f"http://web.{namespace}.svc.cluster.local/",
        "name in the set": f"http://web-1.web-pods.{namespace}.svc.cluster.local:8000/",
    }
    for kind, url in targets.items():
        assert kubectl("exec", "web-0", "--", "python", "-c", FETCH, url).strip() == "200", kind
    resolve = "import socket; print(len({a[4][0] for a in socket.getaddrinfo('web-pods', 8000)}))"
    assert kubectl("exec", "web-0", "--", "python", "-c", resolve).strip() == "2"


def test_logs_and_exec_answer_for_pods_of_both_nodes(node_cluster: Cluster, namespace: str, pair: Pods) -> None:
    kubectl = node_cluster.kubectl(namespace)
    for name in ("web-0", "web-1"):
        assert kubectl("exec", name, "--", "hostname").strip() == name
        assert "GET / HTTP/1.1" in kubectl("logs", name)  # the readiness probe's


def test_the_container_of_a_failing_liveness_probe_is_restarted(
    node_cluster: Cluster, namespace: str, pods: Pods
) -> None:
    probe = {"exec": {"command": ["false"]}, "periodSeconds": 1, "failureThreshold": 1}
    node_cluster.kubectl(namespace).apply(pod("sick", SLEEPER, livenessProbe=probe))
    wait_until(lambda: pods.restarts("sick") >= 1, "restart of the container")


def test_a_pod_that_is_not_ready_is_not_in_its_service(node_cluster: Cluster, namespace: str, pods: Pods) -> None:
    kubectl = node_cluster.kubectl(namespace)
    probe = {"exec": {"command": ["test", "-e", "/tmp/ready"]}, "periodSeconds": 1}
    kubectl.apply(service("late", "late"), pod("late", SLEEPER, labels={"app": "late"}, readinessProbe=probe))

    def readiness() -> list[bool]:
        slices = node_cluster.api.get(
            f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices",
            labelSelector="kubernetes.io/service-name=late",
        )
        return [entry["conditions"]["ready"] for part in slices["items"] for entry in part.get("endpoints") or []]

    wait_until(lambda: readiness() == [False], "the pod in its service, not ready")
    kubectl("exec", "late", "--", "touch", "/tmp/ready")
    wait_until(lambda: readiness() == [True], "the pod in its service, ready")


def test_gpus_limit_what_is_scheduled(node_cluster: Cluster, namespace: str, pods: Pods) -> None:
    resources = {"limits": {"nvidia.com/gpu": "8"}}
    names = ("first", "second", "third")
    node_cluster.kubectl(namespace).apply(*(pod(name, SLEEPER, resources=resources) for name in names))

    def running() -> list[str]:
        return [name for name in names if pods.is_ready(name)]

    wait_until(lambda: len(running()) == 2, "two pods with all GPUs of a node each")
    assert len({pods.get(name)["spec"]["nodeName"] for name in running()}) == 2
    (waiting,) = set(names) - set(running())

    def complaints() -> list[str]:
        conditions = pods.get(waiting)["status"].get("conditions", [])
        return [entry["message"] for entry in conditions if entry.get("reason") == "Unschedulable"]

    wait_until(complaints, "word of the pod that fits nowhere")
    assert "Insufficient nvidia.com/gpu" in complaints()[0]


def test_a_node_cut_off_is_lost_and_comes_back(unharmed: Cluster, namespace: str, pair: Pods) -> None:
    before = pair.containers("web-1")
    name = pair.get("web-1")["spec"]["nodeName"]
    node = unharmed.node(name)
    began = time.monotonic()
    node.cut()
    wait_until(lambda: not unharmed.is_node_ready(name), f"loss of {name}", 90.0)
    lost = time.monotonic()
    node.mend()
    unharmed.wait_for_nodes()
    print(f"lost after {lost - began:.1f} s, back after {time.monotonic() - lost:.1f} s")
    pair.wait_ready("web-1")
    assert pair.containers("web-1") == before, "the pod ran on while nobody could see it"


def test_containers_survive_their_kubelet(unharmed: Cluster, namespace: str, pair: Pods) -> None:
    before = pair.containers("web-0")
    unharmed.restart_kubelet(pair.get("web-0")["spec"]["nodeName"])
    pair.wait_ready("web-0")
    assert pair.containers("web-0") == before
    assert all(
        node["status"]["allocatable"]["nvidia.com/gpu"] == "8" for node in unharmed.api.get("/api/v1/nodes")["items"]
    )


@pytest.mark.parametrize("victim", ["etcd", "kube-apiserver"])
def test_the_control_plane_comes_back(unharmed: Cluster, namespace: str, pods: Pods, victim: str) -> None:
    kubectl = unharmed.kubectl(namespace)
    kubectl.apply(pod("before", SLEEPER))
    pods.wait_ready("before")
    containers = pods.containers("before")
    (program,) = [program for program in unharmed.control_plane.programs if program.name == victim]
    program.kill()
    wait_until(lambda: not unharmed.api.is_ready(), "an API server that is not ready", 20.0)
    began = time.monotonic()
    program.start()
    unharmed.wait_for_api()
    print(f"API server ready {time.monotonic() - began:.1f} s after {victim} was started again")
    assert pods.containers("before") == containers
    kubectl.apply(pod("after", SLEEPER))
    pods.wait_ready("after")


def test_simulated_nodes_run_simulated_pods(own_cluster: Cluster, namespace: str) -> None:
    own_cluster.start_kwok()
    names = kwok.create_simulated_nodes(own_cluster.api, 20, prefix=namespace[-6:])
    try:
        wait_until(lambda: all(map(own_cluster.is_node_ready, names)), "Ready simulated nodes")
        container = {"name": "main", "image": "none", "resources": {"limits": {"nvidia.com/gpu": "8"}}}
        toleration = {"key": kwok.TAINT["key"], "operator": "Exists"}
        template = {
            "metadata": {"labels": {"app": "many"}},
            "spec": {"nodeSelector": dict([kwok.LABEL]), "tolerations": [toleration], "containers": [container]},
        }
        spec = {"replicas": 20, "selector": {"matchLabels": {"app": "many"}}, "template": template}
        deployments = f"/apis/apps/v1/namespaces/{namespace}/deployments"
        own_cluster.api.create(deployments, {"metadata": {"name": "many"}, "spec": spec})
        wait_until(
            lambda: own_cluster.api.get(f"{deployments}/many").get("status", {}).get("readyReplicas") == 20,
            "Ready simulated pods",
        )
        own_cluster.api.delete(f"{deployments}/many", propagationPolicy="Foreground")
        wait_until(
            lambda: not own_cluster.api.get(f"/api/v1/namespaces/{namespace}/pods")["items"], "end of simulated pods"
        )
    finally:
        for name in names:
            own_cluster.api.delete(f"/api/v1/nodes/{name}")
