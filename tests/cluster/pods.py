"""Objects that the cluster's tests create, and what they wait for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.cluster.api import Api
from tests.cluster.processes import wait_until
from tests.cluster.thin import THIN_IMAGE

SERVER = ["python", "-u", "-m", "http.server", "8000", "--directory", "/tmp"]
SLEEPER = ["python", "-c", "import signal; signal.pause()"]


def pod(
    name: str, command: list[str], *, labels: Mapping[str, str] | None = None, **container: object
) -> dict[str, Any]:
    """A pod of the thin image."""
    metadata = {"name": name, "labels": dict(labels or {})}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": pod_spec(command, **container),
    }


def pod_spec(command: list[str], **container: object) -> dict[str, Any]:
    """The spec of a pod that runs `command` in the thin image. `container`: more of its container."""
    main = {"name": "main", "image": THIN_IMAGE, "imagePullPolicy": "Never", "command": command, **container}
    return {"terminationGracePeriodSeconds": 1, "automountServiceAccountToken": False, "containers": [main]}


def spread_set(name: str, replicas: int) -> dict[str, Any]:
    """A StatefulSet of web servers, one per node."""
    labels = {"app": name}
    probe = {"httpGet": {"path": "/", "port": 8000}, "periodSeconds": 1}
    apart = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": labels}}
    spec = pod_spec(SERVER, readinessProbe=probe)
    spec["affinity"] = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}}
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "serviceName": f"{name}-pods",
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }


def service(name: str, app: str, *, headless: bool = False) -> dict[str, Any]:
    spec: dict[str, Any] = {"selector": {"app": app}, "ports": [{"port": 80, "targetPort": 8000}]}
    if headless:
        spec |= {"clusterIP": "None", "ports": [{"port": 8000}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


class Pods:
    """The pods of one namespace."""

    def __init__(self, api: Api, namespace: str) -> None:
        self.api = api
        self.path = f"/api/v1/namespaces/{namespace}/pods"

    def get(self, name: str) -> dict[str, Any]:
        return self.api.get(f"{self.path}/{name}")

    def is_ready(self, name: str) -> bool:
        if not self.api.exists(f"{self.path}/{name}"):
            return False
        conditions = self.get(name)["status"].get("conditions", [])
        return any(entry["type"] == "Ready" and entry["status"] == "True" for entry in conditions)

    def wait_ready(self, *names: str, timeout: float = 60.0) -> None:
        for name in names:
            wait_until(lambda name=name: self.is_ready(name), f"Ready pod {name}", timeout)  # type: ignore[misc]

    def restarts(self, name: str) -> int:
        statuses = self.get(name)["status"].get("containerStatuses", [])
        return sum(int(entry["restartCount"]) for entry in statuses)

    def containers(self, name: str) -> list[str]:
        """The ids of the pod's containers: another id is another container."""
        return [entry["containerID"] for entry in self.get(name)["status"]["containerStatuses"]]
