"""A step's numbers on the device: what the host laid out, in one copy, and the tokens that only the device knows.

Legend: S sequences, T tokens, D decodes, N sampled tokens, P block-table width, R logits rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from arriero_worker.model.forward import ForwardBatch
from arriero_worker.runner.batch import Step
from arriero_worker.runner.device.streams import Streams

_ALIGNED = 16
"""Every field begins at a multiple of 64 bytes: kernels are compiled for aligned addresses."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A step on the device."""

    forward: ForwardBatch
    """May be padded behind the step's own tokens and sequences: then there is a graph for it."""
    gains_N: torch.Tensor
    """int64, the slots that gain a token."""
    positions_N: torch.Tensor
    """int32, the position of that token in its sequence."""


class StepInputs:
    """One place for the inputs of every step, taken in turn: what is launched reads them before the next are copied.

    A batch of single tokens is padded to the next of `buckets`, whose inputs always lie at the same addresses (those
    of `bucket_batch`), so that a graph can have read them from there.
    """

    def __init__(
        self,
        streams: Streams,
        device: torch.device,
        *,
        max_running: int,
        max_batch_tokens: int,
        max_context: int,
        block_size: int,
    ) -> None:
        self._streams, self._device = streams, device
        self._width = -(-max_context // block_size)
        self.buckets: list[int] = []
        """Ascending; the graphs that there are."""
        s, t = max_running, max_batch_tokens
        self._area = torch.zeros(_layout([s + 1, s, t, t, t, s, s, s, t])[-1], dtype=torch.int32, device=device)
        self._tables_SP = torch.zeros(max_running, self._width, dtype=torch.int32, device=device)

    def bucket_batch(self, bucket: int) -> ForwardBatch:
        """The batch of `bucket` single tokens that a graph is captured with: nothing but padding, whatever an earlier
        step has left there.
        """
        self._area.zero_()
        self._tables_SP.zero_()
        fields = self._fields([bucket + 1, bucket, bucket, bucket, bucket])
        fields[3].fill_(-1)
        return self._forward(fields, self._tables_SP[:bucket], None)

    def place(self, step: Step, last_S: torch.Tensor | None) -> Placed:
        """last_S: int32, the token that each slot feeds next; None on a stage that feeds none."""
        forward = step.forward
        s, t, d = len(forward.context_lengths_B), len(forward.positions_T), len(step.decodes)
        assert forward.logits_rows_R is not None
        rows = forward.logits_rows_R.numpy()
        alone = forward.decodes and d == s and len(rows) == t
        bucket = next((bucket for bucket in self.buckets if bucket >= s), 0) if alone else 0
        padded_s, padded_t = (bucket, bucket) if bucket else (s, t)
        starts = np.full(padded_s + 1, t, dtype=np.int32)
        starts[: s + 1] = forward.query_starts_B1.numpy()
        values = [
            starts,
            _padded(forward.context_lengths_B.numpy(), padded_s, 0),
            _padded(forward.positions_T.numpy(), padded_t, 0),
            _padded(forward.slots_T.numpy(), padded_t, -1),
            _padded(forward.tokens_T.numpy(), padded_t, 0),
            step.decodes,
            step.slots_N,
            step.positions_N,
            np.empty(0, dtype=np.int32) if alone else rows,
        ]
        fields = self._upload(values)
        if last_S is not None and d:
            torch.index_select(last_S, 0, fields[5], out=fields[4][t - d : t])
        batch = self._forward(fields, self._tables(forward.block_tables_BP, bucket), None if alone else fields[8])
        return Placed(batch, fields[6].to(torch.int64), fields[7])

    def _upload(self, values: Sequence[np.ndarray]) -> list[torch.Tensor]:
        sizes = [len(value) for value in values]
        offsets = _layout(sizes)
        host = self._streams.host(offsets[-1])
        numbers = host.numpy()
        for value, offset in zip(values, offsets, strict=False):
            numbers[offset : offset + len(value)] = value
        self._streams.upload(host, self._area[: offsets[-1]])
        return self._fields(sizes)

    def _fields(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        return [self._area[at : at + size] for at, size in zip(_layout(sizes), sizes, strict=False)]

    def _tables(self, tables_SP: torch.Tensor, bucket: int) -> torch.Tensor:
        s, width = tables_SP.shape
        host = self._streams.host(s * width)
        host.view(s, width).copy_(tables_SP)
        found = torch.empty(s, width, dtype=torch.int32, device=self._device)
        self._streams.upload(host, found.view(-1))
        if not bucket:
            return found
        self._tables_SP[:s, :width].copy_(found)
        return self._tables_SP[:bucket]

    @staticmethod
    def _forward(fields: Sequence[torch.Tensor], tables: torch.Tensor, rows: torch.Tensor | None) -> ForwardBatch:
        starts, lengths, positions, slots, tokens, *_ = fields
        return ForwardBatch(
            tokens_T=tokens,
            positions_T=positions,
            slots_T=slots,
            query_starts_B1=starts,
            context_lengths_B=lengths,
            block_tables_BP=tables,
            logits_rows_R=rows,
        )


def _layout(sizes: Sequence[int]) -> list[int]:
    """Where each field begins, and the end of all."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // _ALIGNED) * _ALIGNED)
    return offsets


def _padded(values: np.ndarray, size: int, fill: int) -> np.ndarray:
    if len(values) == size:
        return values
    padded = np.full(size, fill, dtype=np.int32)
    padded[: len(values)] = values
    return padded
