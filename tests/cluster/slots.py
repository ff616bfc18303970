"""Which clusters this machine has: each in a slot, held by the lock of the process that owns it."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

from tests.cluster.layout import SLOTS, Layout
from tests.cluster.processes import ClusterError

MADE = "made"  # the note of folders outside


def base_folder() -> Path:
    """Where clusters lie. Short: the path of a Unix socket has 107 characters at most."""
    if os.geteuid() == 0:
        return Path("/var/lib/arriero-test")
    return Path(tempfile.gettempdir()) / f"arriero-test-{os.geteuid()}"


class Slot:
    """A held lock. The kernel lets go of it when its process ends, however it ends."""

    def __init__(self, number: int, file: TextIOWrapper) -> None:
        self.number = number
        self._file = file

    def release(self) -> None:
        """Let go, and remove what the lock was made of; the last one also removes the folders made outside."""
        path = Path(self._file.name)
        if used() == [self.number]:
            remove_made_folders()
        path.unlink(missing_ok=True)
        self._file.close()
        try:
            path.parent.rmdir()
        except OSError:  # another cluster lies there
            pass


def acquire(number: int, *, wait: bool = False) -> Slot | None:
    """Hold slot `number`; None if another process does. With `wait`, not before that one lets go."""
    path = Layout(number, 0, base_folder()).lock
    while True:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            file = path.open("w")
        except FileNotFoundError:  # the folder was removed meanwhile
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            return None
        # Whoever held it may have removed the file: then it is nobody's lock any more.
        try:
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return Slot(number, file)
        except FileNotFoundError:
            pass
        file.close()


def acquire_any() -> Slot:
    """Hold the first free slot. Raises ClusterError when all are taken."""
    for number in range(SLOTS):
        if slot := acquire(number):
            return slot
    raise ClusterError(f"all {SLOTS} slots for clusters are taken on this machine")


def used() -> list[int]:
    """The slots that have a lock file or a folder, held or left behind."""
    layouts = [Layout(number, 0, base_folder()) for number in range(SLOTS)]
    return [layout.slot for layout in layouts if layout.lock.exists() or layout.home.exists()]


def make_folders(places: Sequence[str]) -> None:
    """Make folders outside the clusters' own, where the machine lacks them. What is made is noted first."""
    absent = sorted({path for place in places for path in (Path(place), *Path(place).parents) if not path.exists()})
    with (base_folder() / MADE).open("a") as note:
        note.writelines(f"{folder}\n" for folder in absent)
    for folder in absent:
        folder.mkdir(exist_ok=True)


def remove_made_folders() -> None:
    """Remove the noted folders that are empty. Not while another cluster runs: it has mounts on them, in its nodes'
    namespaces, and the kernel lets go of those.
    """
    note = base_folder() / MADE
    for line in reversed(note.read_text().splitlines() if note.exists() else []):
        try:
            Path(line).rmdir()
        except OSError:
            continue
    note.unlink(missing_ok=True)


def is_held(number: int) -> bool:
    """Whether some process holds the slot."""
    if slot := acquire(number):
        slot.release()
        return False
    return True
