"""The memory that the processes of one pod share: each rank's status, the abort word, the plan ring, the all-reduce
slots.

It is an anonymous memory file (memfd_create) of the pod's supervisor, so it goes with the last process that maps it:
nothing is left in /dev/shm, whatever kills the pod. Ranks open it through the supervisor's /proc entry. Pages are
touched on use only.

Fields of eight bytes are aligned and written whole, which x86-64 and aarch64 do atomically.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import time
from typing import NamedTuple, get_args

from arriero_worker.engine.messages import Phase, RankStatus

PHASES: tuple[Phase, ...] = get_args(Phase)
_REASON_BYTES = 400
_RANK_BYTES = 512
_ENGINE = struct.Struct("<7qd")
_RANK = struct.Struct("<q5qqd")  # phase, epoch, step, loaded, total, memory, heartbeat (monotonic ns), phase since

RING_BYTES = 8 << 20
SLOT_BYTES = 4 << 20


class EngineNumbers(NamedTuple):
    """What the leader's engine wrote last; zeros before that."""

    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_used: int
    recoveries: int
    run: int
    draining: int
    tokens_per_second: float


class PodMemory:
    """Layout: [abort word page | engine section | a section per local rank | plan ring | all-reduce slots]."""

    def __init__(self, path: str, local_ranks: int) -> None:
        """Map the memory at `path` (see `create` and `path_of`) for a pod of `local_ranks` ranks. Raises OSError."""
        self.local_ranks = local_ranks
        self._ranks_at = 4096
        self.ring_at = -(-(self._ranks_at + _RANK_BYTES * local_ranks) // 4096) * 4096
        self.slots_at = self.ring_at + 4096 + RING_BYTES
        self.size = self.slots_at + 4096 + 2 * local_ranks * SLOT_BYTES
        fd = os.open(path, os.O_RDWR)
        try:
            if os.fstat(fd).st_size < self.size:
                os.ftruncate(fd, self.size)
            self.map = mmap.mmap(fd, self.size)
        finally:
            os.close(fd)
        self._aborted = ctypes.c_uint64.from_buffer(self.map, 0)

    @staticmethod
    def create(name: str) -> int:
        """A new memory file; the caller keeps the descriptor open for as long as others may still open it."""
        return os.memfd_create(name, os.MFD_CLOEXEC)

    @staticmethod
    def path_of(fd: int) -> str:
        return f"/proc/{os.getpid()}/fd/{fd}"

    @property
    def aborted_epoch(self) -> int:
        """Epochs up to this one are over: whoever waits in one of them stops waiting."""
        return self._aborted.value

    def abort_epoch(self, epoch: int) -> None:
        if epoch > self._aborted.value:
            self._aborted.value = epoch

    def write_engine(
        self,
        *,
        running: int,
        waiting: int,
        kv_blocks: int,
        kv_blocks_used: int,
        recoveries: int,
        draining: bool,
        run: int = 0,
        tokens_per_second: float = 0.0,
    ) -> None:
        numbers = (running, waiting, kv_blocks, kv_blocks_used, recoveries, run, int(draining), tokens_per_second)
        _ENGINE.pack_into(self.map, 1024, *numbers)

    def read_engine(self) -> EngineNumbers:
        return EngineNumbers(*_ENGINE.unpack_from(self.map, 1024))

    def write_rank(self, index: int, status: RankStatus, since: float) -> None:
        """`index` counts the pod's ranks; `since` is the monotonic time of entry into the present phase."""
        at = self._ranks_at + index * _RANK_BYTES
        reason = status.reason.encode()[:_REASON_BYTES]
        numbers = (status.epoch, status.step, status.bytes_loaded, status.bytes_total, status.memory_bytes)
        _RANK.pack_into(self.map, at, PHASES.index(status.phase), *numbers, time.monotonic_ns(), since)
        self.map[at + _RANK.size : at + _RANK.size + 4 + len(reason)] = struct.pack("<I", len(reason)) + reason

    def read_rank(self, index: int, rank: int, pod: int) -> tuple[RankStatus, float, float]:
        """The rank's status, seconds since it last wrote it (infinite if never), and seconds in its phase."""
        at = self._ranks_at + index * _RANK_BYTES
        phase, epoch, step, loaded, total, memory, beat, since = _RANK.unpack_from(self.map, at)
        (length,) = struct.unpack_from("<I", self.map, at + _RANK.size)
        reason = self.map[at + _RANK.size + 4 : at + _RANK.size + 4 + min(length, _REASON_BYTES)].decode(
            errors="replace"
        )
        status = RankStatus(rank, pod, PHASES[phase], epoch, step, loaded, total, memory, reason)
        now = time.monotonic()
        return status, now - beat / 1e9 if beat else float("inf"), now - since if beat else 0.0

    def clear_rank(self, index: int) -> None:
        """Forget a rank's status: its process is gone."""
        at = self._ranks_at + index * _RANK_BYTES
        self.map[at : at + _RANK_BYTES] = bytes(_RANK_BYTES)
