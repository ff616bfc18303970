"""What a deployment becomes: the whole of it as golden YAML, and what must hold for every variant."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.operator.fake_cluster import SETTINGS, FakeCluster

from arriero_operator import names
from arriero_operator.desired import desired
from arriero_operator.settings import Settings
from arriero_operator.writes import Apply
from arriero_plan.known import known_config
from arriero_plan.launch import parse_launch
from arriero_router.config import parse_config

GOLDEN = Path(__file__).with_name("golden")
NAME = "llama-70b"


def rendered(settings: Settings = SETTINGS, placed: bool = False, **spec: Any) -> list[dict[str, Any]]:
    """The objects of a first pass, or once the group is placed."""
    made = FakeCluster(settings)
    made.add_nodes(4, rack="r1")
    made.create(NAME, **spec)
    made.objects["LlamaDeployment", NAME]["metadata"]["uid"] = "5ca1ab1e-0000-4000-8000-000000000000"
    if placed:
        made.converge(NAME)
        return [o for (kind, _), o in made.objects.items() if kind not in ("Pod", "LlamaDeployment")]
    return [dict(w.object) for w in desired(made.observe(NAME), settings).writes if isinstance(w, Apply)]


def find(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


def template(**spec: Any) -> dict[str, Any]:
    pod: dict[str, Any] = find(rendered(**spec), "StatefulSet", f"{NAME}-0")["spec"]["template"]
    return pod


class Readable(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


Readable.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def test_the_whole_of_one_deployment() -> None:
    """To accept a change: ARRIERO_GOLDEN=write pytest tests/operator/test_objects.py, and review the difference."""
    objects = rendered(
        model={
            "name": "meta-llama/Llama-3.1-70B-Instruct",
            "source": {"huggingFace": {"repo": "meta-llama/Llama-3.1-70B-Instruct"}},
        },
        placement={"topologyKey": "topology.kubernetes.io/rack", "mode": "Preferred"},
        router={"replicas": 2},
        podTemplate={"spec": {"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]}},
    )
    text = yaml.dump_all(objects, Dumper=Readable, sort_keys=False, width=120)
    path = GOLDEN / "llama-70b.yaml"
    if os.environ.get("ARRIERO_GOLDEN") == "write":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_the_launch_file_is_one_that_workers_accept() -> None:
    config = next(o for o in rendered() if o["kind"] == "ConfigMap" and "launch" in o["metadata"]["name"])
    assert config["immutable"] is True
    launch = parse_launch(config["data"]["launch.json"], "launch.json")
    assert [pod.host for pod in launch.pods] == [f"{NAME}-0-{i}.{NAME}-0.llamas.svc" for i in range(2)]
    assert [pod.ranks for pod in launch.pods] == [tuple(range(8)), tuple(range(8, 16))]
    assert launch.model_path == "/model"
    assert launch.drain_seconds == 20


def test_the_router_accepts_its_configuration() -> None:
    config = parse_config(find(rendered(), "ConfigMap", f"{NAME}-router")["data"]["router.yaml"], "router.yaml")
    (model,) = config.models
    assert model.name == "llama"
    assert model.endpoints.kubernetes is not None
    assert model.endpoints.kubernetes.service == f"{NAME}-leaders"
    assert config.drain_seconds == 20


def test_the_leaders_service_is_as_the_router_expects_it() -> None:
    service = find(rendered(), "Service", f"{NAME}-leaders")
    assert service["metadata"]["labels"]["serving.arriero.dev/deployment"] == NAME
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is False
    assert service["spec"]["selector"]["apps.kubernetes.io/pod-index"] == "0"
    assert [(p["name"], p["port"]) for p in service["spec"]["ports"]] == [
        ("http", 8000),
        ("grpc", 9000),
        ("control", 9100),
    ]


def test_groups_are_born_gated_and_lose_the_gate_and_keep_their_rack_once_placed() -> None:
    rack = {"topologyKey": "topology.kubernetes.io/rack", "mode": "Required"}
    born = find(rendered(placement=rack), "StatefulSet", f"{NAME}-0")
    assert born["spec"]["template"]["spec"]["schedulingGates"] == [{"name": names.GATE}]
    placed = find(rendered(placed=True, placement=rack), "StatefulSet", f"{NAME}-0")
    pod = placed["spec"]["template"]["spec"]
    assert "schedulingGates" not in pod
    assert pod["affinity"]["nodeAffinity"] == {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [
                {"matchExpressions": [{"key": rack["topologyKey"], "operator": "In", "values": ["r1"]}]}
            ]
        }
    }
    assert placed["metadata"]["labels"][names.REVISION] == born["metadata"]["labels"][names.REVISION]


@pytest.mark.parametrize(
    "change",
    [
        {"engine": {"maxRunning": 128}},
        {"rollout": {"drainSeconds": 30}},
        {"podTemplate": {"spec": {"tolerations": [{"operator": "Exists"}]}}},
        {"model": {"name": "llama", "source": {"hostPath": {"path": "/models/llama"}}}},
        {"parallelism": {"tensor": 8, "pipeline": 4}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_pods_run_makes_a_new_revision(change: dict[str, Any]) -> None:
    def revision(**spec: Any) -> str:
        made = FakeCluster()
        made.create(NAME, **spec)
        made.objects["LlamaDeployment", NAME]["metadata"]["uid"] = "u"
        observed = made.observe(NAME)
        (status,) = [w.status for w in desired(with_config(observed), SETTINGS).writes if hasattr(w, "status")]
        return str(status["revision"])

    assert revision() == revision()
    assert revision(replicas=5, router={"replicas": 3}, autoscaling={"maxReplicas": 9}) == revision()
    assert revision(**change) != revision()


def with_config(observed: Any) -> Any:
    return dataclasses.replace(observed, config=known_config("meta-llama/Llama-3.1-70B-Instruct"))


def test_pods_meet_the_restricted_pod_security_standard() -> None:
    """As https://kubernetes.io/docs/concepts/security/pod-security-standards/ lists it."""
    objects = rendered(model={"name": "m", "source": {"huggingFace": {"repo": "meta-llama/Llama-3.1-70B"}}})
    pods = [o["spec"]["template"]["spec"] for o in objects if o["kind"] in ("StatefulSet", "Deployment")]
    assert len(pods) == 2
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert {next(iter(v.keys() - {"name"})) for v in pod["volumes"]} <= {"configMap", "emptyDir"}
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert pod["containers"][0][probe]["timeoutSeconds"] > 0


