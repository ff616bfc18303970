"""A Kubernetes cluster of this machine's own: a real control plane and real nodes that run real containers."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.cluster import dns, images, kernels, kwok, machine, network, slots, sweep, thin
from tests.cluster.api import Api, Kubectl
from tests.cluster.control_plane import ControlPlane
from tests.cluster.credentials import Credentials, write_credentials
from tests.cluster.layout import Layout
from tests.cluster.node import PAUSE_IMAGE, Node
from tests.cluster.processes import ClusterError, Program, wait_until

ROOT = Path(__file__).resolve().parents[2]


class Cluster:
    """A running cluster; `close` leaves nothing of it. Made by `start_cluster`."""

    def __init__(self, slot: slots.Slot, layout: Layout) -> None:
        self.layout = layout
        self._slot = slot
        self._credentials: Credentials = write_credentials(layout)
        self.api = Api.with_token(layout.server, self._credentials.authority, self._credentials.tokens["admin"])
        self.control_plane = ControlPlane(layout, self._credentials, machine.program)
        self.nodes = tuple(Node(layout, node, self._credentials, machine.program) for node in layout.nodes)
        self.dns: Program | None = None
        self.kwok: Program | None = None
        self.started_in = 0.0  # seconds, from the first program to the last node Ready
        self._gpus: dict[str, int] = {}
        self._reaper = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster", "reap", str(layout.slot)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def kubeconfig(self) -> Path:
        return self.layout.kubeconfig

    def kubectl(self, namespace: str = "default") -> Kubectl:
        return Kubectl(machine.program("kubectl"), self.kubeconfig, namespace)

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def _start(self, gpus: int) -> None:
        if self.nodes:
            network.create_bridge(self.layout)
        with open(os.open(self.kubeconfig, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            json.dump(self._credentials.kubeconfig_of("admin"), file, indent=2)
        for program in self.control_plane.programs:
            program.start()
        if self.nodes:
            kernels.copy(self.layout.kernels)
        for node in self.nodes:
            node.prepare()
        if self.nodes:
            self._load_images()
        self.control_plane.wait(self.api)
        if self.nodes:
            dns.allow_dns(self.api)
            self.dns = dns.dns_program(self.layout, self._credentials, machine.program("coredns"))
            self.dns.start()
            for node in self.nodes:
                node.start()
            self.wait_for_nodes()
            for node in self.nodes:
                self.set_gpus(node.name, gpus)
        account = "/api/v1/namespaces/default/serviceaccounts/default"  # without it no pod can be created
        wait_until(lambda: self.api.exists(account), "service account", 30.0, self.control_plane.programs)

    def _load_images(self) -> None:
        folder = self.layout.home / "images"
        pause = images.pause_image(PAUSE_IMAGE, machine.program("pause"))
        archive = images.write_images(folder / "images.tar", pause, *thin.thin_images())
        for node in self.nodes:
            node.wait_for_containerd()
            node.load_image(archive)

    def load_image(self, archive: Path) -> None:
        """Make an image known to every node."""
        for node in self.nodes:
            node.load_image(archive)

    def is_node_ready(self, name: str) -> bool:
        try:
            conditions = self.api.get(f"/api/v1/nodes/{name}")["status"].get("conditions", [])
        except Exception:  # not registered yet, or the server is away for a moment: not ready
            return False
        return any(entry["type"] == "Ready" and entry["status"] == "True" for entry in conditions)

    def wait_for_nodes(self, timeout: float = 90.0) -> None:
        """Wait until every real node is Ready. Raises ClusterError."""
        for node in self.nodes:
            ready = functools.partial(self.is_node_ready, node.name)
            wait_until(ready, f"Ready {node.name}", timeout, node.programs)

    def set_gpus(self, node: str, count: int) -> None:
        """Give a real node `count` GPUs that are only counted: the scheduler honours them, no device is there."""
        self._gpus[node] = count
        amount = {"nvidia.com/gpu": str(count)}
        self.api.patch(f"/api/v1/nodes/{node}/status", {"status": {"capacity": amount, "allocatable": amount}})

    def restart_kubelet(self, name: str) -> None:
        """Restart a node's kubelet and wait until the node is Ready with its GPUs: a new kubelet forgets them."""
        node = self.node(name)
        node.kubelet.stop()
        beat = self._last_beat(name)
        node.kubelet.start()
        wait_until(lambda: self._last_beat(name) != beat, f"word of {name}", 60.0, node.programs)
        self.wait_for_nodes()
        self.set_gpus(name, self._gpus[name])

    def _last_beat(self, name: str) -> object:
        conditions = self.api.get(f"/api/v1/nodes/{name}")["status"]["conditions"]
        return [entry["lastHeartbeatTime"] for entry in conditions if entry["type"] == "Ready"]

    def wait_for_api(self, timeout: float = 60.0) -> None:
        """Wait until the API server is ready, say after a restart."""
        self.control_plane.wait(self.api, timeout)

    def mend(self) -> None:
        """Undo what a test did: cables back, programs running, nodes Ready with their GPUs. Raises ClusterError."""
        for node in self.nodes:
            node.mend()
        kubelets = {node.kubelet: node.name for node in self.nodes}
        dead = [program for program in self.programs if not program.is_running]
        for program in dead:
            if program not in kubelets:
                program.start()
        self.wait_for_api()
        for program in dead:
            if program in kubelets:
                self.restart_kubelet(kubelets[program])
        self.wait_for_nodes()

    def start_kwok(self) -> None:
        """Start to simulate the nodes that `kwok.create_simulated_nodes` creates. Once is enough."""
        if self.kwok is None:
            stages = machine.built_file("kwok-stages.yaml")
            self.kwok = kwok.kwok_program(self.layout, self._credentials, machine.program("kwok"), stages)
        if not self.kwok.is_running:
            self.kwok.start()

    @property
    def programs(self) -> tuple[Program, ...]:
        extra = [program for program in (self.dns, self.kwok) if program]
        return (*self.control_plane.programs, *extra, *(program for node in self.nodes for program in node.programs))

    def close(self) -> None:
        """End everything and leave nothing. Raises ClusterError if something stays."""
        self.api.close()
        for program in reversed(self.programs):
            program.kill()
        try:
            sweep.sweep(self.layout)
        finally:
            self._reaper.kill()
            self._reaper.wait()
            self._slot.release()


