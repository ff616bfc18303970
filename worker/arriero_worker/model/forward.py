"""One micro-batch as the model sees it.

Legend: T tokens, B sequences, R rows that need logits, P block-table width, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class ForwardBatch:
    """Sequences are packed one behind the other; each brings `query_starts[i+1] - query_starts[i]` new tokens.

    All tensors are contiguous, on the rank's device, and identical on every rank of the group (but `tokens_T`, which
    only stage 0 reads). Those said to be int64 are int32 on a GPU.
    """

    tokens_T: torch.Tensor
    """int64, the token ids."""
    positions_T: torch.Tensor
    """int64, the position of each token in its sequence."""
    slots_T: torch.Tensor
    """int64, where each token's KV goes: block id * block_size + offset. Negative, on a GPU: padding, kept nowhere."""
    query_starts_B1: torch.Tensor
    """int32 [B + 1], first token of each sequence in T; the last entry is T."""
    context_lengths_B: torch.Tensor
    """int32, tokens of KV each sequence attends over, its new ones included."""
    block_tables_BP: torch.Tensor
    """int32, block ids of each sequence in order; entries beyond the context are undefined."""
    logits_rows_R: torch.Tensor | None
    """int64, the rows of T whose logits the last stage must return; None: all, in order."""

    @property
    def decodes(self) -> bool:
        """Every sequence brings one token."""
        return len(self.positions_T) == len(self.context_lengths_B)