@pytest.mark.parametrize(
    ("source", "volume", "path", "download"),
    [
        (
            {"persistentVolumeClaim": {"claimName": "weights", "path": "llama/70b"}},
            {"persistentVolumeClaim": {"claimName": "weights", "readOnly": True}},
            "/model/llama/70b",
            None,
        ),
        ({"hostPath": {"path": "/models/x"}}, {"hostPath": {"path": "/models/x", "type": "Directory"}}, "/model", None),
        (
            {"image": {"reference": "registry.example/llama:1"}},
            {"image": {"reference": "registry.example/llama:1", "pullPolicy": "IfNotPresent"}},
            "/model",
            None,
        ),
        (
            {"huggingFace": {"repo": "a/b", "revision": "v1", "tokenSecretRef": {"name": "hub"}}},
            {"emptyDir": {}},
            "/model",
            "hf://a/b@v1",
        ),
        (
            {"objectStore": {"uri": "s3://models/llama", "secretRef": {"name": "s3"}}},
            {"emptyDir": {}},
            "/model",
            "s3://models/llama",
        ),
    ],
    ids=["claim", "host", "image", "hub", "store"],
)
def test_each_source_becomes_a_volume(source: Any, volume: Any, path: str, download: str | None) -> None:
    made = FakeCluster()
    made.create(NAME, model={"name": "m", "source": source})
    writes = desired(with_config(made.observe(NAME)), SETTINGS).writes
    objects = [dict(w.object) for w in writes if isinstance(w, Apply)]
    pod = find(objects, "StatefulSet", f"{NAME}-0")["spec"]["template"]["spec"]
    assert {"name": "model", **volume} in pod["volumes"]
    config = next(o for o in objects if o["kind"] == "ConfigMap" and "launch" in o["metadata"]["name"])
    assert json.loads(config["data"]["launch.json"])["model_path"] == path
    loaders = pod.get("initContainers", [])
    assert [container["args"][1] for container in loaders] == ([download] if download else [])
    if "huggingFace" in source:
        reference = {"secretKeyRef": {"name": "hub", "key": "token"}}
        assert {"name": "HF_TOKEN", "valueFrom": reference} in loaders[0]["env"]
    if "objectStore" in source:
        assert loaders[0]["envFrom"] == [{"secretRef": {"name": "s3"}}]


