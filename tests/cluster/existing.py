"""A cluster that is there already: KUBECONFIG's. Tests may use it, not harm it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.cluster import machine
from tests.cluster.api import Api, Kubectl
from tests.cluster.processes import Program, wait_until


class ExistingCluster:
    """The same `api` and `kubectl` as a cluster of our own, logged in as the kubeconfig's user."""

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig
        self._folder = tempfile.TemporaryDirectory(prefix="arriero-proxy-")
        socket = Path(self._folder.name) / "proxy.sock"
        command = [str(machine.program("kubectl")), f"--kubeconfig={kubeconfig}", "proxy", f"--unix-socket={socket}"]
        self._proxy = Program("kubectl-proxy", command, Path(self._folder.name))
        self._proxy.start()
        wait_until(socket.exists, "kubectl proxy", 20.0, [self._proxy])
        self.api = Api.through_proxy(socket)

    def kubectl(self, namespace: str = "default") -> Kubectl:
        return Kubectl(machine.program("kubectl"), self.kubeconfig, namespace)

    def close(self) -> None:
        self.api.close()
        self._proxy.kill()
        self._folder.cleanup()
