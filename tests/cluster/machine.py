"""What this machine has and lacks for a cluster."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from tests.cluster import thin
from tests.cluster.node import CNI_PROGRAMS
from tools.cluster import build

# program -> the Debian package that brings it
NODE_PROGRAMS = {
    "containerd": "containerd",
    "containerd-shim-runc-v2": "containerd",
    "runc": "runc",
    "nft": "nftables",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "setpriv": "util-linux",
}
CONTROL_PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
BUILT_FOR_NODES = ("kubelet", "kube-proxy", "coredns", "pause")


def missing_packages() -> list[str]:
    """Debian packages whose programs nodes need and this machine lacks."""
    missing = {package for program, package in NODE_PROGRAMS.items() if shutil.which(program) is None}
    if not any((path / "bridge").exists() for path in CNI_PROGRAMS):
        missing.add("containernetworking-plugins")
    return sorted(missing)


def not_built(*programs: str) -> str | None:
    """Which of the programs are not there and how to build them, or None."""
    if absent := build.missing(build.read_pins(), programs):
        return f"{', '.join(absent)}: not built yet (python tools/cluster/build.py)"
    return None


def why_no_control_plane() -> str | None:
    """Why no control plane can start here, or None."""
    return not_built(*CONTROL_PROGRAMS)


def why_no_nodes() -> str | None:
    """Why no real node can start here, or None."""
    if platform.system() != "Linux":
        return f"nodes need Linux and this is {platform.system()}"
    if os.geteuid() != 0:
        return "nodes need root: containers, namespaces and control groups are made by root"
    if packages := missing_packages():
        return f"nodes need Debian packages that are not installed: {' '.join(packages)}"
    if folders := thin.unreadable():
        return f"containers run as another user, who may not read {', '.join(map(str, folders))} (chmod -R o+rX)"
    return not_built(*CONTROL_PROGRAMS, *BUILT_FOR_NODES)


def program(name: str) -> Path:
    """Where a program of the cluster lies. It must have been built."""
    found = build.find(name, build.read_pins())
    assert found is not None, f"{name} is not built"
    return found


def built_file(name: str) -> Path:
    """A file that the build put beside the programs."""
    return build.read_pins().folder / name


def failures_folder() -> Path:
    """Where the logs and events of failed tests are kept."""
    return build.cache_dir() / "failures"