def test_only_group_router_and_operator_reach_a_worker() -> None:
    policy = find(rendered(), "NetworkPolicy", f"{NAME}-0")["spec"]
    own, router, operator = policy["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": {names.GROUP: f"{NAME}-0"}}}]}
    assert [p["port"] for p in router["ports"]] == [8000, 9000, 9100]
    assert router["from"][0]["podSelector"]["matchLabels"] == {names.DEPLOYMENT: NAME, names.COMPONENT: "router"}
    assert [p["port"] for p in operator["ports"]] == [9100]
    assert policy["policyTypes"] == ["Ingress"]
    labels = template()["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()


def test_the_router_may_see_endpoint_slices_and_nothing_else() -> None:
    role = find(rendered(), "Role", f"{NAME}-router")
    assert role["rules"] == [
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}
    ]
    assert template()["spec"]["automountServiceAccountToken"] is False


def test_a_pod_has_time_to_drain_before_it_is_killed() -> None:
    assert template(rollout={"drainSeconds": 300})["spec"]["terminationGracePeriodSeconds"] > 300 + 5


def test_a_cpu_pod_asks_for_cores_and_the_memory_of_its_plan() -> None:
    pod = template(
        accelerator={"type": "cpu", "memoryGiB": 200.0},
        parallelism={"tensor": 2, "pipeline": 2},
        engine={"threadsPerRank": 3},
        model={"name": "m", "maxContext": 8192, "source": {"huggingFace": {"repo": "meta-llama/Llama-3.1-70B"}}},
    )["spec"]
    requests = pod["containers"][0]["resources"]["requests"]
    assert requests["cpu"] == "6"
    assert requests["memory"].endswith("i")
    assert "limits" not in pod["containers"][0]["resources"]
    assert not [entry for entry in pod["containers"][0]["env"] if entry["name"].startswith("NCCL")]


def test_rdma_is_reached_through_the_pod_template() -> None:
    pod = template(
        podTemplate={
            "metadata": {"annotations": {"k8s.v1.cni.cncf.io/networks": "rdma"}},
            "spec": {
                "containers": [
                    {
                        "name": "worker",
                        "env": [{"name": "NCCL_IB_HCA", "value": "mlx5"}],
                        "resources": {"limits": {"rdma/hca": "8"}},
                        "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
                    }
                ],
                "volumes": [{"name": "shm", "emptyDir": {"sizeLimit": "15Gi"}}],
            },
        }
    )
    container = pod["spec"]["containers"][0]
    assert [entry["name"] for entry in container["env"]] == [
        "ARRIERO_POD_INDEX",
        "HOME",
        "NCCL_SOCKET_IFNAME",
        "NCCL_IB_HCA",
    ]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "rdma/hca": "8"}
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "15Gi"}} in pod["spec"]["volumes"]
    assert container["command"] == ["arriero-worker"]
    assert pod["metadata"]["annotations"]["k8s.v1.cni.cncf.io/networks"] == "rdma"
