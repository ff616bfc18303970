"""A model whose logits are a hash of the whole context, read back from the KV it wrote itself.

Each stage writes one number per token to its KV, at the batch's slots, and gives each token a hash of all numbers up to
it, found through the batch's block tables. So a wrong slot, block, position or context length anywhere changes all
that follows. `next_logits` computes the same from the tokens alone.

Legend: T tokens, R logits rows, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from arriero_worker.model.forward import ForwardBatch

_PRIME = 1_048_573  # products of two stay exact in int64, and the values themselves in float32
_EMPTY = 555_555  # what a block that nobody wrote holds


def _hash(context: np.ndarray, stage: int) -> int:
    weights = (np.arange(len(context), dtype=np.int64) * 7919 + 104_729 * (stage + 1)) % _PRIME
    return int((((context * weights) % _PRIME).sum() + len(context)) % _PRIME)


def _logits(state: int, vocab: int) -> np.ndarray:
    tokens = np.arange(vocab, dtype=np.int64)
    mixed = (state * (2 * tokens + 12_345) + tokens * tokens * 31) % _PRIME
    mixed = (mixed * mixed + 17 * state) % _PRIME
    return (mixed / _PRIME * 6).astype(np.float32)


def next_logits(tokens: Sequence[int], pipeline: int, vocab: int) -> np.ndarray:
    """Logits [V] behind `tokens`, without any KV."""
    states = np.array(tokens, dtype=np.int64)
    for stage in range(pipeline):
        states = np.array([_hash(states[: i + 1], stage) for i in range(len(states))], dtype=np.int64)
    return _logits(int(states[-1]), vocab)


class StubModel:
    """One stage. `kv` is an int64 array of kv_blocks * block_size numbers, made by `empty_kv`."""

    def __init__(self, stage: int, pipeline: int, vocab: int, block_size: int) -> None:
        self._stage, self._last, self._vocab, self._block_size = stage, stage == pipeline - 1, vocab, block_size

    def empty_kv(self, blocks: int) -> np.ndarray:
        return np.full(blocks * self._block_size, _EMPTY, dtype=np.int64)

    def forward(self, batch: ForwardBatch, kv: np.ndarray, hidden: torch.Tensor | None, /) -> torch.Tensor:
        inputs = batch.tokens_T if hidden is None else hidden[:, 0].to(torch.int64)
        assert (hidden is None) == (self._stage == 0)
        kv[batch.slots_T.numpy()] = inputs.numpy()
        starts = batch.query_starts_B1.tolist()
        states = np.empty(len(inputs), dtype=np.int64)
        assert starts[0] == 0
        assert starts[-1] == len(inputs)
        for i, (start, end) in enumerate(itertools.pairwise(starts)):
            length = int(batch.context_lengths_B[i])
            blocks = batch.block_tables_BP[i].numpy()[: -(-length // self._block_size)]
            cache = kv.reshape(-1, self._block_size)[blocks].reshape(-1)[:length]
            positions = batch.positions_T[start:end].tolist()
            assert positions == list(range(length - (end - start), length))
            for row, position in zip(range(start, end), positions, strict=True):
                states[row] = _hash(cache[: position + 1], self._stage)
        if not self._last:
            return torch.from_numpy(states.astype(np.float32))[:, None]
        rows = [_logits(int(states[row]), self._vocab) for row in batch.logits_rows_R.tolist()]
        return torch.from_numpy(np.stack(rows) if rows else np.empty((0, self._vocab), dtype=np.float32))
