"""How far a download is: counted by its threads, read by whoever tells of it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

_WINDOW = 30.0  # seconds that the rate is taken over

Phase = Literal["Starting", "Downloading", "Failed"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A moment of a download."""

    phase: Phase
    bytes_done: int
    bytes_total: int
    files_done: int
    files_total: int
    bytes_per_second: float
    """Of late; 0 where unknown."""
    phase_seconds: float
    reason: str = ""

    @property
    def seconds_left(self) -> float | None:
        if not self.bytes_per_second:
            return None
        return (self.bytes_total - self.bytes_done) / self.bytes_per_second

    def __str__(self) -> str:
        """One line for people."""
        share = 100 * self.bytes_done // self.bytes_total if self.bytes_total else 0
        rate = f", {in_bytes(self.bytes_per_second)}/s" if self.bytes_per_second else ""
        left = self.seconds_left
        eta = f", {in_time(left)} left" if left is not None else ""
        return (
            f"{in_bytes(self.bytes_done)} of {in_bytes(self.bytes_total)} ({share}%){rate}{eta}, "
            f"{self.files_done} of {self.files_total} files"
        )


class Progress:
    """Safe to use from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._phase: Phase = "Starting"
        self._since = self._last_byte = clock()
        self._done = self._total = self._files_done = self._files_total = self._fetched = 0
        self._reason = ""
        self._samples: deque[tuple[float, int]] = deque()

    def begin(self, total: int, done: int, files: int, files_done: int) -> None:
        """What there is to do is known."""
        with self._lock:
            self._phase, self._since, self._last_byte = "Downloading", self._clock(), self._clock()
            self._total, self._done, self._files_total, self._files_done = total, done, files, files_done
            self._fetched = 0
            self._samples = deque([(self._since, 0)])

    def add(self, count: int) -> None:
        """Bytes arrived."""
        with self._lock:
            self._last_byte = self._clock()
            if self._phase != "Downloading":
                return  # small files that say what there is to do
            self._done += count
            self._fetched += count
            if self._last_byte - self._samples[-1][0] >= 1.0:
                self._samples.append((self._last_byte, self._fetched))

    def found(self, count: int) -> None:
        """Bytes were there already."""
        with self._lock:
            self._done += count

    def take_back(self, count: int) -> None:
        """Bytes turned out wrong."""
        with self._lock:
            self._done -= count if self._phase == "Downloading" else 0

    def file_done(self) -> None:
        with self._lock:
            self._files_done += 1

    def fail(self, reason: str) -> None:
        with self._lock:
            self._phase, self._reason = "Failed", reason

    @property
    def silent_seconds(self) -> float:
        """Since the last byte, or since there was something to do."""
        with self._lock:
            return self._clock() - self._last_byte

    def snapshot(self) -> Snapshot:
        with self._lock:
            now = self._clock()
            while len(self._samples) > 1 and now - self._samples[1][0] > _WINDOW:
                self._samples.popleft()
            rate = 0.0
            if self._samples:
                since, fetched = self._samples[0]
                rate = (self._fetched - fetched) / (now - since) if now > since else 0.0
            return Snapshot(
                self._phase,
                self._done,
                self._total,
                self._files_done,
                self._files_total,
                rate,
                now - self._since,
                self._reason,
            )


def in_bytes(count: float) -> str:
    """As "16.1 GiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def in_time(seconds: float) -> str:
    """As "45 s", "12 min" or "2.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
