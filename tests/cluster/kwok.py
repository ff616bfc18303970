"""KWOK: nodes and pods by the thousand that are only simulated, on the same control plane."""

from __future__ import annotations

from pathlib import Path

from tests.cluster.api import Api
from tests.cluster.credentials import Credentials
from tests.cluster.layout import Layout
from tests.cluster.processes import Program

LABEL = ("type", "kwok")
TAINT = {"key": "kwok.x-k8s.io/node", "value": "fake", "effect": "NoSchedule"}


def kwok_program(layout: Layout, credentials: Credentials, program: Path, stages: Path) -> Program:
    """The controller that plays kubelet for every node with the label."""
    command = [
        str(program),
        f"--kubeconfig={credentials.kubeconfig('kwok')}",
        f"--config={stages}",
        "--manage-all-nodes=false",
        f"--manage-nodes-with-label-selector={'='.join(LABEL)}",
        f"--cidr=10.{200 + layout.slot}.0.0/16",
        f"--node-ip={layout.local}",
        "--node-lease-duration-seconds=40",
    ]
    return Program("kwok", command, layout.home)


def create_simulated_nodes(api: Api, count: int, *, gpus: int = 8, prefix: str = "kwok", **labels: str) -> list[str]:
    """Create `count` simulated nodes; real pods stay away from them unless they tolerate the taint. Their names."""
    names = [f"{prefix}-{index}" for index in range(count)]
    resources = {"cpu": "64", "memory": "512Gi", "pods": "1000", "nvidia.com/gpu": str(gpus)}
    for name in names:
        metadata = {
            "name": name,
            "labels": {**dict([LABEL]), "kubernetes.io/hostname": name, **labels},
            "annotations": {"kwok.x-k8s.io/node": "fake", "node.alpha.kubernetes.io/ttl": "0"},
        }
        status = {"capacity": resources, "allocatable": resources, "phase": "Running"}
        node = {"metadata": metadata, "spec": {"taints": [TAINT]}, "status": status}
        api.create("/api/v1/nodes", node)
    return names
