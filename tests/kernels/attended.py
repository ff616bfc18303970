"""Batches of sequences over a scattered cache, and what attention to them is: for the attention kernels' tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tests.kernels.tensors import drawn
from tests.kernels.tolerance import assert_as_good
from torch.nn.functional import scaled_dot_product_attention

FLOAT8 = torch.float8_e4m3fn


class Batch:
    """Sequences of (query tokens, keys), whose queries are columns of qkv and whose keys lie in blocks of a cache, in
    no order. What no sequence has written is NaN: slots, queries and outputs of padding."""

    def __init__(
        self,
        device: torch.device,
        sequences: Sequence[tuple[int, int]],
        *,
        heads: int = 4,
        kv_heads: int = 1,
        d: int = 16,
        slots: int = 16,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        padding: int = 0,
    ) -> None:
        kv_dtype = kv_dtype or dtype
        self.sequences = sequences
        self.tokens = sum(n for n, _ in sequences)
        self.scale = d**-0.5
        self.qkv = drawn(self.tokens + padding, (heads + 2 * kv_heads) * d, dtype=dtype, device=device)
        self.qkv[self.tokens :] = float("nan")
        self.queries = self.qkv[:, : heads * d].unflatten(1, (heads, d))
        starts = [0]
        for n, _ in sequences:
            starts.append(starts[-1] + n)
        self.starts = torch.tensor(starts, dtype=torch.int32, device=device)
        self.lengths = torch.tensor([length for _, length in sequences], dtype=torch.int32, device=device)

        blocks = [-(-length // slots) for _, length in sequences]
        numbers = (torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(1)) + 1).int().split(blocks)
        self.tables = torch.full((len(sequences), max(blocks) + 2), 2**30, dtype=torch.int32)
        for row, own in zip(self.tables, numbers, strict=True):
            row[: len(own)] = own
        self.tables = self.tables.to(device)
        self.key_scales = self.value_scales = None
        if kv_dtype == FLOAT8:
            self.key_scales = 0.01 + 0.01 * torch.arange(kv_heads, device=device)
            self.value_scales = 0.02 - 0.005 * torch.arange(kv_heads, device=device)
        shape = (sum(blocks) + 1, kv_heads, slots, d)
        self.keys, self.values = (
            self._cache(shape, scales, kv_dtype, device, seed)
            for seed, scales in ((2, self.key_scales), (3, self.value_scales))
        )

    def _cache(
        self,
        shape: tuple[int, ...],
        scales: torch.Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> torch.Tensor:
        x = drawn(*shape, dtype=torch.float32, device=device, seed=seed)
        if scales is not None:
            x = x / scales[:, None, None]
        x[0] = float("nan")
        slots = shape[2]
        for (_, length), table in zip(self.sequences, self.tables, strict=True):
            if length % slots:
                x[table[length // slots], :, length % slots :] = float("nan")
        return x.to(dtype)

    def read(self, cache: torch.Tensor, scales: torch.Tensor | None, sequence: int) -> torch.Tensor:
        """[K, length, D] float32: the keys, or values, of a sequence."""
        length = self.sequences[sequence][1]
        slots = cache.shape[2]
        own = self.tables[sequence, : -(-length // slots)].long()
        x = cache[own].float().transpose(0, 1).flatten(1, 2)[:, :length]
        return x if scales is None else x * scales[:, None, None]

    def mask(self, sequence: int, window: int | None = None, causal: bool = True) -> torch.Tensor:
        """[n, length]: which keys a query sees."""
        n, length = self.sequences[sequence]
        key = torch.arange(length)
        query = torch.arange(length - n, length)[:, None]
        seen = (key <= query) & (key > query - (window or length + 1))
        return (seen if causal else torch.ones_like(seen)).to(self.queries.device)

    def expected(
        self, window: int | None = None, causal: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(exact output, exact log-sum-exp, PyTorch's output in the batch's precision), without padding."""
        parts = []
        for s in range(len(self.sequences)):
            queries = self.queries[self.starts[s] : self.starts[s + 1]]
            keys = self.read(self.keys, self.key_scales, s)
            values = self.read(self.values, self.value_scales, s)
            parts.append(attention(queries, keys, values, self.mask(s, window, causal), self.scale))
        return tuple(map(torch.cat, zip(*parts, strict=True)))  # type: ignore[return-value]


def assert_lse(found: torch.Tensor, exact: torch.Tensor) -> None:
    """-inf where it should be, elsewhere as good as float32."""
    seen = exact.isfinite()
    assert torch.equal(found == float("-inf"), ~seen)
    assert_as_good(found[seen], exact[seen], exact[seen].float(), floor=1e-5)


def attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """queries [n, A, D], keys and values [K, keys, D], mask [n, keys]: (exact output, exact log-sum-exp, PyTorch's
    output in the queries' precision). Zeros and -inf where a query sees nothing."""
    group = queries.shape[1] // keys.shape[0]
    q = queries.double().transpose(0, 1)
    k, v = (x.double().repeat_interleave(group, 0) for x in (keys, values))
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    exact = (scores - lse.clamp(min=-1e300)[..., None]).exp() @ v
    k, v = (x.to(queries.dtype).repeat_interleave(group, 0) for x in (keys, values))
    torchs = scaled_dot_product_attention(queries.transpose(0, 1)[None], k[None], v[None], mask, scale=scale)[0]
    torchs = torchs.masked_fill(~mask.any(-1)[:, None], 0.0)
    return exact.transpose(0, 1), lse.T, torchs.transpose(0, 1)
