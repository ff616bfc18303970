"""Fetches files over several connections at once: ranges into parts, parts verified into files."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from arriero_worker.download.extents import segments
from arriero_worker.download.progress import Progress, in_bytes
from arriero_worker.download.source import (
    DownloadError,
    RemoteFile,
    Source,
    StoppedError,
    TransientError,
    digest_of,
)
from arriero_worker.download.state import Part, State

_SHORTEST, _LONGEST = 16 * 2**20, 512 * 2**20  # bytes asked for in one request
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
_LAST_WORDS = 2.0  # seconds that threads get to stop

T = TypeVar("T")


@dataclass(slots=True)
class _Work:
    """One file that is not there yet."""

    file: RemoteFile
    target: Path
    part: Part
    adopt: bool
    """A file of its size stands under its name: perhaps it is the one."""
    wrong: int = 0
    """How often its bytes were not those that the source promised."""


@dataclass(frozen=True, slots=True)
class _Job:
    work: _Work
    start: int
    stop: int


@dataclass(slots=True)
class _Streak:
    """Failures of one request without a byte between them."""

    since: float = field(default_factory=time.monotonic)
    failures: int = 0


class Fetcher:
    """Brings files of one source into one directory.

    connections: how many requests run at once. patience: seconds without a single byte after which errors that pass
    count as final. say: takes a line for people.
    """

    def __init__(
        self,
        source: Source,
        state: State,
        progress: Progress,
        stopped: threading.Event,
        *,
        connections: int,
        patience: float,
        say: Callable[[str], None],
    ) -> None:
        self._source, self._state, self._progress, self._stopped = source, state, progress, stopped
        self._connections, self._patience, self._say = connections, patience, say
        self._jobs: deque[_Job] = deque()
        self._unfinished = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._longest = _LONGEST

    def patiently(self, action: Callable[[], T], what: str) -> T:
        """`action`, again and again with growing pauses while it fails in a way that passes. Raises DownloadError when
        patience ends.
        """
        streak = _Streak()
        while True:
            try:
                return action()
            except TransientError as error:
                self._pause(error, streak, what)

    def fetch(self, files: Sequence[RemoteFile]) -> None:
        """Small files that tell what else is needed."""
        self._run([work for file in files if (work := self._work(file)) is not None])

    def fetch_all(self, files: Sequence[RemoteFile], free: Callable[[], int]) -> None:
        """Everything, with its progress told. free: bytes that the disk has. Raises DownloadError before the first byte
        where that is too little.
        """
        works = [work for file in files if (work := self._work(file)) is not None]
        total = sum(file.size for file in files)
        missing = sum(work.file.size for work in works)
        present = sum(work.part.present.covered for work in works if not work.adopt)
        self._progress.begin(total, total - missing + present, len(files), len(files) - len(works))
        needs = sum(max(0, work.file.size - work.part.allocated) for work in works if not work.adopt)
        if works and needs > (has := free()):
            raise DownloadError(
                f"{self._source.uri}: {in_bytes(needs)} are still to come, and the volume has {in_bytes(has)} free"
            )
        self._longest = min(_LONGEST, max(_SHORTEST, (missing - present) // (4 * self._connections)))
        self._run(works)

    def _work(self, file: RemoteFile) -> _Work | None:
        if self._state.verified(file):
            return None
        target = self._state.target(file)
        adopt = file.verifiable and target.is_file() and target.stat().st_size == file.size
        return _Work(file, target, self._state.part(file), adopt)

    def _run(self, works: Sequence[_Work]) -> None:
        for work in works:
            self._put(work)
        threads = [threading.Thread(target=self._thread, daemon=True) for _ in range(self._connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not self._stopped.is_set() and self._error is None:
                thread.join(0.1)
        if self._stopped.is_set() or self._error is not None:
            with self._changed:
                self._changed.notify_all()
            for thread in threads:
                thread.join(_LAST_WORDS / len(threads))
        for work in works:
            if not any(thread.is_alive() for thread in threads):
                work.part.close()
        if self._error is not None:
            raise self._error
        self._check()

    def _put(self, work: _Work) -> None:
        gaps = [] if work.adopt else work.part.present.missing(work.file.size)
        jobs = [_Job(work, start, stop) for start, stop in segments(gaps, self._longest)] or [_Job(work, 0, 0)]
        with self._changed:
            self._jobs.extend(jobs)
            self._unfinished += len(jobs)
            self._changed.notify_all()

    def _thread(self) -> None:
        try:
            while (job := self._next()) is not None:
                if job.work.adopt:
                    self._adopt(job.work)
                elif job.stop == 0 or self._range(job):
                    self._finish(job.work)
                with self._changed:
                    self._unfinished -= 1
                    self._changed.notify_all()
        except OSError as error:
            self._fail(DownloadError(self._disk_words(error)))
        except BaseException as error:
            self._fail(error)

    def _next(self) -> _Job | None:
        with self._changed:
            while not self._jobs and self._unfinished and self._error is None and not self._stopped.is_set():
                self._changed.wait(0.5)
            over = self._error is not None or self._stopped.is_set() or not self._jobs
            return None if over else self._jobs.popleft()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._error is None and not (isinstance(error, StoppedError) and self._stopped.is_set()):
                self._error = error
            self._changed.notify_all()

    def _halted(self) -> bool:
        return self._stopped.is_set() or self._error is not None

    def _check(self) -> None:
        if self._halted():
            raise StoppedError("told to stop: what was fetched is kept")

    def _range(self, job: _Job) -> bool:
        """Fetch it, however often that breaks off. Whether it made the file whole."""
        work, at, streak = job.work, job.start, _Streak()
        work.part.open()
        whole = False
        while at < job.stop:
            begun = at
            try:
                for data in self._source.read(work.file, at, job.stop):
                    kept = data[: job.stop - at]
                    work.part.write(at, kept)
                    whole = work.part.record(at, at + len(kept))
                    at += len(kept)
                    self._progress.add(len(kept))
                    self._check()
                if at < job.stop:
                    raise TransientError(f"the connection ended {job.stop - at} bytes early")
            except TransientError as error:
                if at > begun:
                    streak = _Streak()
                self._pause(error, streak, work.file.path)
        return whole

    def _pause(self, error: TransientError, streak: _Streak, what: str) -> None:
        """Before another attempt. Raises DownloadError where there shall be none: this request has failed for as long
        as patience lasts, and no other has brought a byte meanwhile.
        """
        streak.failures += 1
        left = self._patience - min(self._progress.silent_seconds, time.monotonic() - streak.since)
        if left <= 0:
            raise DownloadError(f"{what}: {error} (for {self._patience:g} s nothing arrived)") from error
        wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (streak.failures - 1)) * random.uniform(0.5, 1.0)
        wait = min(max(wait, error.retry_after), left)
        self._say(f"{what}: {error}; again in {wait:.1f} s")
        self._stopped.wait(wait)
        self._check()

    def _adopt(self, work: _Work) -> None:
        """A file that is there without a word about it: right, or to be fetched."""
        algorithm = work.file.digest.partition(":")[0]
        if digest_of(work.target, algorithm, self._halted) == work.file.digest:
            self._progress.found(work.file.size)
            self._done(work)
            return
        work.adopt = False
        self._put(work)

    def _finish(self, work: _Work) -> None:
        work.part.open()  # a file of no bytes was not written to, one that was whole after a restart neither
        algorithm, _, wanted = work.file.digest.partition(":")
        if work.file.verifiable:
            _, _, found = digest_of(work.part.path, algorithm, self._halted).partition(":")
            if found != wanted:
                self._wrong(work, f"its {algorithm} is {found[:16]}..., the source says {wanted[:16]}...")
                return
        work.part.settle(work.target)
        self._done(work)

    def _wrong(self, work: _Work, words: str) -> None:
        work.wrong += 1
        if work.wrong > 1:
            raise DownloadError(f"{self._source.uri}: {work.file.path} is corrupt, also when fetched again: {words}")
        self._say(f"{work.file.path} is corrupt: {words}; fetching it again")
        self._progress.take_back(work.file.size)
        work.part.clear()
        self._put(work)

    def _done(self, work: _Work) -> None:
        self._state.record_verified(work.file)
        self._progress.file_done()

    def _disk_words(self, error: OSError) -> str:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the volume is full: {self._progress.snapshot()}"
        return f"{error.filename or 'the volume'}: {os.strerror(error.errno) if error.errno else error}"
