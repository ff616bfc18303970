"""A broadcast ring in shared memory: one writer, several readers, each reader gets every message once and in order.

It carries the step plans inside a pod. A reader sleeps on a futex word, so idle ranks cost nothing; the writer waits
while a reader is a whole ring behind. Messages larger than a quarter of the ring travel in fragments.

Layout: u64 written | u32 futex word | readers x (u64 cursor, u64 active) | data. Cursors count bytes since creation.
The data is stored before `written`, and x86-64 keeps stores in order for other cores.
"""

from __future__ import annotations

import ctypes
import struct
import time
from collections.abc import Callable

from arriero_worker.group import futex
from arriero_worker.group.memory import RING_BYTES, PodMemory

_FRAME = struct.Struct("<II")  # payload bytes, 1 if more fragments follow
_READERS_AT = 64
_DATA_AT = 4096
MAX_READERS = (_DATA_AT - _READERS_AT) // 16
_FRAGMENT = RING_BYTES // 4
_NAP = 0.05  # seconds between looks at `stopped` while asleep


class Ring:
    """The ring of one pod, as one process sees it."""

    def __init__(self, memory: PodMemory) -> None:
        self._map = memory.map
        self._base = memory.ring_at
        self._written = ctypes.c_uint64.from_buffer(self._map, self._base)
        self._word = ctypes.c_uint32.from_buffer(self._map, self._base + 8)

    def _reader(self, index: int) -> tuple[ctypes.c_uint64, ctypes.c_uint64]:
        at = self._base + _READERS_AT + 16 * index
        return ctypes.c_uint64.from_buffer(self._map, at), ctypes.c_uint64.from_buffer(self._map, at + 8)

    def writer(self, readers: int) -> RingWriter:
        return RingWriter(self, readers)

    def reader(self, index: int) -> RingReader:
        """Subscribe as reader `index` from the next message on. A former subscription under this index is replaced."""
        assert 0 <= index < MAX_READERS
        return RingReader(self, index)

    def _copy_in(self, position: int, data: bytes | memoryview) -> None:
        at = position % RING_BYTES
        first = min(len(data), RING_BYTES - at)
        start = self._base + _DATA_AT
        self._map[start + at : start + at + first] = bytes(data[:first])
        if first < len(data):
            self._map[start : start + len(data) - first] = bytes(data[first:])

    def _copy_out(self, position: int, length: int) -> bytes:
        at = position % RING_BYTES
        first = min(length, RING_BYTES - at)
        start = self._base + _DATA_AT
        data = self._map[start + at : start + at + first]
        return data if first == length else data + self._map[start : start + length - first]


class RingWriter:
    def __init__(self, ring: Ring, readers: int) -> None:
        self._ring = ring
        self._readers = [ring._reader(i) for i in range(readers)]

    def write(self, message: bytes, stopped: Callable[[], bool]) -> bool:
        """Hand a message to all active readers. False if `stopped()` turned true while a reader was a ring behind."""
        view = memoryview(message)
        at = 0
        while True:
            part = view[at : at + _FRAGMENT]
            at += len(part)
            if not self._write_frame(part, at < len(view), stopped):
                return False
            if at >= len(view):
                return True

    def _write_frame(self, part: memoryview, more: bool, stopped: Callable[[], bool]) -> bool:
        ring = self._ring
        written = ring._written.value
        need = _FRAME.size + len(part)
        while any(active.value and written + need - cursor.value > RING_BYTES for cursor, active in self._readers):
            if stopped():
                return False
            time.sleep(0.0005)
        ring._copy_in(written, _FRAME.pack(len(part), more))
        ring._copy_in(written + _FRAME.size, part)
        ring._written.value = written + need
        ring._word.value = (ring._word.value + 1) & 0xFFFFFFFF
        futex.wake(ring._word)
        return True


class RingReader:
    def __init__(self, ring: Ring, index: int) -> None:
        self._ring = ring
        self._cursor, self._active = ring._reader(index)
        self._cursor.value = ring._written.value
        self._active.value = 1

    def close(self) -> None:
        """The writer no longer waits for this reader."""
        self._active.value = 0

    def read(self, stopped: Callable[[], bool]) -> bytes | None:
        """The next message; None once `stopped()` turns true."""
        parts: list[bytes] = []
        while True:
            frame = self._read_frame(stopped)
            if frame is None:
                return None
            part, more = frame
            parts.append(part)
            if not more:
                return part if len(parts) == 1 else b"".join(parts)

    def _read_frame(self, stopped: Callable[[], bool]) -> tuple[bytes, bool] | None:
        ring = self._ring
        cursor = self._cursor.value
        while True:
            word = ring._word.value
            if ring._written.value > cursor:
                break
            if stopped():
                return None
            futex.wait(ring._word, word, _NAP)
        length, more = _FRAME.unpack(ring._copy_out(cursor, _FRAME.size))
        part = ring._copy_out(cursor + _FRAME.size, length)
        self._cursor.value = cursor + _FRAME.size + length
        return part, bool(more)


def pack_plan(epoch: int, step: int, plan: bytes) -> bytes:
    """A plan as it travels in the ring: u64 epoch, u64 step (little-endian), the encoded StepPlan."""
    return epoch.to_bytes(8, "little") + step.to_bytes(8, "little") + plan


def unpack_plan(message: bytes) -> tuple[int, int, bytes]:
    return int.from_bytes(message[:8], "little"), int.from_bytes(message[8:16], "little"), message[16:]
