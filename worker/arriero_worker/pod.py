"""The supervisor of one pod: starts a process per local rank (and the faces on the leader's pod), watches over them,
answers the control port.

Ranks come from a fork server that has imported torch once, so a lost rank is back at loading its weights within
milliseconds. The supervisor itself knows neither torch nor the model.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from types import FrameType

from arriero_faces.process import EXIT_UNUSABLE
from arriero_plan.launch import Launch
from arriero_worker.group.control import Control
from arriero_worker.group.memory import PodMemory
from arriero_worker.rank_entry import engine_socket, run_rank

log = logging.getLogger("arriero.pod")

_SILENT = 5.0  # seconds without a heartbeat before a rank's process is killed
_STEADY = 30.0  # a process that lived so long, or served, starts again at once, others with back-off
_LONGEST_BACKOFF = 30.0
_GLANCE = 0.5  # seconds between looks at heartbeats


class _Asked(Exception):
    """To leave, while a process is being started."""


class _Child:
    """A process that is started again whenever it ends."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pid = 0
        self._started = 0.0
        self._failures = 0
        self._start_at = 0.0

    def due(self, now: float) -> bool:
        return not self.pid and now >= self._start_at

    def begin(self) -> None:
        """Start, or put it off: the fork server may be gone, or the host out of processes or memory."""
        try:
            self.pid = self.start()
        except (OSError, EOFError) as error:
            log.error("%s could not be started: %r", self.name, error)
            self._put_off(time.monotonic())
        self._started = time.monotonic()

    def _put_off(self, now: float) -> None:
        self._failures += 1
        self._start_at = now + min(_LONGEST_BACKOFF, 0.5 * 2 ** (self._failures - 2) if self._failures > 1 else 0)

    def reap(self, now: float) -> int | None:
        """The exit code of a process that ended since the last look (negative: killed by that signal)."""
        if not self.pid or (code := self.exit_code()) is None:
            return None
        self.pid = 0
        if now - self._started > _STEADY:
            self._failures = 0
        self._put_off(now)
        return code

    def signal(self, signum: signal.Signals) -> None:
        if self.pid:
            try:
                os.kill(self.pid, signum)
            except ProcessLookupError:
                pass

    def forgive(self) -> None:
        """It did its work: when it ends, it starts again at once."""
        self._failures = 0

    @property
    def seconds_up(self) -> float:
        return time.monotonic() - self._started

    def start(self) -> int:
        raise AssertionError("a child knows how to start")

    def exit_code(self) -> int | None:
        raise AssertionError("a child knows how to end")

    def sentinel(self) -> int:
        raise AssertionError("a child can be waited for")


