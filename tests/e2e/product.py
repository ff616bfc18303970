"""The product on a test cluster: its release, a LlamaDeployment, and what a user may ask of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from tests.cluster import machine
from tests.cluster.cluster import Cluster
from tests.cluster.processes import ClusterError, wait_until, without_proxies
from tests.cluster.thin import PROJECT

SYSTEM = "arriero-system"
CHART = PROJECT / "charts" / "arriero"
CHECKPOINT = PROJECT / "examples" / "tiny_llama" / "checkpoint"
START = 240.0
"""Seconds that a group may take to serve, on a machine with two busy cores."""

Spec = dict[str, Any]


class Product:
    """The installed release."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.system = cluster.kubectl(SYSTEM)

    def helm(self, *arguments: str, timeout: float = 240.0) -> str:
        command = [str(machine.program("helm")), f"--kubeconfig={self.cluster.kubeconfig}", f"--namespace={SYSTEM}"]
        answer = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, check=False, timeout=timeout, env=without_proxies()
        )
        if answer.returncode != 0:
            raise ClusterError(f"helm {' '.join(arguments)}: {answer.stderr.strip() or answer.stdout.strip()}")
        return answer.stdout

    def install(self) -> str:
        """helm install, with the images of this checkout, and short patience: tests wait for what users wait for."""
        images = {f"images.{name}.repository": f"arriero-{name}" for name in ("operator", "router", "worker")}
        values = {**images, "images.tag": "test", "operator.lostSeconds": "5", "operator.bindSeconds": "20"}
        sets = [f"--set={key}={value}" for key, value in values.items()]
        return self.helm("install", "arriero", str(CHART), "--create-namespace", "--wait", "--timeout=200s", *sets)

    def uninstall(self) -> None:
        self.helm("uninstall", "arriero", "--wait")
        kubectl = self.cluster.kubectl()
        kubectl("delete", "crd", "llamadeployments.serving.arriero.dev", "--timeout=60s", timeout=90.0)
        kubectl("delete", "namespace", SYSTEM, "--timeout=90s", timeout=120.0)

    def leader(self) -> str:
        """The operator's pod that leads."""
        lease = self.system.get("lease", "arriero-operator")
        return str((lease.get("spec") or {}).get("holderIdentity") or "")

    def operator_log(self) -> str:
        pods = self.system.get("pods")["items"]
        return "\n".join(self.system("logs", pod["metadata"]["name"], check=False) for pod in pods)


