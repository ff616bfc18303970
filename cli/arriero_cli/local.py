"""The pods of one group as processes of this machine, started again when they end, as a kubelet would.

Everything below a pod's process dies with it: what a pod leaves behind becomes a child of this process (it is their
subreaper, prctl(2)) and is killed.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from arriero_plan.launch import Launch

PodCommand = Callable[[Path, int], Sequence[str]]
"""The command of a pod, from the launch file's path and the pod's index; its first word is an absolute path."""

FINAL_CODES = (2, 3)
"""Exit codes of a pod that another start would not help: its launch file, or the model, cannot be used."""

_PR_SET_CHILD_SUBREAPER = 36
_TETHER = Path(__file__).with_name("tether.py")
_ERROR_RECORD = re.compile(r"\S+ E \S+ (.*)")  # the workers' log lines: time, level, name, message
_STEADY = 60.0  # a pod that lived so long starts again at once
_LONGEST_BACKOFF = 30.0
_TAIL = 20


class PodEvents(Protocol):
    """Who is told what happens to the pods."""

    def pod_started(self, pod: int, pid: int) -> None: ...

    def pod_ended(self, pod: int, how: str, again_in: float) -> None: ...

    def pod_said(self, pod: int, line: str) -> None: ...


class PodUnusable(Exception):
    """A pod ended with a code that says: never start me like this again."""

    def __init__(self, pod: int, code: int, last_words: str) -> None:
        super().__init__(f"pod {pod} ended with exit code {code}")
        self.pod, self.code, self.last_words = pod, code, last_words


def worker_command(launch_path: Path, pod: int) -> Sequence[str]:
    """How a pod of this project is started, here and in a cluster."""
    return [sys.executable, "-m", "arriero_worker", "--launch", str(launch_path), "--pod-index", str(pod)]


class LocalGroup:
    """Keeps the pods of one launch alive until they are told to leave."""

    def __init__(
        self, launch: Launch, launch_path: Path, environment: Mapping[str, str], command: PodCommand, events: PodEvents
    ) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._strangers = frozenset(_children())
        self._pods = [
            _LocalPod(
                index, command(launch_path, index), environment, launch_path.with_name(f"pod-{index}.log"), events
            )
            for index in range(len(launch.pods))
        ]

    async def keep(self) -> None:
        """Run until every pod has been told to leave and is gone. Raises PodUnusable, and OSError."""
        tasks = [asyncio.create_task(pod.keep(self._bury_orphans)) for pod in self._pods]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def leave(self) -> None:
        """Ask every pod to drain and exit, the leader's first; none is started again."""
        for pod in self._pods:
            pod.leave()

    def kill(self) -> None:
        """End everything now."""
        for pod in self._pods:
            pod.kill()
        self._bury_orphans()

    @property
    def alive(self) -> list[int]:
        """Indexes of the pods that run."""
        return [index for index, pod in enumerate(self._pods) if pod.pid]

    def _bury_orphans(self) -> None:
        """Kill and reap what ended pods left: children of this process that are no pod and were not there before."""
        pods = self._strangers | {pod.pid for pod in self._pods}
        # Killing one orphan makes its own children orphans.
        for _ in range(8):
            orphans = [pid for pid in _children() if pid not in pods]
            if not orphans:
                return
            for pid in orphans:
                os.kill(pid, signal.SIGKILL)  # a child that is not yet reaped keeps its number
            for pid in orphans:
                os.waitpid(pid, 0)