class _Front(_Child):
    def __init__(self, launch: Launch, launch_path: str) -> None:
        super().__init__("front")
        self._command = [
            sys.executable,
            "-m",
            "arriero_worker.front",
            "--launch",
            launch_path,
            "--engine",
            engine_socket(launch),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1

    def start(self) -> int:
        # A session of its own: a terminal's Ctrl-C is for the supervisor, which drains. The front ties itself to its
        # parent's life: nothing may run between fork and exec of a process with gRPC's threads.
        command = [*self._command, "--parent", str(os.getpid())]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        self._pidfd = os.pidfd_open(self._process.pid)
        return self._process.pid

    def exit_code(self) -> int | None:
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            os.close(self._pidfd)
        return code

    def sentinel(self) -> int:
        return self._pidfd


class _Rank(_Child):
    def __init__(self, launch_path: str, rank: int, memory_path: str) -> None:
        super().__init__(f"rank {rank}")
        self.rank = rank
        self._arguments = (launch_path, rank, memory_path)
        self._context = multiprocessing.get_context("forkserver")
        self._process: ForkServerProcess | None = None

    def start(self) -> int:
        self._process = self._context.Process(target=run_rank, args=self._arguments, name=self.name)
        self._process.start()
        assert self._process.pid is not None
        return self._process.pid

    def exit_code(self) -> int | None:
        assert self._process is not None
        code = self._process.exitcode
        if code is not None:
            self._process.close()
        return code

    def sentinel(self) -> int:
        assert self._process is not None
        return self._process.sentinel


class Pod:
    """One pod of a group, until it is told to stop or cannot go on."""

    def __init__(self, launch: Launch, launch_path: str, index: int) -> None:
        self._launch, self._index = launch, index
        self._leads = 0 in launch.pods[index].ranks
        self._local = launch.pods[index].ranks
        self._memory_fd = PodMemory.create(f"arriero-{launch.group}-{index}")
        memory_path = PodMemory.path_of(self._memory_fd)
        self._memory = PodMemory(memory_path, len(self._local))
        self._control = Control(launch, index, self._memory)
        self._ranks = [_Rank(launch_path, rank, memory_path) for rank in self._local]
        self._front = _Front(launch, launch_path) if self._leads else None
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._signals = 0
        self._cold = False
        """The first rank is being started, which waits for the fork server to be ready: half a minute, it may be."""
        self._forks = False
        """The fork server has started a rank."""
        self._gone: set[str] = set()

    def run(self) -> int:
        """Serve until told to stop.

        Returns the exit code: 0 after a drain, EXIT_UNUSABLE when a rank says that it can never run, 1 after a
        second signal. Raises OSError when the control port is taken.
        """
        os.environ["ARRIERO_SUPERVISOR"] = str(os.getpid())
        code = "arriero_worker.fork_cuda" if self._launch.backend == "cuda" else "arriero_worker.fork_server"
        multiprocessing.get_context("forkserver").set_forkserver_preload(["arriero_worker.tied", code])
        self._control.start()
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._on_signal)
        try:
            return self._watch()
        finally:
            self._control.stop()
            for child in self._children:
                child.signal(signal.SIGKILL)
            os.close(self._memory_fd)

    @property
    def _children(self) -> list[_Child]:
        return [*self._ranks, *([self._front] if self._front else [])]

    @property
    def _leaving(self) -> Sequence[_Child]:
        """Who is asked to leave, and waited for."""
        return [self._front] if self._front else self._ranks

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._signals += 1
        os.write(self._wake_write, b"s")
        if self._cold and self._signals == 1:
            raise _Asked

    def _watch(self) -> int:
        draining_since: float | None = None
        while True:
            now = time.monotonic()
            if self._signals > 1:
                log.warning("second signal: stopping now")
                return 1
            if self._signals and draining_since is None:
                draining_since = now
                self._drain()
            for child in self._children:
                code = child.reap(now)
                if code == EXIT_UNUSABLE:
                    return EXIT_UNUSABLE
                if code is not None:
                    self._ended(child, code)
            if draining_since is not None and self._drained(now - draining_since):
                return 0
            for child in self._children:
                # Once it is to leave, only a rank is started that is lost under requests which are to be finished.
                if child.due(now) and (not self._signals or (self._forks and child not in self._leaving)):
                    self._begin(child)
            self._look_at_ranks()
            sentinels = [child.sentinel() for child in self._children if child.pid]
            wait([*sentinels, self._wake_read], timeout=_GLANCE)
            try:
                os.read(self._wake_read, 64)
            except BlockingIOError:
                pass

    def _begin(self, child: _Child) -> None:
        try:
            self._cold = isinstance(child, _Rank) and not self._forks
            child.begin()
            self._cold = False
        except _Asked:  # there is nothing yet to drain, and what was begun ends with this process
            self._cold = False
        self._forks = self._forks or (isinstance(child, _Rank) and bool(child.pid))

    def _ended(self, child: _Child, code: int) -> None:
        if self._signals and child in self._leaving:
            # Whatever it ended by: one that was only just starting did not know yet how to drain.
            self._gone.add(child.name)
            if code in (0, -signal.SIGTERM):
                return
        log.warning("%s ended by %s", child.name, signal.Signals(-code).name if code < 0 else f"exit code {code}")
        if isinstance(child, _Rank):
            self._memory.clear_rank(self._local.index(child.rank))
            self._control.lost(child.rank, f"the process of rank {child.rank} ended")

    def _drain(self) -> None:
        """On the leader's pod the faces finish what runs; elsewhere the ranks ask the leader for leave."""
        log.info("draining, for at most %g s", self._launch.drain_seconds)
        for child in self._leaving:
            child.signal(signal.SIGTERM)
            if not child.pid:
                self._gone.add(child.name)

    def _drained(self, seconds: float) -> bool:
        if all(child.name in self._gone for child in self._leaving):
            log.info("drained in %.1f s", seconds)
            return True
        if seconds > self._launch.drain_seconds + 5:
            log.warning("still not drained after %.1f s: stopping", seconds)
            return True
        return False

    def _look_at_ranks(self) -> None:
        """A process that lives but does not speak (stopped, stuck in the kernel) is lost as well: make room for a
        new one.
        """
        for index, rank in enumerate(self._ranks):
            status, silence, _ = self._memory.read_rank(index, rank.rank, self._index)
            if status.phase == "Serving":
                rank.forgive()
            if rank.pid and min(silence, rank.seconds_up) > _SILENT:
                log.warning("rank %d was silent for %.1f s: killing process %d", rank.rank, silence, rank.pid)
                rank.signal(signal.SIGKILL)
