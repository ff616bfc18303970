"""Sequences in a paged cache, for the attention cases: ours reads blocks in no order, the twin contiguous copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import scaled_dot_product_attention

SLOTS = 64


@dataclass(frozen=True)
class Cached:
    """Keys and values of sequences of these lengths."""

    lengths: Sequence[int]
    kv_heads: int
    d: int
    dtype: torch.dtype
    device: torch.device
    slots: int = SLOTS

    @cached_property
    def blocks(self) -> list[int]:
        return [-(-length // self.slots) for length in self.lengths]

    @cached_property
    def scales(self) -> torch.Tensor | None:
        """Of keys and of values, where they are float8."""
        return None if self.dtype.itemsize > 1 else torch.full((self.kv_heads,), 0.02, device=self.device)

    @cached_property
    def caches(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [blocks, KV heads, slots, D]. Drawn block by block, as float32 takes twice their memory."""
        shape = (sum(self.blocks), self.kv_heads, self.slots, self.d)
        pair = [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2)]
        for cache in pair:
            for part in cache.split(4096):
                drawn = torch.randn(part.shape, device=self.device)
                part.copy_(drawn if self.scales is None else drawn / 0.02)
        return pair[0], pair[1]

    @cached_property
    def tables(self) -> torch.Tensor:
        """int32 [sequences, blocks of the longest]."""
        numbers = torch.randperm(sum(self.blocks), device=self.device).int()
        longest = max(self.blocks)
        rows = [torch.nn.functional.pad(own, (0, longest - len(own))) for own in numbers.split(self.blocks)]
        return torch.stack(rows)

    def contiguous(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [sequences, KV heads, length, D] of sequences of one length, in bfloat16."""
        length, blocks = self.lengths[first], self.blocks[first]
        table = self.tables[first:last, :blocks].long()
        found = []
        for cache in self.caches:
            x = cache[table].transpose(1, 2).flatten(2, 3)[:, :, :length].bfloat16()
            found.append((x if self.scales is None else x * self.scales.bfloat16()[:, None, None]).contiguous())
        return found[0], found[1]

    def bytes(self) -> int:
        """What attention to all of them reads."""
        return 2 * sum(self.lengths) * self.kv_heads * self.d * self.dtype.itemsize


def sdpa(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int | None = None
) -> torch.Tensor:
    """PyTorch's attention: queries [sequences, n, A, D] at the end of keys and values [sequences, K, length, D]."""
    n, length = queries.shape[1], keys.shape[2]
    mask = None
    if n not in (1, length) or window is not None:
        key = torch.arange(length, device=queries.device)
        query = torch.arange(length - n, length, device=queries.device)[:, None]
        mask = (key <= query) & (key > query - (window or length + 1))
    out = scaled_dot_product_attention(
        queries.transpose(1, 2), keys, values, mask, is_causal=mask is None and n > 1, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)
