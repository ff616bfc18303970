"""A router as a process of its own: ours, or any other program with a command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

PATIENCE = 60.0
_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? ([^ ]+)$")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')


class Backend(NamedTuple):
    """Where a replica is; a port of 0: that face is not there."""

    name: str
    http_port: int
    grpc_port: int = 0
    control_port: int = 0


def config(model: str, backends: Sequence[Backend], http_port: int, grpc_port: int = 0, **changes: Any) -> str:
    """The configuration file of our router (YAML takes JSON); `changes` are further fields."""
    static = [
        {
            "name": backend.name,
            "host": "127.0.0.1",
            "httpPort": backend.http_port,
            "grpcPort": backend.grpc_port,
            "controlPort": backend.control_port,
        }
        for backend in backends
    ]
    fields = {
        "listen": {"address": "127.0.0.1", "httpPort": http_port, "grpcPort": grpc_port},
        "models": [{"name": model, "endpoints": {"static": static}}],
        "accessLog": {"path": "off"},
        **changes,
    }
    return json.dumps(fields, indent=1)


class RouterProcess:
    """A context: on entry the router answers `probe` with 200; on exit its processes are gone.

    `command` gets a scratch directory and returns the command line.
    """

    def __init__(
        self,
        command: Callable[[Path], list[str]],
        http_port: int,
        grpc_port: int = 0,
        *,
        probe: Callable[[], bool] | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self.http_port, self.grpc_port = http_port, grpc_port
        self.url = f"http://127.0.0.1:{http_port}"
        self.directory = Path(tempfile.mkdtemp(prefix="arriero-router-"))
        self.log = self.directory / "log"
        self.command = command(self.directory)
        self.process: subprocess.Popen[bytes] | None = None
        self._probe = probe or self._ready
        self._patience = patience

    @classmethod
    def ours(cls, model: str, backends: Sequence[Backend], http_port: int, grpc_port: int = 0, **changes: Any) -> Any:
        def command(directory: Path) -> list[str]:
            path = directory / "router.yaml"
            path.write_text(config(model, backends, http_port, grpc_port, **changes))
            return [sys.executable, "-m", "arriero_router", "--config", str(path)]

        return cls(command, http_port, grpc_port)

    def __enter__(self) -> RouterProcess:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRPC_ENABLE_FORK_SUPPORT": "0"}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, start_new_session=True, env=environment, cwd=self.directory
            )
        limit = time.monotonic() + self._patience
        try:
            while not self._probe():
                code = self.process.poll()
                assert code is None, f"{self.command[:4]} ended with {code}:\n{self.last_words()}"
                assert time.monotonic() < limit, f"{self.command[:4]} is not ready:\n{self.last_words()}"
                time.sleep(0.05)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            kill_tree(self.process.pid)
            self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health/ready", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def tree(self) -> list[psutil.Process]:
        assert self.process is not None
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """Used so far by all its processes, in user and kernel."""
        total = 0.0
        for process in self.tree():
            times = process.cpu_times()
            total += times.user + times.system
        return total

    def resident_bytes(self) -> int:
        return sum(process.memory_info().rss for process in self.tree())

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics; those of a name that differ in labels are added up."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            samples = parse_metrics(response.read().decode())
        total: dict[str, float] = {}
        for name, _, value in samples:
            total[name] = total.get(name, 0.0) + value
        return total

    def terminate(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=PATIENCE)


def parse_metrics(text: str) -> list[tuple[str, dict[str, str], float]]:
    """Name, labels and value of each sample in Prometheus' text format."""
    found = []
    for line in text.splitlines():
        if match := _SAMPLE.match(line):
            found.append((match[1], dict(_LABEL.findall(match[2] or "")), float(match[3])))
    return found


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it started, as far as they still live."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_all(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL; returns when all of them have ended or are zombies."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
    limit = time.monotonic() + PATIENCE
    while any(_lives(process) for process in processes):
        assert time.monotonic() < limit, f"processes survive SIGKILL: {processes}"
        time.sleep(0.005)


def kill_tree(pid: int) -> None:
    """SIGKILL for a process and all that it started."""
    kill_all(family(pid))


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
