"""Several router processes on the same ports, kept alive."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from arriero_faces.process import die_with_parent
from arriero_router.observe.siblings import socket_of

log = logging.getLogger("arriero.router")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_PAUSE = 1.0
"""Seconds before a process is started again that ended before it served."""
_USELESS = 2
"""Exit status of a process that starting again would not help."""


def run_processes(config: str, count: int, log_level: str) -> int:
    """Start `count` processes, hand signals on to them, start again what dies; returns the exit status: 0 when all
    drained. Each decides alone; the kernel deals connections out among them (SO_REUSEPORT).
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    with tempfile.TemporaryDirectory(prefix="arriero-router-") as folder:
        return _Processes(config, count, log_level, Path(folder)).run()


class _Processes:
    def __init__(self, config: str, count: int, log_level: str, folder: Path) -> None:
        self._config, self._count, self._log_level, self._folder = config, count, log_level, folder
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._proven: set[int] = set()
        """Those that have served once, which shows that starting them again makes sense."""
        self._due: dict[int, float] = dict.fromkeys(range(count), 0.0)
        """When those that are not running are to be started."""

    def run(self) -> int:
        status = 0
        leaving = False
        while True:
            now = time.monotonic()
            for index, due in list(self._due.items()):
                if not leaving and due <= now:
                    self._start(index)
            if leaving and not self._running:
                return status
            received = signal.sigtimedwait(_SIGNALS, 0.5 if self._due and not leaving else 3600.0)
            if received is None:
                continue
            number = received.si_signo
            if number != signal.SIGCHLD:
                leaving = leaving or number != signal.SIGHUP
                for process in self._running.values():
                    process.send_signal(number)
            for index, process in list(self._running.items()):
                code = process.poll()
                if code is None:
                    continue
                del self._running[index]
                served = socket_of(self._folder, index).exists()
                if served:
                    self._proven.add(index)
                if leaving:
                    # One that was only just being started did not know yet how to drain.
                    status = status or (abs(code) if code != -signal.SIGTERM else 0)
                elif code == _USELESS or (code > 0 and index not in self._proven):
                    log.error("process %d ended with status %d soon after its start: giving up", index, code)
                    leaving, status = True, code if code > 0 else 1
                    for other in self._running.values():
                        other.terminate()
                else:
                    log.error("process %d ended with status %d and is started again", index, code)
                    self._due[index] = time.monotonic() + (0.0 if served else _PAUSE)

    def _start(self, index: int) -> None:
        del self._due[index]
        socket_of(self._folder, index).unlink(missing_ok=True)  # it makes one once all its ports are open
        command = [sys.executable, "-m", "arriero_router", "--config", self._config, "--log-level", self._log_level]
        command += ["--process", f"{index}/{self._count}", "--siblings", str(self._folder)]
        parent = os.getpid()

        def prepare() -> None:
            die_with_parent(parent)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

        self._running[index] = subprocess.Popen(command, preexec_fn=prepare)
