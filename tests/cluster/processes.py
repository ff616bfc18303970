"""Long-running programs of a cluster: started so that they end with the process that started them, each with a log."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.cluster.layout import MARK


class ClusterError(Exception):
    """The cluster cannot do what was asked, in one sentence and the last lines of a log."""


def without_proxies() -> dict[str, str]:
    """This process's environment without the proxies: they are for the world outside, which clusters do not use."""
    return {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}


def guard() -> list[str]:
    """What ties a program to this process. The shell ends by itself where this process died before it was tied."""
    if platform.system() != "Linux" or shutil.which("setpriv") is None:
        return []
    return ["setpriv", "--pdeathsig", "KILL", "sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"', str(os.getpid())]


class Program:
    """One program of the cluster. `prefix` is what it is started through, say nsenter.

    The kernel kills it when its parent ends (PR_SET_PDEATHSIG, set by setpriv, so that nothing of ours runs between
    fork and exec in a process with threads). The parent is the thread that calls `start`: let it be one that stays.
    """

    def __init__(self, name: str, command: Sequence[str], home: Path, *, prefix: Sequence[str] = ()) -> None:
        self.name = name
        self.command = [*prefix, *command]
        self.log = home / "logs" / f"{name}.log"
        self.home = home
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert not self.is_running, f"{self.name} runs already"
        for folder in (self.log.parent, self.home / "tmp"):
            folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*guard(), *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.home,
                env={**without_proxies(), MARK: str(self.home), "TMPDIR": str(self.home / "tmp")},
                start_new_session=True,  # Ctrl-C is for the test, which then ends the cluster in order
            )

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        assert self.process is not None, f"{self.name} was never started"
        return self.process.pid

    def stop(self, timeout: float = 10.0) -> None:
        """Ask it to end; kill it after `timeout` seconds."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()

    def kill(self) -> None:
        """End it as a crash would."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()

    def last_lines(self, count: int = 15) -> str:
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])


def wait_until(
    condition: Callable[[], object],
    what: str,
    timeout: float = 60.0,
    programs: Sequence[Program] = (),
    interval: float = 0.1,
) -> None:
    """Wait until `condition` is true. Raises ClusterError after `timeout` seconds, or when one of `programs` ended."""
    deadline = time.monotonic() + timeout
    while not condition():
        for program in programs:
            if not program.is_running:
                raise ClusterError(f"{program.name} ended while waiting for {what}:\n{program.last_lines()}")
        if time.monotonic() > deadline:
            logs = "".join(f"\n{program.name}:\n{program.last_lines()}" for program in programs)
            raise ClusterError(f"no {what} within {timeout:.0f} s{logs}")
        time.sleep(interval)


def run(*command: str | Path, check: bool = True) -> str:
    """Run a command that ends by itself; what it printed. Raises ClusterError with what it said."""
    answer = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if check and answer.returncode != 0:
        said = (answer.stderr or answer.stdout).strip()
        raise ClusterError(f"{' '.join(map(str, command))}: {said}")
    return answer.stdout
