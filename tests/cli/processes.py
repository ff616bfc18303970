"""Looking at processes that `arriero up` started."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 30.0


def pids(run: Path) -> list[int]:
    """Of the pods of all replicas."""
    return [int(pid) for file in sorted(run.glob("replica-*/pids-*")) for pid in file.read_text().split()]


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def first_event(answer: str) -> list[str]:
    """What the stub pod says of the request: path, model, question, its group."""
    event: list[str] = json.loads(answer.split("\n")[0].removeprefix("data: "))
    return event


def children(pid: int) -> dict[int, str]:
    """Commands of a process's children."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child): Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode() for child in found}


def child(pid: int, words: str) -> int:
    """The one child of a process whose command has these words."""
    (found,) = [child for child, command in children(pid).items() if words in command]
    return found


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
