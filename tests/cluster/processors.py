"""The processors that a node says it has: counted only, like its GPUs. Its containers share those that are there.

A kubelet counts them in /sys, online or not, and what it counts is what the scheduler shares out.
"""

from __future__ import annotations

from pathlib import Path

SYSTEM = Path("/sys/devices/system")


def describe(folder: Path, count: int) -> dict[str, Path]:
    """Write what /sys says of `count` processors, of which those of this machine are online: name below SYSTEM ->
    the folder that stands in for it.
    """
    cpu, node = folder / "cpu", folder / "node"
    node.mkdir(parents=True)  # empty: were there NUMA nodes, the kubelet would count those online only
    for number in range(count):
        topology = cpu / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "core_id").write_text(f"{number}\n")
        (topology / "physical_package_id").write_text("0\n")
    # Control groups are given the processors that are online, and the kernel refuses those that are not there.
    (cpu / "online").write_text((SYSTEM / "cpu" / "online").read_text())
    return {path.name: path for path in (cpu, node) if (SYSTEM / path.name).exists()}
