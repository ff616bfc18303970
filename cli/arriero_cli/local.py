"""The processes of one `arriero up`: how each is started, and that nothing of them stays behind.

Everything below a kept process dies with it: what it leaves behind becomes a child of this process (it is their
subreaper, prctl(2)) and is killed.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from arriero_cli.errors import CommandError
from arriero_cli.process import KeptProcess, ProcessEvents, Program

_PR_SET_CHILD_SUBREAPER = 36
_PASSED_ON = ("PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD")
_PASSED_ON_PREFIXES = ("LC_", "ARRIERO_", "CUDA_", "NCCL_", "GLOO_")
NEEDED = {
    "worker": ("arriero_worker", "torch", "numba", "safetensors", "tokenizers", "jinja2"),
    "router": ("arriero_router", "httptools", "uvloop", "xxhash", "prometheus_client", "grpc_health"),
}
"""Modules that the processes of a deployment import, by the extra that brings them."""


def worker_command(launch_path: Path, pod: int) -> Sequence[str]:
    """How a pod of this project is started, here and in a cluster."""
    return [sys.executable, "-m", "arriero_worker", "--launch", str(launch_path), "--pod-index", str(pod)]


def router_command(config: Path) -> Sequence[str]:
    """How the router is started, here and in a cluster."""
    return [sys.executable, "-m", "arriero_router", "--config", str(config)]


@dataclass(frozen=True, slots=True)
class Commands:
    """The programs of a deployment; each command's first word is an absolute path."""

    pod: Callable[[Path, int], Sequence[str]] = worker_command
    """From the launch file's path and the pod's index."""
    router: Callable[[Path], Sequence[str]] = router_command
    """From the configuration's path."""


def check_installed(needed: Mapping[str, Sequence[str]] = NEEDED) -> None:
    """Refuse to start what would end with a traceback. Raises CommandError."""
    for extra, modules in needed.items():
        if missing := next((module for module in modules if find_spec(module) is None), None):
            raise CommandError(
                f"arriero up needs the extra {extra} ({missing} is not installed): pip install 'arriero[worker,router]'"
            )


def process_environment(own: Mapping[str, str], threads: int = 1) -> dict[str, str]:
    """The whole environment of a process: what it needs of `own`, and the CPU threads it may use."""
    passed = {name: value for name, value in own.items() if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)}
    cache = Path(own.get("XDG_CACHE_HOME") or Path(own.get("HOME") or "/") / ".cache") / "arriero"
    return passed | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "NUMBA_NUM_THREADS": str(threads),
        "NUMBA_CACHE_DIR": str(cache / "numba"),
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


class Keeper:
    """Keeps processes alive until they are told to leave."""

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._strangers = frozenset(_children())
        self._processes: list[KeptProcess] = []

    def add(self, program: Program, events: ProcessEvents) -> KeptProcess:
        """A process of ours, not yet started."""
        process = KeptProcess(program, events)
        self._processes.append(process)
        return process

    async def keep(self, processes: Sequence[KeptProcess]) -> None:
        """Run these until each has been told to leave and is gone. Raises Unusable, OSError."""
        tasks = [asyncio.create_task(process.keep(self._bury_orphans)) for process in processes]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def leave(self, processes: Sequence[KeptProcess]) -> None:
        """Ask these, in this order, to drain and exit; returns when all are gone. None is started again."""
        for process in processes:
            process.leave()
        for process in processes:
            await process.gone()

    def kill(self) -> None:
        """End everything now."""
        for process in self._processes:
            process.kill()
        self._bury_orphans()

    def _bury_orphans(self) -> None:
        """Kill and reap what ended processes left: children of this process that are no process of ours and were not
        there before.
        """
        ours = self._strangers | {process.pid for process in self._processes}
        # Killing one orphan makes its own children orphans.
        for _ in range(8):
            orphans = [pid for pid in _children() if pid not in ours]
            if not orphans:
                return
            for pid in orphans:
                os.kill(pid, signal.SIGKILL)  # a child that is not yet reaped keeps its number
            for pid in orphans:
                os.waitpid(pid, 0)


def _children() -> list[int]:
    """Process ids of this process's children."""
    return [
        int(pid)
        for children in Path("/proc/self/task").glob("*/children")
        for pid in children.read_text(encoding="ascii").split()
    ]
