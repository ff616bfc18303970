"""Control groups of a cluster's nodes, under version 1 (one tree per controller) and version 2 (one tree)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.processes import ClusterError


def hierarchies(mounts: Path = Path("/proc/self/mounts")) -> list[tuple[str, Path]]:
    """(kind, where it is mounted) of each cgroup tree; kind is "cgroup" or "cgroup2"."""
    found = [line.split()[:3] for line in mounts.read_text().splitlines()]
    return sorted({(kind, Path(place)) for _, place, kind in found if kind in ("cgroup", "cgroup2")})


def create(name: str) -> None:
    """Create the group, a path below each tree's root, ready for containers in it."""
    for kind, root in hierarchies():
        if kind == "cgroup2" and not (controllers := (root / "cgroup.controllers").read_text().split()):
            continue  # beside version 1, its tree has no controllers and kubelet does not look at it
        group = root
        for part in name.split("/"):
            if kind == "cgroup2":
                (group / "cgroup.subtree_control").write_text(" ".join(f"+{word}" for word in controllers))
            group = group / part
            group.mkdir(exist_ok=True)
            # Version 1: a group without processors and memory nodes takes no process.
            for file in ("cpuset.cpus", "cpuset.mems"):
                if kind == "cgroup" and (group / file).exists():
                    (group / file).write_text((group.parent / file).read_text())


def processes(name: str) -> set[int]:
    """The processes in the group and below it, in any tree."""
    found: set[int] = set()
    for group in groups(name):
        try:
            found.update(int(line) for line in (group / "cgroup.procs").read_text().split())
        except OSError:  # the group has gone meanwhile
            continue
    return found - {0}  # 0: a process of another pid namespace


def remove(name: str, timeout: float = 15.0) -> None:
    """Kill whatever is in the group and remove it, in every tree. Raises ClusterError if something stays."""
    deadline = time.monotonic() + timeout
    while left := list(groups(name)):
        for pid in processes(name):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for group in left:
            thawed = group / "freezer.state"
            try:
                if thawed.exists():
                    thawed.write_text("THAWED")
                group.rmdir()
            except OSError:  # still has a process; look again
                continue
        if time.monotonic() > deadline:
            raise ClusterError(f"control groups that cannot be removed: {', '.join(map(str, left))}")
        time.sleep(0.02)


def groups(name: str) -> Iterator[Path]:
    """The group's folders in every tree, innermost first."""
    for _, root in hierarchies():
        for folder, _, _ in os.walk(root / name, topdown=False):
            yield Path(folder)
