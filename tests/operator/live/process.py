"""Operators as processes: started, asked, killed, without anything of the test inside."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from tests.cluster.processes import guard, wait_until, without_proxies

ROOT = Path(__file__).resolve().parents[3]


class Zygote:
    """The process that operators are forked from."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [*guard(), sys.executable, str(Path(__file__).with_name("zygote.py"))],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=without_proxies(),
            start_new_session=True,
        )

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10.0)
        self._process.stdout.close()


class Operator:
    """One operator process, from its start to its end."""

    def __init__(
        self, zygote: Zygote, config: Path, log: Path, account: Path | None = None, **environment: str
    ) -> None:
        self._zygote = zygote
        self._status: int | None = None
        self._lock = threading.Lock()
        self.log = log
        self.port = _free_port()
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "ARRIERO_POD_NAME": "operator-0",
            "ARRIERO_POD_NAMESPACE": "arriero-system",
            "GRPC_ENABLE_FORK_SUPPORT": "false",
            **environment,
        }
        arguments = ["--config", str(config), "--host", "127.0.0.1", "--port", str(self.port)]
        answer = zygote.ask(start=arguments, env=environment, log=str(log), account=account and str(account))
        self.pid: int = answer["pid"]
        self.started = time.monotonic()

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None: it runs."""
        with self._lock:
            if self._status is None:
                self._status = self._zygote.ask(poll=self.pid)["status"]
            return self._status

    def kill(self) -> None:
        """SIGKILL, from any thread; returns once nothing more can come of it."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            wait_until(lambda: self.poll() is not None, "end of the operator", 10.0, interval=0.002)

    def terminate(self, timeout: float = 20.0) -> float:
        """SIGTERM; seconds until it has ended."""
        began = time.monotonic()
        os.kill(self.pid, signal.SIGTERM)
        wait_until(lambda: self.poll() is not None, "end of the operator", timeout, interval=0.005)
        return time.monotonic() - began

    def health(self, kind: str) -> tuple[int, str]:
        """Status and words of /health/live or /health/ready; 0: it does not answer."""
        try:
            answer = httpx.get(f"http://127.0.0.1:{self.port}/health/{kind}", timeout=3.0, trust_env=False)
        except httpx.TransportError as error:
            return 0, str(error)
        return answer.status_code, answer.text.strip()

    def metric(self, name: str, label: str = "") -> float:
        """The sum of a metric's series, or of those with `label="value"`; -1: it does not answer."""
        try:
            text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=3.0, trust_env=False).text
        except httpx.TransportError:
            return -1.0
        lines = [
            line for line in text.splitlines() if line.partition("{")[0].partition(" ")[0] == name and label in line
        ]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    @property
    def leads(self) -> bool:
        return self.metric("arriero_operator_leader") == 1.0

    def words(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
