"""All-reduce and all-gather among the ranks of one pod, in shared memory, for the cpu backend.

Each rank copies its part into its slot, raises its sequence number (in a cache line of its own), waits for the
others' and reads all slots. Two alternating buffers make one wait enough: a rank that writes round n + 2 has seen
every rank begin n + 1, so all have finished reading n. Waiting spins briefly, then yields the core, and looks at the
pod's abort word: a lost rank ends the wait.

Sums run in rank order in float32, so every rank gets the same bits.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import extending, types

from arriero_worker.group.comm import GroupAborted
from arriero_worker.group.memory import SLOT_BYTES, PodMemory

# Called with their array and index only, which numba's types do not say.
_intrinsic: Any = extending.intrinsic

_LINE = 8  # uint64 words of a cache line
_SPINS = 200  # looks before the first yield


@_intrinsic
def _load(typingctx: Any, words: Any, index: Any) -> Any:
    """Atomic acquire load of words[index] (uint64, C order)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        pointer = builder.gep(array.data, [args[1]])
        return builder.load_atomic(pointer, "acquire", 8)

    return types.uint64(words, types.intp), codegen


@_intrinsic
def _store(typingctx: Any, words: Any, index: Any, value: Any) -> Any:
    """Atomic release store of words[index] = value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        pointer = builder.gep(array.data, [args[1]])
        builder.store_atomic(args[2], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(words, types.intp, types.uint64), codegen


@_intrinsic
def _as_float(typingctx: Any, bits: Any) -> Any:
    """Reinterpret a uint32's bits as float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@_intrinsic
def _as_bits(typingctx: Any, number: Any) -> Any:
    """Reinterpret a float32's bits as uint32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


# By name, not by address, so that the compiled code may be cached on disk.
_sched_yield = types.ExternalFunction("sched_yield", types.int32())


@numba.njit(nogil=True, cache=True)
def _wait(sequences: np.ndarray, ranks: int, sequence: np.uint64, abort: np.ndarray, epoch: np.uint64) -> bool:
    for rank in range(ranks):
        spins = 0
        while _load(sequences, rank * _LINE) < sequence:
            spins += 1
            if spins > _SPINS:
                if _load(abort, 0) >= epoch:
                    return False
                _sched_yield()
    return True


@numba.njit(nogil=True, cache=True)
def _raise(sequences: np.ndarray, rank: int, sequence: np.uint64) -> None:
    _store(sequences, rank * _LINE, sequence)


@numba.njit(nogil=True, cache=True)
def _sum_float32(slots: np.ndarray, out: np.ndarray) -> None:
    for i in range(out.shape[0]):
        total = slots[0, i]
        for rank in range(1, slots.shape[0]):
            total += slots[rank, i]
        out[i] = total


@numba.njit(nogil=True, cache=True)
def _sum_bfloat16(slots: np.ndarray, out: np.ndarray) -> None:
    for i in range(out.shape[0]):
        total = np.float32(0)
        for rank in range(slots.shape[0]):
            total += _as_float(np.uint32(slots[rank, i]) << np.uint32(16))
        bits = _as_bits(total)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        out[i] = np.uint16(rounded >> np.uint32(16))


def warm() -> None:
    """Compile, or load from the cache on disk, before the first step waits for it."""
    words = np.zeros(_LINE, dtype=np.uint64)
    _raise(words, 0, np.uint64(1))
    _wait(words, 1, np.uint64(1), words, np.uint64(1))
    _sum_float32(np.zeros((1, 1), np.float32), np.zeros(1, np.float32))
    _sum_bfloat16(np.zeros((1, 1), np.uint16), np.zeros(1, np.uint16))


class PodReduce:
    """The collectives of one rank with the other ranks of its stage, all in this pod, for one epoch."""

    def __init__(self, memory: PodMemory, rank: int, first: int, ranks: int, epoch: int) -> None:
        """`rank` counts within the stage; `first` is the pod's local index of the stage's first rank."""
        raw = np.frombuffer(memory.map, dtype=np.uint8)
        self._rank, self._ranks = rank, ranks
        self._abort = raw[:8].view(np.uint64)
        base = memory.slots_at
        self._sequences = raw[base + 64 * first : base + 64 * (first + ranks)].view(np.uint64)
        slots_at = base + 4096 + 2 * first * SLOT_BYTES
        self._slots = raw[slots_at : slots_at + 2 * ranks * SLOT_BYTES].reshape(2, ranks, SLOT_BYTES)
        self._epoch = np.uint64(epoch)
        # Numbers of an epoch are above those of all earlier ones, so a survivor's old number is never taken for a
        # new one.
        self._sequence = epoch << 40

    def _exchange(self, part: np.ndarray) -> np.ndarray:
        """Bytes of one slot at most: publish `part` (uint8) and return all ranks' parts [ranks, bytes]."""
        self._sequence += 1
        slots = self._slots[self._sequence & 1, :, : part.shape[0]]
        slots[self._rank] = part
        sequence = np.uint64(self._sequence)
        _raise(self._sequences, self._rank, sequence)
        if not _wait(self._sequences, self._ranks, sequence, self._abort, self._epoch):
            raise GroupAborted(f"epoch {self._epoch} ended during an all-reduce")
        return slots

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.view(-1)
        if flat.dtype == torch.bfloat16:
            values, add = flat.view(torch.uint16).numpy(), _sum_bfloat16
        else:
            values, add = flat.numpy(), _sum_float32
        step = SLOT_BYTES // values.itemsize
        for at in range(0, values.shape[0], step):
            part = values[at : at + step]
            add(self._exchange(part.view(np.uint8)).view(values.dtype), part)
        return x

    def all_gather(self, x_RV: torch.Tensor) -> torch.Tensor:
        rows, width = x_RV.shape
        out = torch.empty(rows, self._ranks, width, dtype=x_RV.dtype)
        source = x_RV.contiguous().view(torch.uint8).numpy()
        target = out.view(torch.uint8).numpy()
        step = max(1, SLOT_BYTES // source.shape[1])
        for at in range(0, rows, step):
            part = source[at : at + step]
            parts = self._exchange(part.reshape(-1)).reshape(self._ranks, *part.shape)
            for rank in range(self._ranks):
                target[at : at + step, rank] = parts[rank]
        return out.view(rows, self._ranks * width)
