"""A cluster leaves nothing behind, whether it is ended or its owner is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster import kwok, slots, sweep
from tests.cluster.api import Kubectl
from tests.cluster.cluster import ROOT, Cluster, start_cluster
from tests.cluster.layout import Layout
from tests.cluster.machine import program
from tests.cluster.pods import SLEEPER, pod_spec
from tests.cluster.processes import wait_until

pytestmark = pytest.mark.cluster


@pytest.fixture
def owner(node_cluster: Cluster) -> Iterator[tuple[subprocess.Popen[bytes], Layout]]:
    """Another cluster of one node, in a process of its own, beside the session's."""
    command = [sys.executable, "-m", "tests.cluster", "own", "--nodes=1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    kubeconfig = Path(process.stdout.readline().decode().strip())
    assert kubeconfig.name == "kubeconfig"
    layout = Layout(int(kubeconfig.parent.name), 1, slots.base_folder())
    assert layout.slot != node_cluster.layout.slot
    yield process, layout
    process.kill()
    process.wait()
    process.stdout.close()


def run_a_pod(layout: Layout) -> None:
    """Something to leave behind: a container with volumes."""
    kubectl = Kubectl(program("kubectl"), layout.kubeconfig)
    spec = pod_spec(SLEEPER, volumeMounts=[{"name": "memory", "mountPath": "/dev/shm"}])
    spec["volumes"] = [{"name": "memory", "emptyDir": {"medium": "Memory"}}]
    spec["automountServiceAccountToken"] = True
    kubectl.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": spec})
    kubectl("wait", "--for=condition=Ready", "pod/one", "--timeout=60s", timeout=90.0)


def traces(layout: Layout) -> list[str]:
    return [line.split(" ", 1)[0] for line in sweep.leftovers(layout)]


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL], ids=["ended", "killed"])
def test_nothing_is_left(owner: tuple[subprocess.Popen[bytes], Layout], ending: signal.Signals) -> None:
    process, layout = owner
    run_a_pod(layout)
    assert {"process", "folder", "control", "mount", "link"} <= set(traces(layout)), "what is looked for is there"
    os.kill(process.pid, ending)
    process.wait(60)
    wait_until(lambda: not sweep.leftovers(layout), "end of everything that the cluster made", 60.0)
    wait_until(lambda: not layout.lock.exists(), "end of the lock")


def test_a_control_plane_alone_simulates_nodes_and_leaves_nothing(own_cluster: Cluster) -> None:
    """What starts where nobody is root."""
    alone = start_cluster(0)
    try:
        assert alone.layout.slot != own_cluster.layout.slot
        alone.start_kwok()
        (name,) = kwok.create_simulated_nodes(alone.api, 1)
        wait_until(lambda: alone.is_node_ready(name), "Ready simulated node")
    finally:
        alone.close()
    assert sweep.leftovers(alone.layout) == []