def start_cluster(node_count: int = 2, *, gpus: int = 8, cpus: int = 8) -> Cluster:
    """Start a cluster of `node_count` real nodes with `gpus` GPUs and `cpus` processors each, both of which are only
    counted; 0 nodes: the control plane alone, for KWOK.

    Raises ClusterError with what this machine lacks, or with the log of what did not start.
    """
    if lack := machine.why_no_nodes() if node_count else machine.why_no_control_plane():
        raise ClusterError(lack)
    sweep.sweep_all()
    slot = slots.acquire_any()
    layout = Layout(slot.number, node_count, slots.base_folder(), cpus)
    if node_count:
        kernels.compiled()  # takes a minute when the worker's sources are new, which is not the cluster's start
    layout.home.mkdir(mode=0o755)
    cluster = Cluster(slot, layout)
    began = time.monotonic()
    try:
        cluster._start(gpus)
        cluster.started_in = time.monotonic() - began
    except BaseException:
        keep_logs(layout, "start")
        cluster.close()
        raise
    return cluster


def keep_logs(layout: Layout, name: str, more: Mapping[str, str] | None = None) -> Path:
    """Copy the logs of every program, and `more` files, to where they outlive the cluster; that folder."""
    folder = machine.failures_folder() / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    for log in layout.logs.glob("*.log"):
        with contextlib.suppress(OSError):
            (folder / log.name).write_bytes(log.read_bytes()[-(2 << 20) :])
    for file, text in (more or {}).items():
        (folder / file).write_text(text)
    return folder
