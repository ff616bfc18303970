"""What a cluster is called and where it lies: addresses, folders, names. Pure: nothing here touches the machine.

Several clusters can live on one machine, each in a slot of its own; every address and name follows from the slot.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

SLOTS = 16
# Every process of a cluster carries its folder in this variable: that is how a sweep knows them again.
MARK = "ARRIERO_CLUSTER"


@dataclass(frozen=True)
class NodeLayout:
    """One node: its name, its network namespace's address, the addresses of its pods, and its folder."""

    number: int
    name: str
    address: str
    pod_cidr: str
    link: str  # the end of its cable on the host
    cgroup: str  # below each hierarchy's root
    cpus: int  # processors that the node says it has
    home: Path
    network_namespace: Path
    mount_namespace: Path


@dataclass(frozen=True)
class Layout:
    """One cluster. `node_count` 0: a control plane alone, on loopback, for which nobody need be root."""

    slot: int
    node_count: int
    base: Path
    cpus: int = 8

    @property
    def name(self) -> str:
        return f"arriero{self.slot}"

    @property
    def home(self) -> Path:
        return self.base / str(self.slot)

    @property
    def lock(self) -> Path:
        """Held by the process that owns the slot, beside the folder: the folder comes and goes."""
        return self.base / f"{self.slot}.lock"

    @property
    def kubeconfig(self) -> Path:
        return self.home / "kubeconfig"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def namespaces(self) -> Path:
        return self.home / "namespaces"

    @property
    def kernels(self) -> Path:
        """What workers' containers see as their cache of compiled kernels."""
        return self.home / "kernels"

    @property
    def bridge(self) -> str:
        return self.name

    @property
    def local(self) -> str:
        """Where what only the host may reach listens. Linux answers at all of 127/8, others at its first address."""
        return f"127.50.{self.slot}.1" if sys.platform == "linux" else "127.0.0.1"

    @property
    def address(self) -> str:
        """Where the API server and the DNS server listen: the host's end of the bridge, or loopback."""
        return f"10.50.{self.slot}.1" if self.node_count else self.local

    @property
    def server(self) -> str:
        return f"https://{self.address}:6443"

    @property
    def pod_cidr(self) -> str:
        return f"10.{100 + self.slot}.0.0/16"

    @property
    def service_cidr(self) -> str:
        return f"10.{150 + self.slot}.0.0/16"

    @property
    def service_address(self) -> str:
        """The address of the service `kubernetes`."""
        return f"10.{150 + self.slot}.0.1"

    @property
    def cgroup(self) -> str:
        return self.name

    def node(self, number: int) -> NodeLayout:
        """Node `number`, counted from 1."""
        assert 1 <= number <= self.node_count
        return NodeLayout(
            number=number,
            name=f"node-{number}",
            address=f"10.50.{self.slot}.{10 + number}",
            pod_cidr=f"10.{100 + self.slot}.{number}.0/24",
            link=f"{self.name}n{number}",
            cgroup=f"{self.cgroup}/node-{number}",
            cpus=self.cpus,
            home=self.home / f"node-{number}",
            network_namespace=self.namespaces / f"node-{number}.net",
            mount_namespace=self.namespaces / f"node-{number}.mnt",
        )

    @property
    def nodes(self) -> tuple[NodeLayout, ...]:
        return tuple(self.node(number) for number in range(1, self.node_count + 1))
