"""Threads that run kernels together, with a hand-over of well under a microsecond.

A mailbox in memory holds the kernel's address and arguments. `run` raises its sequence number, takes part in the work
itself, and waits for the others; they spin on the number for a moment and then sleep on a semaphore, so an idle
engine costs nothing. With one thread there is no pool and `run` is a plain call. numba's own thread layers were
measured and left: its queue needs 60 to 200 us a call, its OpenMP layer the system's libgomp, which no wheel brings.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

from arriero_worker.model.cpu.compiled import compile_function
from arriero_worker.model.cpu.native import (
    call_kernel,
    exchange,
    i64_at,
    load_acquire,
    sched_yield,
    sem_post,
    sem_wait,
    store_release,
)

# The mailbox, in bytes. Each writer has cache lines of its own.
_SEQUENCE, _KERNEL, _THREADS, _SPIN = 0, 64, 72, 80
_ARGUMENTS = 128
_ARGUMENT_BYTES = 256
_WORKERS = _ARGUMENTS + _ARGUMENT_BYTES
_DONE, _ASLEEP, _SEMAPHORE = 0, 64, 128
_WORKER_BYTES = 256
_YIELD_AFTER = 4096

SPIN = 100_000
"""Looks at the mailbox before sleeping, some 100 us: longer than Python needs between two kernels of a step."""
BRIEF_SPIN = 500


def _run(box):  # type: ignore[no-untyped-def]
    kernel = i64_at(box + _KERNEL)[0]
    threads = i64_at(box + _THREADS)[0]
    if threads > 1:
        sequence = load_acquire(box + _SEQUENCE) + 1
        exchange(box + _SEQUENCE, sequence)
        for w in range(threads - 1):
            worker = box + _WORKERS + w * _WORKER_BYTES
            if exchange(worker + _ASLEEP, 0) == 1:
                sem_post(worker + _SEMAPHORE)
        call_kernel(kernel, box + _ARGUMENTS, 0, threads)
        for w in range(threads - 1):
            turns = 0
            while load_acquire(box + _WORKERS + w * _WORKER_BYTES + _DONE) != sequence:
                turns += 1
                if turns > _YIELD_AFTER:
                    sched_yield()
    else:
        call_kernel(kernel, box + _ARGUMENTS, 0, 1)


def _work(box, thread, sequence):  # type: ignore[no-untyped-def]
    """A worker's life, begun when the mailbox stood at `sequence`; ends when the kernel's address is 0."""
    worker = box + _WORKERS + (thread - 1) * _WORKER_BYTES
    threads = i64_at(box + _THREADS)[0]
    spin = i64_at(box + _SPIN)[0]
    while True:
        turns = 0
        while load_acquire(box + _SEQUENCE) == sequence:
            turns += 1
            if turns > spin:
                exchange(worker + _ASLEEP, 1)
                # Between the last look and the flag work may have come: then either the flag is still ours to take
                # back, or `run` took it and posts.
                if load_acquire(box + _SEQUENCE) == sequence or exchange(worker + _ASLEEP, 0) == 0:
                    sem_wait(worker + _SEMAPHORE)
        sequence += 1
        kernel = i64_at(box + _KERNEL)[0]
        if kernel == 0:
            return
        call_kernel(kernel, box + _ARGUMENTS, thread, threads)
        store_release(worker + _DONE, sequence)


@cache
def _compiled() -> tuple[Callable[[int], None], Callable[[int, int, int], None]]:
    return compile_function(_run, "void(int64)"), compile_function(_work, "void(int64, int64, int64)")


class Pool:
    """`threads` threads, the caller's among them. `run` calls come from one thread at a time.

    `spin`: how often a thread looks for work before it sleeps.
    """

    def __init__(self, threads: int, spin: int = SPIN) -> None:
        self._run, self._work = _compiled()
        size = _WORKERS + (threads - 1) * _WORKER_BYTES + 64
        self._memory = ctypes.create_string_buffer(size)
        self._box = -(-ctypes.addressof(self._memory) // 64) * 64
        self._offset = self._box - ctypes.addressof(self._memory)
        self.threads = threads
        libc = ctypes.CDLL(None)
        for w in range(threads - 1):
            semaphore = ctypes.c_void_p(self._box + _WORKERS + w * _WORKER_BYTES + _SEMAPHORE)
            assert libc.sem_init(semaphore, 0, 0) == 0
        struct.pack_into("qqq", self._memory, self._offset + _KERNEL, 0, threads, spin)
        self._workers = [
            threading.Thread(target=self._live, args=(self._memory, i), name=f"kernel-{i}", daemon=True)
            for i in range(1, threads)
        ]
        for worker in self._workers:
            worker.start()

    def _live(self, memory: Any, thread: int) -> None:
        """`memory` is the mailbox: it lasts as long as the thread."""
        self._work(self._box, thread, 0)

    def run(self, kernel: int, layout: struct.Struct, *arguments: float) -> None:
        """Run the kernel at an address on all threads; returns when all are done. Releases the GIL.

        `layout` packs the arguments, 8 bytes each, as the kernel reads them.
        """
        layout.pack_into(self._memory, self._offset + _ARGUMENTS, *arguments)
        struct.pack_into("q", self._memory, self._offset + _KERNEL, kernel)
        self._run(self._box)

    def close(self) -> None:
        """End the threads. `run` must not be called afterwards."""
        if not self._workers:
            return
        # The workers leave on a kernel of 0 and never say done: `_run` would wait for them.
        struct.pack_into("q", self._memory, self._offset + _KERNEL, 0)
        (sequence,) = struct.unpack_from("q", self._memory, self._offset + _SEQUENCE)
        struct.pack_into("q", self._memory, self._offset + _SEQUENCE, sequence + 1)
        libc = ctypes.CDLL(None)
        for w, worker in enumerate(self._workers):
            while worker.is_alive():
                libc.sem_post(ctypes.c_void_p(self._box + _WORKERS + w * _WORKER_BYTES + _SEMAPHORE))
                worker.join(0.01)
        self._workers.clear()
