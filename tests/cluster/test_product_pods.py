"""The product's own pods run on the test's nodes as the operator writes them, restricted as they are."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import yaml
from tests.cluster.cluster import Cluster
from tests.cluster.pods import SLEEPER, Pods, pod
from tests.cluster.thin import PRODUCT_IMAGES, PROJECT

from arriero_operator import router, workers
from arriero_operator.autoscale import Scale
from arriero_operator.settings import Settings
from arriero_operator.wanted import Wanted
from arriero_plan.model import ModelShape
from arriero_plan.plan import make_plan
from arriero_plan.resource import LlamaDeployment

pytestmark = pytest.mark.cluster

EXAMPLE = PROJECT / "examples" / "tiny-llama.yaml"
CHECKPOINT = PROJECT / "examples" / "tiny_llama" / "checkpoint"
ASK = """
import json, sys, urllib.request
messages = [{"role": "user", "content": "What is the capital of France?"}]
body = {"model": "tiny-llama", "messages": messages, "temperature": 0}
request = urllib.request.Request(sys.argv[1], json.dumps(body).encode(), {"Content-Type": "application/json"})
print(json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["message"]["content"])
"""


def wanted(namespace: str, tensor: int, pipeline: int) -> Wanted:
    """The example's deployment, planned."""
    document: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    document["spec"]["model"]["source"]["hostPath"]["path"] = str(CHECKPOINT)
    document["spec"]["parallelism"] = {"tensor": tensor, "pipeline": pipeline}
    deployment = LlamaDeployment.model_validate(document)
    shape = ModelShape.from_config(json.loads((CHECKPOINT / "config.json").read_text()), "config.json")
    settings = Settings(worker_image=PRODUCT_IMAGES["arriero-worker"], router_image=PRODUCT_IMAGES["arriero-router"])
    return Wanted(
        deployment=deployment,
        plan=make_plan(deployment, shape),
        namespace=namespace,
        uid="none",
        created="2030-01-01T00:00:00Z",
        settings=settings,
        scale=Scale(1),
    )


def group(wanted: Wanted) -> list[dict[str, Any]]:
    """The objects of the first group, placed already."""
    revision = workers.revision_of(wanted)
    made = [workers.launch_config(wanted, 0, revision), workers.group_service(wanted, 0)]
    return [*made, workers.group_policy(wanted, 0), workers.stateful_set(wanted, 0, revision, gated=False)]


def apply(cluster: Cluster, namespace: str, objects: list[dict[str, Any]]) -> None:
    """Apply the objects without their owner, who is not there: the garbage collector would take them for orphans."""
    for item in objects:
        del item["metadata"]["ownerReferences"]
    cluster.kubectl(namespace).apply(*objects)


def compiled(cluster: Cluster) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in cluster.layout.kernels.rglob("*.nb[ci]")}


@pytest.fixture
def pods(node_cluster: Cluster, namespace: str) -> Pods:
    return Pods(node_cluster.api, namespace)


def test_a_worker_pod_answers_for_its_health(node_cluster: Cluster, namespace: str, pods: Pods) -> None:
    before = compiled(node_cluster)
    assert before
    apply(node_cluster, namespace, group(wanted(namespace, 1, 1)))
    began = time.monotonic()
    pods.wait_ready("tiny-llama-0-0", timeout=180.0)  # its readiness is gRPC health on the control port
    print(f"worker ready {time.monotonic() - began:.1f} s after its StatefulSet was applied")
    assert compiled(node_cluster) == before, "its kernels were compiled before"
    spec = pods.get("tiny-llama-0-0")["spec"]
    assert spec["securityContext"]["runAsUser"] == 65532
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["containers"][0]["readinessProbe"]["grpc"]["port"] == 9100
    status = node_cluster.kubectl(namespace)("exec", "tiny-llama-0-0", "--", "cat", "/proc/1/status")
    assert "Uid:\t65532\t65532\t65532\t65532" in status
    assert "Seccomp:\t2" in status, "the profile is enforced"
    assert "CapBnd:\t0000000000000000" in status


def test_a_group_over_two_nodes_answers_through_its_router(node_cluster: Cluster, namespace: str, pods: Pods) -> None:
    whole = wanted(namespace, 2, 2)
    asker = pod("asker", SLEEPER)
    apply(node_cluster, namespace, [*router.deployment_objects(whole), *group(whole)])
    node_cluster.kubectl(namespace).apply(asker)
    began = time.monotonic()
    pods.wait_ready("tiny-llama-0-0", "tiny-llama-0-1", "asker", timeout=180.0)
    print(f"group ready after {time.monotonic() - began:.1f} s")
    kubectl = node_cluster.kubectl(namespace)
    kubectl("rollout", "status", "deployment/tiny-llama-router", "--timeout=120s", timeout=150.0)
    print(f"router ready after {time.monotonic() - began:.1f} s")
    url = "http://tiny-llama-router:8000/v1/chat/completions"
    answer = kubectl("exec", "asker", "--", "python", "-c", ASK, url)
    assert "Paris" in answer