class _LocalPod:
    def __init__(
        self, index: int, command: Sequence[str], environment: Mapping[str, str], log: Path, events: PodEvents
    ) -> None:
        self._index, self._command, self._environment, self._log = index, command, environment, log
        self._events = events
        self._process: subprocess.Popen[bytes] | None = None
        self._leaving = asyncio.Event()

    @property
    def pid(self) -> int:
        """0: not running."""
        return self._process.pid if self._process is not None else 0

    async def keep(self, bury_orphans: Callable[[], None]) -> None:
        failures = 0
        with self._log.open("ab") as log:
            while not self._leaving.is_set():
                began = time.monotonic()
                words = _Words(self._index, log, self._events)
                try:
                    code = await self._run(words)
                finally:
                    bury_orphans()
                words.close()
                if self._leaving.is_set():
                    return
                if code in FINAL_CODES:
                    raise PodUnusable(self._index, code, words.last)
                failures = 0 if time.monotonic() - began > _STEADY else failures + 1
                delay = min(_LONGEST_BACKOFF, 0.5 * 2 ** (failures - 2)) if failures > 1 else 0.0
                self._events.pod_ended(self._index, describe_exit(code), delay)
                try:
                    await asyncio.wait_for(self._leaving.wait(), delay)
                except TimeoutError:
                    pass

    def leave(self) -> None:
        self._leaving.set()
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self._leaving.set()
        if self._process is not None:
            self._process.kill()

    def _start(self) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        """The process, and the pipe that it and its own processes write to."""
        read_fd, write_fd = os.pipe()
        output = os.fdopen(read_fd, "rb", buffering=0)
        try:
            # A session of its own: a terminal's Ctrl-C is for us, who drain. Started from the main thread, whose end
            # is what the tether waits for.
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_TETHER), str(os.getpid()), *self._command],
                env=dict(self._environment),
                stdin=subprocess.DEVNULL,
                stdout=write_fd,
                stderr=write_fd,
                start_new_session=True,
            )
        except OSError:
            output.close()
            raise
        finally:
            os.close(write_fd)
        return process, output

    async def _run(self, words: _Words) -> int:
        """One life of the process; returns its exit code, negative for a signal."""
        loop = asyncio.get_running_loop()
        process, output = self._start()
        self._process, pid_fd = process, os.pidfd_open(process.pid)
        self._events.pod_started(self._index, process.pid)
        transport, _ = await loop.connect_read_pipe(lambda: words, output)
        ended = asyncio.Event()
        loop.add_reader(pid_fd, ended.set)
        try:
            await ended.wait()
            return process.wait()
        finally:
            loop.remove_reader(pid_fd)
            os.close(pid_fd)
            if process.poll() is None:
                process.kill()
                process.wait()
            self._process = None
            words.drain_into(transport)


class _Words(asyncio.Protocol):
    """What a pod and its processes write: kept in its log, told line by line."""

    def __init__(self, pod: int, log: IO[bytes], events: PodEvents) -> None:
        self._pod, self._log, self._events = pod, log, events
        self._rest = b""
        self._tail: list[str] = []

    def data_received(self, data: bytes) -> None:
        self._log.write(data)
        self._log.flush()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._tell(line)
        if len(self._rest) > 65536:
            self._tell(self._rest)
            self._rest = b""

    def drain_into(self, transport: asyncio.ReadTransport) -> None:
        """Read what is left in the pipe, then close it. (Orphans may hold its other end for a moment more.)"""
        pipe: IO[bytes] = transport.get_extra_info("pipe")
        try:
            while data := pipe.read(65536):
                self.data_received(data)
        except (BlockingIOError, ValueError):
            pass
        transport.close()

    def close(self) -> None:
        if self._rest:
            self._tell(self._rest)
            self._rest = b""

    @property
    def last(self) -> str:
        """The last error record's message, or else the last line that says something."""
        errors = (found[1] for line in reversed(self._tail) if (found := _ERROR_RECORD.match(line)))
        return next(errors, next((line for line in reversed(self._tail) if line.strip()), ""))

    def _tell(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip()
        self._tail = [*self._tail[1 - _TAIL :], text]
        self._events.pod_said(self._pod, text)


def describe_exit(code: int) -> str:
    """An exit code as people say it."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _children() -> list[int]:
    """Process ids of this process's children."""
    return [
        int(pid)
        for children in Path("/proc/self/task").glob("*/children")
        for pid in children.read_text(encoding="ascii").split()
    ]
