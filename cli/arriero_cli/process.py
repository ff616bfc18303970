"""One process of this machine that is kept alive, as a kubelet would: started again when it ends, its words told."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

FINAL_CODES = (2, 3)
"""Exit codes of a process that another start would not help: its own file, or the model, cannot be used."""

_TETHER = Path(__file__).with_name("tether.py")
_ERROR_RECORD = re.compile(r"\S+ E \S+ (.*)")  # log lines of this project: time, level, name, message
_STEADY = 60.0  # a process that lived so long starts again at once
_LONGEST_BACKOFF = 30.0
_TAIL = 20


class ProcessEvents(Protocol):
    """Who is told what happens to a process."""

    def started(self, pid: int) -> None: ...

    def ended(self, how: str, again_in: float) -> None: ...

    def said(self, line: str) -> None: ...


class Unusable(Exception):
    """A process ended with a code that says: never start me like this again."""

    def __init__(self, name: str, code: int, last_words: str) -> None:
        super().__init__(f"{name} ended with exit code {code}")
        self.name, self.code, self.last_words = name, code, last_words


@dataclass(frozen=True, slots=True)
class Program:
    """What is run."""

    name: str
    """As sentences call it, such as "pod 1"."""
    command: Sequence[str]
    """Its first word is an absolute path."""
    environment: Mapping[str, str]
    log: Path
    """All that it and its own processes write is appended here."""


class KeptProcess:
    """One program and the process that runs it now."""

    def __init__(self, program: Program, events: ProcessEvents) -> None:
        self.name = program.name
        self._program, self._events = program, events
        self._process: subprocess.Popen[bytes] | None = None
        self._leaving, self._over = asyncio.Event(), asyncio.Event()
        self._over.set()

    @property
    def pid(self) -> int:
        """0: not running."""
        return self._process.pid if self._process is not None else 0

    async def keep(self, bury_orphans: Callable[[], None]) -> None:
        """Run until told to leave. `bury_orphans` is called after each end. Raises Unusable, OSError."""
        self._over.clear()
        try:
            with self._program.log.open("ab") as log:
                await self._keep(log, bury_orphans)
        finally:
            self._over.set()

    def leave(self) -> None:
        """Ask it to drain and exit; it is not started again."""
        self._leaving.set()
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it now."""
        self._leaving.set()
        if self._process is not None:
            self._process.kill()

    async def gone(self) -> None:
        """Returns when nobody keeps it any more."""
        await self._over.wait()

    async def _keep(self, log: IO[bytes], bury_orphans: Callable[[], None]) -> None:
        failures = 0
        while not self._leaving.is_set():
            began = time.monotonic()
            words = _Words(log, self._events)
            try:
                code = await self._run(words)
            finally:
                bury_orphans()
            words.close()
            if self._leaving.is_set():
                return
            if code in FINAL_CODES:
                raise Unusable(self.name, code, words.last)
            failures = 0 if time.monotonic() - began > _STEADY else failures + 1
            delay = min(_LONGEST_BACKOFF, 0.5 * 2 ** (failures - 2)) if failures > 1 else 0.0
            self._events.ended(describe_exit(code), delay)
            try:
                await asyncio.wait_for(self._leaving.wait(), delay)
            except TimeoutError:
                pass

    def _start(self) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        """The process, and the pipe that it and its own processes write to."""
        read_fd, write_fd = os.pipe()
        output = os.fdopen(read_fd, "rb", buffering=0)
        try:
            # A session of its own: a terminal's Ctrl-C is for us, who drain. Started from the main thread, whose end
            # is what the tether waits for.
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_TETHER), str(os.getpid()), *self._program.command],
                env=dict(self._program.environment),
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
        self._events.started(process.pid)
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
    """What a process and its own processes write: kept in its log, told line by line."""

    def __init__(self, log: IO[bytes], events: ProcessEvents) -> None:
        self._log, self._events = log, events
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
        self._events.said(text)


def describe_exit(code: int) -> str:
    """An exit code as people say it."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
