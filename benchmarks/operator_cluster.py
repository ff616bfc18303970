"""The cluster that operators are measured on: a real control plane on this machine, nodes and pods simulated (KWOK).

Fresh for each measurement. What is told of it: when pods and resources came to what state, by a watch; writes to the
API, as the API server counts them; CPU time and memory of each program.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.cluster import kwok  # noqa: E402 - a benchmark, not a package
from tests.cluster.cluster import Cluster, start_cluster  # noqa: E402

NAMESPACE = "scale"
FAST = ("--kube-api-qps=500", "--kube-api-burst=1000")
MANAGER_FLAGS = (
    *FAST,
    "--concurrent-statefulset-syncs=20",
    "--concurrent-deployment-syncs=20",
    "--concurrent-replicaset-syncs=20",
    "--node-monitor-grace-period=30m",
)
"""With the default of 20 requests a second the controller manager is all that one measures. And where the machine is
busy, simulated nodes are late to say that they live: their pods would count as not ready for ever after.
"""
_REQUESTS = re.compile(r"^apiserver_request_total\{([^}]*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_WRITES = {"POST", "PUT", "PATCH", "APPLY", "DELETE", "DELETECOLLECTION"}
_ASKS = {"subjectaccessreviews", "tokenreviews", "selfsubjectaccessreviews", "selfsubjectrulesreviews"}

Writes = dict[str, int]
"""Requests that write, by "VERB resource/subresource"."""


class _Metadata(msgspec.Struct):
    name: str = ""
    uid: str = ""
    resourceVersion: str = ""
    deletionTimestamp: str | None = None


class _Condition(msgspec.Struct):
    type: str
    status: str


class _Status(msgspec.Struct):
    phase: str = ""
    ready: str = ""
    readyReplicas: int = 0
    conditions: list[_Condition] = []


class _Spec(msgspec.Struct):
    nodeName: str = ""


class Seen(msgspec.Struct):
    """What of an object is looked at."""

    metadata: _Metadata
    status: _Status = msgspec.field(default_factory=_Status)
    spec: _Spec = msgspec.field(default_factory=_Spec)

    def holds(self, condition: str) -> bool:
        return any(c.type == condition and c.status == "True" for c in self.status.conditions)


class _Event(msgspec.Struct):
    type: str
    object: Seen


class _Listed(msgspec.Struct):
    metadata: _Metadata
    items: list[Seen]


class Census:
    """Counts objects of one kind by predicates, as a watch tells of them; and when a count was first reached."""

    def __init__(self, server: Server, path: str, selector: str, tests: dict[str, Callable[[Seen], bool]]) -> None:
        self.seen: dict[str, Seen] = {}
        self.counts = dict.fromkeys(tests, 0)
        self._tests = tests
        self._goals: list[tuple[Callable[[Census], bool], threading.Event, list[float]]] = []
        self._lock = threading.Lock()
        self._server, self._path = server, f"{path}?labelSelector={selector}"
        self._closed = False
        self._open()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def reach(self, goal: Callable[[Census], bool]) -> Callable[[float], float]:
        """Note when the goal is reached; the answer waits for it and tells the time."""
        reached, times = threading.Event(), list[float]()
        with self._lock:
            self._goals.append((goal, reached, times))
            self._check()

        def wait(seconds: float) -> float:
            deadline = time.monotonic() + seconds
            while not reached.wait(1.0):
                if not self._thread.is_alive():
                    raise SystemExit("nobody watches any longer")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not reached within {seconds:g} s: {self.counts} of {len(self.seen)}")
            return times[0]

        return wait

    def close(self) -> None:
        self._closed = True
        with suppress(OSError, AttributeError):
            self._connection.sock.shutdown(socket.SHUT_RDWR)

    def _open(self) -> None:
        """Take what there is, and watch from there on."""
        connection, response = self._server.open(self._path)
        listed = msgspec.json.decode(response.read(), type=_Listed)
        connection.close()
        with self._lock:
            self.seen.clear()
            self.counts = dict.fromkeys(self._tests, 0)
            for found in listed.items:
                self._take(_Event("ADDED", found))
            self._check()
        query = f"&watch=true&timeoutSeconds=3600&resourceVersion={listed.metadata.resourceVersion}"
        self._connection, self._response = self._server.open(self._path + query)

    def _read(self) -> None:
        """The API server ends a watch that cannot keep up with it: then all is taken anew."""
        decoder = msgspec.json.Decoder(_Event)
        while not self._closed:
            with suppress(OSError, ValueError, http.client.HTTPException, AttributeError):
                while (line := self._response.readline()) and (event := decoder.decode(line)).type != "ERROR":
                    with self._lock:
                        self._take(event)
                        self._check()
            if not self._closed:
                self._open()

    def _take(self, event: _Event) -> None:
        name = event.object.metadata.name
        old = self.seen.pop(name, None)
        new = event.object if event.type != "DELETED" else None
        for kind, test in self._tests.items():
            self.counts[kind] += (new is not None and test(new)) - (old is not None and test(old))
        if new is not None:
            self.seen[name] = new

    def _check(self) -> None:
        for entry in [entry for entry in self._goals if entry[0](self)]:
            self._goals.remove(entry)
            entry[2].append(time.monotonic())
            entry[1].set()


class Server:
    """The API server, as often and as cheaply as a benchmark asks it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        config = json.loads(cluster.kubeconfig.read_text())
        self._host = config["clusters"][0]["cluster"]["server"].removeprefix("https://")
        self.header = {"Authorization": f"Bearer {config['users'][0]['user']['token']}"}
        self._tls = ssl.create_default_context(cafile=config["clusters"][0]["cluster"]["certificate-authority"])

    def open(self, path: str) -> tuple[http.client.HTTPSConnection, http.client.HTTPResponse]:
        """The answer to a request, once there is a good one: a definition that was just made takes its time."""
        for _ in range(100):
            connection = http.client.HTTPSConnection(self._host, context=self._tls)
            connection.request("GET", path, headers=self.header)
            response = connection.getresponse()
            if response.status == 200:
                return connection, response
            connection.close()
            time.sleep(0.2)
        raise SystemExit(f"{path}: {response.status} {response.reason}")

    def writes(self) -> Writes:
        """Since the cluster began: every write but those of leases, and of what only asks in the form of a write."""
        found: Writes = {}
        for labels, count in _REQUESTS.findall(self.cluster.api.text("/metrics")):
            told = dict(_LABEL.findall(labels))
            if told["verb"] in _WRITES and told["resource"] not in _ASKS | {"leases"}:
                what = f"{told['verb']} {told['resource']}" + (f"/{told['subresource']}" * bool(told["subresource"]))
                found[what] = found.get(what, 0) + int(float(count))
        return found

    def count(self, path: str) -> int:
        page = self.cluster.api.get(path, limit="1")
        return len(page["items"]) + int(page["metadata"].get("remainingItemCount") or 0)

    def cpu(self) -> dict[str, float]:
        return {program.name: cpu_seconds(program.pid) for program in self.cluster.programs}


def difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    return {key: value - before.get(key, 0) for key, value in after.items() if value != before.get(key, 0)}


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def peak_bytes(pid: int) -> int:
    """The most memory that a process has held (VmHWM)."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


@contextmanager
def simulated_cluster(nodes: int, gpus: int) -> Iterator[Server]:
    """A control plane with `nodes` simulated nodes, which engines of one server stand in for. Needs root."""
    cluster = start_cluster(0)
    try:
        for program in (cluster.control_plane.controller_manager, cluster.control_plane.scheduler):
            mine = MANAGER_FLAGS if program is cluster.control_plane.controller_manager else FAST
            program.command += mine
            program.restart()
        cluster.start_kwok()
        for name in kwok.create_simulated_nodes(cluster.api, nodes, gpus=gpus):
            cluster.api.patch(f"/api/v1/nodes/{name}", {"spec": {"taints": None}})
        cluster.api.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        with _engines(f"10.{200 + cluster.layout.slot}.0.0/16"):
            yield Server(cluster)
    finally:
        cluster.close()


@contextmanager
def _engines(addresses: str) -> Iterator[None]:
    command = [sys.executable, str(Path(__file__).with_name("operator_engines.py")), addresses]
    engines = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "GRPC_VERBOSITY": "ERROR"})
    try:
        assert engines.stdout is not None
        if engines.stdout.readline() != b"ready\n":
            raise SystemExit("the engines of the simulated pods did not start")
        yield
    finally:
        engines.terminate()
        engines.wait()
