"""Remove everything that a cluster may have left: processes, control groups, mounts, namespaces, links, folders.

It runs before a cluster starts, when it ends, and, in a process of its own, when its owner dies. It goes by what is
there and not by what anybody remembers, so it works after any crash and finds nothing to do when there is nothing.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
from tests.cluster import cgroups, slots
from tests.cluster.layout import MARK, Layout
from tests.cluster.processes import ClusterError, run


def sweep(layout: Layout) -> None:
    """Remove what is left of the cluster in a slot that the caller holds. Raises ClusterError if any of it stays."""
    kill_marked(layout)
    if platform.system() == "Linux" and os.geteuid() == 0:
        cgroups.remove(layout.cgroup)
        kill_marked(layout)
        unmount_below(layout.home)
        remove_links(layout)
    remove_folder(layout.home)


def sweep_all() -> list[int]:
    """Sweep every slot that nobody holds; the slots swept."""
    swept = []
    for number in slots.used():
        if slot := slots.acquire(number):
            layout = Layout(number, 0, slots.base_folder())
            if leftovers(layout):
                sweep(layout)
                swept.append(number)
            slot.release()
    return swept


def sweep_when_free(number: int) -> None:
    """Wait until nobody holds the slot any more, then sweep it."""
    slot = slots.acquire(number, wait=True)
    assert slot is not None
    sweep(Layout(number, 0, slots.base_folder()))
    slot.release()


def leftovers(layout: Layout) -> list[str]:
    """What there is of the cluster on this machine, one line each."""
    found = [f"process {process.pid} {process.name()}" for process in marked(layout)]
    if layout.home.exists():
        found.append(f"folder {layout.home}")
    if platform.system() == "Linux":
        found += [f"control group {group}" for group in cgroups.groups(layout.cgroup)]
        found += [f"mount {place}" for place in mounts_below(layout.home)]
        found += [f"link {name}" for name in links(layout)]
    return found


def marked(layout: Layout) -> list[psutil.Process]:
    """The processes that carry the cluster's mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(layout.home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):  # it has gone, or is another user's
            continue
    return found


def kill_marked(layout: Layout, timeout: float = 15.0) -> None:
    deadline = time.monotonic() + timeout
    while left := marked(layout):
        for process in left:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        if time.monotonic() > deadline:
            raise ClusterError(f"processes that cannot be killed: {left}")
        psutil.wait_procs(left, timeout=0.2)


def mounts_below(folder: Path) -> list[Path]:
    """Mounts at the folder and below it, innermost first."""
    places = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place = Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), line.split()[4]))
        if place.is_relative_to(folder):
            places.append(place)
    return places[::-1]


def unmount_below(folder: Path) -> None:
    for place in mounts_below(folder):
        run("umount", "--lazy", place)


def links(layout: Layout) -> list[str]:
    if shutil.which("ip") is None:
        return []
    names = re.findall(r"^\d+: ([^:@]+)", run("ip", "-o", "link", "show"), re.MULTILINE)
    return [name for name in names if re.fullmatch(rf"{layout.name}(n\d+)?", name)]


def remove_links(layout: Layout) -> None:
    """The cables and the bridge, and with them every route that led there."""
    for name in links(layout):
        # A cable whose other end was in a namespace just removed may go by itself meanwhile.
        subprocess.run(["ip", "link", "delete", name], capture_output=True, check=False)
    if left := links(layout):
        raise ClusterError(f"links that cannot be removed: {', '.join(left)}")


def remove_folder(folder: Path) -> None:
    """Remove the folder, never through a mount into what is not the cluster's."""
    if platform.system() == "Linux" and (left := mounts_below(folder)):
        raise ClusterError(f"mounts that cannot be removed: {', '.join(map(str, left))}")
    if folder.exists():
        shutil.rmtree(folder)
