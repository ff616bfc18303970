"""The wires of a cluster: a bridge on the host and, per node, a network and a mount namespace with a cable into it.

Nodes reach each other's pods over the bridge itself, so the host forwards nothing and none of its settings is changed.
"""

from __future__ import annotations

from tests.cluster import processors, slots
from tests.cluster.layout import Layout, NodeLayout
from tests.cluster.processes import run

# What kubelet and containerd keep at fixed places; each node gets its own of each.
FIXED_FOLDERS = ("/run/containerd", "/var/lib/kubelet", "/var/lib/cni", "/var/log/pods", "/var/log/containers")


def create_bridge(layout: Layout) -> None:
    """The host's end of every cable, and the folder whose mounts hold the namespaces alive."""
    layout.namespaces.mkdir(parents=True)
    # A mount namespace can be held only by a mount that is not shared with others.
    run("mount", "--bind", layout.namespaces, layout.namespaces)
    run("mount", "--make-private", layout.namespaces)
    run("ip", "link", "add", layout.bridge, "type", "bridge")
    run("ip", "address", "add", f"{layout.address}/24", "dev", layout.bridge)
    run("ip", "link", "set", layout.bridge, "up")


def create_node(layout: Layout, node: NodeLayout) -> None:
    """The node's namespaces, its processors, its cable and its routes."""
    for path in (node.network_namespace, node.mount_namespace):
        path.touch()
    slots.make_folders(FIXED_FOLDERS)
    script = ""
    for place in FIXED_FOLDERS:
        own = node.home / place.strip("/").replace("/", "-")
        own.mkdir(parents=True)
        script += f"mount --bind {own} {place}\n"
    for name, folder in processors.describe(node.home / "processors", node.cpus).items():
        script += f"mount --bind {folder} {processors.SYSTEM / name}\n"
    namespaces = [f"--net={node.network_namespace}", f"--mount={node.mount_namespace}"]
    run("unshare", *namespaces, "--propagation", "private", "sh", "-ec", script)
    run("ip", "link", "add", node.link, "type", "veth", "peer", "name", "eth0", "netns", node.network_namespace)
    run("ip", "link", "set", node.link, "master", layout.bridge, "up")
    run("ip", "route", "add", node.pod_cidr, "via", node.address, "dev", layout.bridge)
    inside = [
        "echo 1 > /proc/sys/net/ipv4/ip_forward",
        "ip link set lo up",
        f"ip address add {node.address}/24 dev eth0",
        "ip link set eth0 up",
        f"ip route add default via {layout.address}",
        *(f"ip route add {other.pod_cidr} via {other.address}" for other in layout.nodes if other != node),
    ]
    run("nsenter", f"--net={node.network_namespace}", "sh", "-ec", "\n".join(inside))


def enter(node: NodeLayout) -> list[str]:
    """What a program of the node is started through. Not `ip netns exec`: it mounts /sys anew, without cgroups."""
    return ["nsenter", f"--net={node.network_namespace}", f"--mount={node.mount_namespace}"]


def cut(node: NodeLayout) -> None:
    """Pull the node's cable."""
    run("ip", "link", "set", node.link, "down")


def mend(node: NodeLayout) -> None:
    """Put the cable back."""
    run("ip", "link", "set", node.link, "up")
