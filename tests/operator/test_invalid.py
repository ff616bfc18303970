"""Specs that are wrong: each is refused by the CRD or told in the status, in words that say what to change; none ends a
pass, and what already serves is kept.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from tests.operator.fake_cluster import SETTINGS, FakeCluster, merge_patch
from tests.operator.schema_check import defaulted, problems

from arriero_operator.crd import custom_resource_definition
from arriero_operator.desired import desired
from arriero_operator.writes import Apply, SetStatus

NAME = "llama-70b"
SCHEMA = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
LONG = "a" * 5000

# What is changed, and a word that the message must have.
INVALID: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"),
    ({"model": "llama"}, "model: expected a mapping"),
    ({"model": {"name": None}}, "model.name: missing"),
    ({"model": {"name": ""}}, "model.name"),
    ({"model": {"name": 5}}, "model.name: expected a string"),
    ({"model": {"name": "with space"}}, "model.name"),
    ({"model": {"name": "a" * 257}}, "257 characters"),
    ({"model": {"source": None}}, "source: missing"),
    ({"model": {"source": {"huggingFace": None}}}, "exactly one of"),
    ({"model": {"source": {"hostPath": {"path": "/m"}}}}, "exactly one of"),
    ({"model": {"source": {"huggingFace": {"repo": "no-owner"}}}}, "owner/name"),
    ({"model": {"source": {"huggingFace": {"repo": "a/b", "revision": ""}}}}, "revision"),
    ({"model": {"source": {"huggingFace": {"repo": "a/b", "tokenSecretRef": {}}}}}, "tokenSecretRef.name"),
    ({"model": {"source": {"huggingFace": {"repo": "a/b", "token": "hf_x"}}}}, "token"),
    ({"model": {"source": {"huggingFace": None, "hostPath": {"path": ""}}}}, "path"),
    ({"model": {"source": {"huggingFace": None, "hostPath": {"path": "models/x"}}}}, "must be an absolute path"),
    ({"model": {"source": {"huggingFace": None, "hostPath": {"path": "/a/../b"}}}}, "without '..'"),
    ({"model": {"source": {"huggingFace": None, "persistentVolumeClaim": {}}}}, "claimName: missing"),
    ({"model": {"source": {"huggingFace": None, "persistentVolumeClaim": {"claimName": "A_B"}}}}, "claimName"),
    ({"model": {"source": {"huggingFace": None, "persistentVolumeClaim": {"claimName": "a", "path": "/x"}}}}, "path"),
    (
        {"model": {"source": {"huggingFace": None, "persistentVolumeClaim": {"claimName": "a", "path": "../x"}}}},
        "leaves the volume",
    ),
    ({"model": {"source": {"huggingFace": None, "image": {"reference": "has space"}}}}, "reference"),
    ({"model": {"source": {"huggingFace": None, "objectStore": {"uri": "https://x/y"}}}}, "s3://bucket/prefix"),
    ({"model": {"source": {"huggingFace": None, "objectStore": {"uri": "s3://"}}}}, "s3://bucket/prefix"),
    ({"model": {"source": {"huggingFace": None, "ftp": {"uri": "x"}}}}, "ftp: unknown field"),
    ({"model": {"maxContext": 0}}, "at least 1"),
    ({"model": {"maxContext": 2**25}}, "at most"),
    ({"model": {"maxContext": "8192"}}, "expected a whole number"),
    ({"model": {"maxContext": 8192.5}}, "expected a whole number"),
    ({"model": {"maxContext": 1_000_000}}, "max_position_embeddings 131072"),
    ({"model": {"weights": "fp16"}}, "one of auto"),
    ({"model": {"kvCache": {"dtype": "int4"}}}, "one of auto"),
    ({"model": {"kvCache": {"dtype": "float32"}}}, "keeps keys and values in bfloat16 or fp8"),
    ({"model": {"kvCache": "auto"}}, "kvCache: expected a mapping"),
    ({"model": {"maxContex": 5}}, "did you mean maxContext?"),
    ({"replicas": -1}, "at least 0"),
    ({"replicas": 1001}, "at most 1000"),
    ({"replicas": "2"}, "expected a whole number"),
    ({"replicas": True}, "expected a whole number"),
    ({"replica": 2}, "did you mean replicas?"),
    ({"parallelism": {"tensor": 0}}, "at least 1"),
    ({"parallelism": {"tensor": 3}}, "does not divide the model's 64 attention heads"),
    ({"parallelism": {"tensor": 1025}}, "at most 1024"),
    ({"parallelism": {"tensor": None, "pipeline": 0}}, "at least 1"),
    ({"parallelism": {"pipeline": 81}}, "above the model's 80 layers"),
    ({"parallelism": {"pipeline": "two"}}, "expected a whole number"),
    ({"parallelism": {"data": 2}}, "data: unknown field"),
    ({"parallelism": [8, 2]}, "parallelism: expected a mapping"),
    ({"parallelism": {"tensor": 1, "pipeline": 1}}, "GiB per device"),
    ({"parallelism": {"tensor": 2, "pipeline": 1}}, "would fit"),
    ({"accelerator": None}, "accelerator: missing"),
    ({"accelerator": {"type": None}}, "type: missing"),
    ({"accelerator": {"type": "H100"}}, "one of H100-80GB"),
    ({"accelerator": {"type": "cpu", "resourceName": "nvidia.com/gpu"}}, "leave it out"),
    ({"accelerator": {"perNode": 0}}, "at least 1"),
    ({"accelerator": {"perNode": 65}}, "at most 64"),
    ({"accelerator": {"resourceName": "not a name"}}, "nvidia.com/gpu"),
    ({"accelerator": {"memoryGiB": 0}}, "above 0"),
    ({"accelerator": {"memoryGiB": 5000}}, "at most 4096"),
    ({"accelerator": {"memoryGiB": 10}}, "needs "),
    ({"accelerator": {"memoryGiB": "80Gi"}}, "expected a number"),
    ({"accelerator": {"memory": 80}}, "memory: unknown field"),
    ({"router": {"replicas": -1}}, "at least 0"),
    ({"router": {"replicas": 101}}, "at most 100"),
    ({"router": {"policy": "random"}}, "one of prefix"),
    ({"router": {"image": "x"}}, "image: unknown field"),
    ({"autoscaling": {}}, "maxReplicas: missing"),
    ({"autoscaling": {"minReplicas": 4, "maxReplicas": 2}}, "above maxReplicas (2)"),
    ({"autoscaling": {"maxReplicas": 0}}, "at least 1"),
    ({"autoscaling": {"minReplicas": -1, "maxReplicas": 2}}, "at least 0"),
    ({"autoscaling": {"maxReplicas": 2, "targetRunningPerReplica": 0}}, "at least 1"),
    ({"autoscaling": {"maxReplicas": 2, "metric": "x"}}, "metric: unknown field"),
    ({"rollout": {"maxSurge": 0, "maxUnavailable": 0}}, "no replica could ever be replaced"),
    ({"rollout": {"maxSurge": -1}}, "at least 0"),
    ({"rollout": {"maxSurge": "25%"}}, "expected a whole number"),
    ({"rollout": {"drainSeconds": 90_000}}, "at most 86400"),
    ({"rollout": {"partition": 1}}, "partition: unknown field"),
    ({"placement": {}}, "topologyKey: missing"),
    ({"placement": {"topologyKey": "a b"}}, "topologyKey"),
    ({"placement": {"topologyKey": "rack", "mode": "Always"}}, "one of Preferred or Required"),
    ({"placement": {"topologyKey": "a" * 400}}, "400 characters"),
    ({"engine": {"maxRunning": 4096}}, "above maxBatchTokens (2048)"),
    ({"engine": {"maxChunkTokens": 4096}}, "above maxBatchTokens (2048)"),
    ({"engine": {"blockSize": 0}}, "at least 1"),
    ({"engine": {"prefixCache": "yes"}}, "expected true or false"),
    ({"engine": {"queueTimeoutSeconds": -1}}, "at least 0"),
    ({"engine": {"threadsPerRank": 0}}, "at least 1"),
    ({"engine": {"maxWaiting": 0}}, "at least 1"),
    ({"podTemplate": []}, "podTemplate: expected a mapping"),
    ({"podTemplate": {"tolerations": []}}, "expected only metadata and spec"),
    ({"podTemplate": {"spec": []}}, "podTemplate.spec: expected a mapping"),
    ({"podTemplate": {"spec": {"nodeName": "n1"}}}, "use nodeSelector or affinity"),
    ({"podTemplate": {"spec": {"schedulingGates": []}}}, "schedulingGates: leave it out"),
    ({"podTemplate": {"spec": {"restartPolicy": "Never"}}}, "restartPolicy: leave it out"),
    ({"podTemplate": {"spec": {"terminationGracePeriodSeconds": 5}}}, "set spec.rollout.drainSeconds"),
    ({"podTemplate": {"spec": {"containers": {"name": "worker"}}}}, "containers: expected a list"),
    ({"podTemplate": {"spec": {"containers": ["worker"]}}}, "containers[0]: expected a mapping with name"),
    ({"podTemplate": {"spec": {"containers": [{"name": "worker", "command": ["sh"]}]}}}, "starts the worker itself"),
    ({"podTemplate": {"spec": {"initContainers": [{"name": "download", "args": []}]}}}, "starts the download itself"),
    ({"podTemplate": {"spec": {"containers": [{"name": "a"}, {"name": "a"}]}}}, "'a' appears twice"),
    ({"podTemplate": {"spec": {"containers": [{"name": "worker", "env": {"A": "b"}}]}}}, "env: expected a list"),
    ({"podTemplate": {"spec": {"volumes": [{"emptyDir": {}}]}}}, "volumes[0]: expected a mapping with name"),
    ({"podTemplate": {"spec": {"tolerations": "all"}}}, "tolerations: expected a list"),
    ({"podTemplate": {"metadata": {"labels": {"serving.arriero.dev/group": "x"}}}}, "written by the operator"),
    ({"podTemplate": {"metadata": {"labels": {"a": 1}}}}, "put it in quotes"),
    ({"podTemplate": {"metadata": {"name": "x"}}}, "only labels and annotations"),
    ({"podTemplate": {"metadata": {"labels": ["a"]}}}, "labels: expected a mapping"),
]


def invalid(change: dict[str, Any]) -> dict[str, Any]:
    made = FakeCluster()
    made.create(NAME)
    return merge_patch(made.objects["LlamaDeployment", NAME], {"spec": change})


def ids(case: Any) -> str:
    return re.sub(r"\W+", "-", str(case))[:60].strip("-") if isinstance(case, dict) else ""


@pytest.mark.parametrize(("change", "words"), INVALID, ids=ids)
def test_it_is_told_what_to_change_and_what_serves_is_kept(change: dict[str, Any], words: str) -> None:
    made = FakeCluster()
    made.add_nodes(2)
    made.create(NAME)
    made.run(2, NAME)
    before = copy.deepcopy(made.snapshot())
    made.edit(NAME, **change)
    found = desired(made.observe(NAME), SETTINGS)
    assert not [write for write in found.writes if isinstance(write, Apply) and write.object["kind"] != "Pod"]
    (write,) = [write for write in found.writes if isinstance(write, SetStatus)]
    status = write.status
    assert status["phase"] == "Invalid"
    assert words in status["message"], status["message"]
    refused = {
        c["type"]: c for c in status["conditions"] if c["type"] in ("Accepted", "Planned") and c["status"] == "False"
    }
    assert refused
    assert any(words in c["message"] for c in refused.values())
    assert problems(status, SCHEMA["properties"]["status"]) == []
    for write in found.writes:
        made.write(write)
    after = made.snapshot()
    assert {key for key in before if key[0] == "StatefulSet"} <= after.keys()


def test_there_are_a_hundred_of_them() -> None:
    assert len(INVALID) >= 100


@pytest.mark.parametrize(("change", "words"), INVALID, ids=ids)
def test_the_crd_and_the_planner_are_of_one_mind(change: dict[str, Any], words: str) -> None:
    """Whatever breaks a bound or a type is refused by the API server already; what the schema lets through is wrong for
    a reason that takes more than one field (a rule of the CRD), the model, or the overlay.
    """
    resource = invalid(change)
    refused = problems(defaulted(resource, SCHEMA), SCHEMA)
    simple = re.search(
        "expected a (whole number|string|number|mapping|list)|at least|at most|one of auto|characters", words
    )
    if simple and "podTemplate" not in change:
        assert refused, "the planner refuses a value that the CRD takes"


def test_a_valid_resource_is_valid_for_both() -> None:
    resource = invalid({"placement": {"topologyKey": "rack"}, "autoscaling": {"maxReplicas": 4}})
    whole = defaulted(resource, SCHEMA)
    assert problems(whole, SCHEMA) == []
    made = FakeCluster()
    made.add_nodes(2)
    made.create(NAME)
    made.objects["LlamaDeployment", NAME]["spec"] = whole["spec"]
    made.converge(NAME)
    assert made.status(NAME)["phase"] == "Ready"


@pytest.mark.parametrize("spec", [{}, None, [], "spec", 5])
def test_a_resource_that_is_no_resource_ends_no_pass(spec: Any) -> None:
    made = FakeCluster()
    made.create(NAME)
    made.objects["LlamaDeployment", NAME]["spec"] = spec
    made.run(2, NAME)
    assert made.status(NAME)["phase"] == "Invalid"
