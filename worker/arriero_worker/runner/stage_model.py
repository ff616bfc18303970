"""What a runner asks of the layers it runs."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from arriero_worker.model.forward import ForwardBatch


class StageModel(Protocol):
    """The layers of one stage on one tensor rank. Legend: T tokens, H hidden size, R logits rows, V vocabulary."""

    def forward(self, batch: ForwardBatch, kv: Any, hidden: torch.Tensor | None, /) -> torch.Tensor:
        """Write the tokens' KV to `kv`, attend over it, and return the hidden states [T, H] or, on the last stage,
        the logits [R, V] of `batch.logits_rows_R`: float32, complete on each tensor rank, the caller's to overwrite.
        `hidden` [T, H] comes from the stage before (None on stage 0, which embeds).
        """
        ...