class Llama:
    """One LlamaDeployment, in a namespace of its own."""

    def __init__(self, product: Product, namespace: str, name: str = "tiny-llama") -> None:
        self.product = product
        self.cluster = product.cluster
        self.namespace = namespace
        self.name = name
        self.kubectl = product.cluster.kubectl(namespace)

    def apply(self, tensor: int = 1, pipeline: int = 2, replicas: int = 1, **spec: Any) -> float:
        """Write the resource; the moment."""
        whole: Spec = {
            "model": {"name": self.name, "source": {"hostPath": {"path": str(CHECKPOINT)}}},
            "replicas": replicas,
            "parallelism": {"tensor": tensor, "pipeline": pipeline},
            "accelerator": {"type": "cpu", "perNode": max(2, tensor)},
            "rollout": {"drainSeconds": 10},
            **spec,
        }
        metadata = {"name": self.name}
        self.kubectl.apply(
            {
                "apiVersion": "serving.arriero.dev/v1alpha1",
                "kind": "LlamaDeployment",
                "metadata": metadata,
                "spec": whole,
            }
        )
        return time.monotonic()

    def get(self) -> dict[str, Any]:
        return self.kubectl.get("llama", self.name)

    def status(self) -> dict[str, Any]:
        try:
            return self.get().get("status") or {}
        except ClusterError:
            return {}  # the API server is away

    def condition(self, kind: str) -> dict[str, Any]:
        listed = self.status().get("conditions") or []
        return next((entry for entry in listed if entry["type"] == kind), {})

    def is_(self, phase: str) -> bool:
        return self.status().get("phase") == phase

    def wait_for(self, phase: str, timeout: float = START) -> float:
        """The moment when the status shows this phase."""
        self.wait(lambda: self.is_(phase), f"phase {phase}", timeout)
        return time.monotonic()

    def wait(self, condition: Callable[[], object], what: str, timeout: float = START) -> None:
        """Wait; what the status says stands in the failure."""
        try:
            wait_until(condition, what, timeout)
        except ClusterError as error:
            status = self.status()
            told = {key: status.get(key) for key in ("phase", "message", "ready", "groups")}
            raise ClusterError(f"{error}\nstatus: {json.dumps(told, indent=1)}") from None

    def pods(self, component: str = "worker") -> list[dict[str, Any]]:
        """By name."""
        selector = f"serving.arriero.dev/deployment={self.name},app.kubernetes.io/component={component}"
        items: list[dict[str, Any]] = self.kubectl.get("pods", f"--selector={selector}")["items"]
        return sorted(items, key=lambda pod: str(pod["metadata"]["name"]))

    def pod(self, name: str) -> dict[str, Any]:
        return self.kubectl.get("pod", name)

    def uids(self) -> dict[str, str]:
        return {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in self.pods()}

    def epoch(self) -> int:
        return max((int(group.get("epoch") or 0) for group in self.status().get("groups") or []), default=0)

    def address(self) -> str:
        """Of a router's pod; nodes' pods are reachable from this machine."""
        return next(str(pod["status"]["podIP"]) for pod in self.pods("router") if pod["status"].get("podIP"))

    def engine_serves(self, leader: str) -> bool:
        """What the leader's own readiness says; a leader too busy to say it has not said no."""
        address = self.pod(leader)["status"]["podIP"]
        try:
            with httpx.Client(trust_env=False, timeout=5.0) as client:
                return client.get(f"http://{address}:8000/health/ready").status_code == 200
        except httpx.HTTPError:
            return True

    def ask(self, question: str = "What is the capital of Peru?", timeout: float = 90.0, **more: Any) -> str:
        body = {"model": self.name, "messages": [{"role": "user", "content": question}], "temperature": 0, **more}
        with httpx.Client(trust_env=False, timeout=timeout) as client:
            answer = client.post(f"http://{self.address()}:8000/v1/chat/completions", json=body)
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["message"]["content"])

    def delete(self) -> None:
        """The resource and all that was made for it."""
        self.kubectl("delete", "llama", self.name, "--ignore-not-found", "--timeout=60s", timeout=90.0)
        self.wait(lambda: not self.leftovers(), "end of everything that was made", 120.0)

    def leftovers(self) -> list[str]:
        """Objects of the deployment that are there, of any kind that a namespace may hold."""
        kinds = "pods,statefulsets,deployments,replicasets,services,configmaps,serviceaccounts,roles,rolebindings"
        kinds += ",networkpolicies,poddisruptionbudgets,endpointslices,controllerrevisions,persistentvolumeclaims"
        selector = f"--selector=serving.arriero.dev/deployment={self.name}"
        return self.kubectl("get", kinds, selector, "--output=name").split()

    def kill_container(self, pod: str) -> None:
        """SIGKILL to all processes of the pod's containers, as the kernel does when memory runs out."""
        uid = self.pod(pod)["metadata"]["uid"]
        found = [pid for pid in processes_of(uid) if "pause" not in command_of(pid)]
        assert found, f"{pod} has no processes"
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    @contextmanager
    def load(self, streams: int = 4) -> Iterator[Load]:
        """Clients that ask for streams, one after another, as long as the block runs."""
        made = Load(self, streams)
        made.start()
        try:
            yield made
        finally:
            made.stop()


class Load:
    """Streaming clients; `answers` are whole texts, `broken` what went wrong."""

    def __init__(self, llama: Llama, streams: int) -> None:
        self.answers: list[str] = []
        self.broken: list[str] = []
        self._url = f"http://{llama.address()}:8000/v1/chat/completions"
        self._model = llama.name
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(streams)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(120.0)
            assert not thread.is_alive(), "a stream never ended"

    def _run(self) -> None:
        with httpx.Client(trust_env=False, timeout=120.0) as client:
            while not self._stopping.is_set():
                try:
                    self.answers.append(self._stream(client))
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    self.broken.append(f"{type(error).__name__}: {error}")

    def _stream(self, client: httpx.Client) -> str:
        messages = [{"role": "user", "content": "What is the capital of Peru?"}]
        body = {"model": self._model, "messages": messages, "temperature": 0, "stream": True}
        parts: list[str] = []
        done = False
        with client.stream("POST", self._url, json=body) as answer:
            if answer.status_code != 200:
                raise ValueError(f"status {answer.status_code}: {answer.read().decode()[:200]}")
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ValueError(str(event["error"]))
                    parts += [choice["delta"].get("content") or "" for choice in event["choices"]]
        if not done:
            raise ValueError("the stream was cut")
        return "".join(parts)


def processes_of(uid: str) -> list[int]:
    """Processes of a pod, by the control group that the kubelet put them into."""
    marks = (uid, uid.replace("-", "_"))
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                groups = (entry / "cgroup").read_text()
            except OSError:
                continue
            if any(mark in groups for mark in marks):
                found.append(int(entry.name))
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def readme_blocks(language: str) -> list[str]:
    """The code blocks of README.md, as a reader would copy them."""
    text = (PROJECT / "README.md").read_text()
    parts = text.split("```")
    return [part.partition("\n")[2] for part in parts[1::2] if part.startswith(f"{language}\n")]


def example(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((PROJECT / "examples" / name).read_text())
    return found
