"""What the attention operations share: the pass over keys and values of a paged cache, and the checks of one.

Legend: A query heads, K KV heads, D head size, B blocks of the cache, Z slots of a block; inside kernels M query rows
(a token's query heads of one KV head lie side by side, so that keys and values are read once for all of them), N keys.

Source: Dao, "FlashAttention-2" (2023), for the online softmax; Kwon et al., "PagedAttention" (2023), for the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arriero_kernels.checks import FLOATS, expect
from arriero_kernels.numerics import cast, dot

CACHE_DTYPES = (*FLOATS, torch.float8_e4m3fn)

NOTHING = tl.constexpr(-1.0e30)
"""The score of a key that is not seen: finite, so that a row which has seen none yet holds no NaN. What such a row has
summed, the first key that it sees outweighs entirely."""
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(pointers, kept, column, KEPT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D]; zeros from column D on and, if KEPT says so, in rows that are not `kept`."""
    if KEPT and BLOCK_D != D:
        return tl.load(pointers, mask=kept[:, None] & (column < D)[None, :], other=0.0)
    elif KEPT:
        return tl.load(pointers, mask=kept[:, None], other=0.0)
    elif BLOCK_D != D:
        return tl.load(pointers, mask=(column < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def softmax_step(scores, acc, top, total, scale, v):
    """The online softmax over some more keys: scores [M, N] before scaling, v [N, D]; softmax to base 2."""
    above = tl.maximum(top, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - above[:, None])
    weight = tl.exp2(top - above)
    total = total * weight + tl.sum(p, 1)
    acc = dot(cast(p, v.dtype), v, acc * weight[:, None])
    return acc, above, total


@triton.jit
def attend(
    q,
    acc,
    top,
    total,
    keys,
    values,
    table,
    first,
    last,
    position,
    scale,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys `first` to `last` (a multiple of BLOCK_N, and the last tile may be cut short if MASKED).

    q [M, BLOCK_D]; keys, values: the KV head's first row in block 0, STRIDE from that in block 1; table: the numbers
    of the sequence's blocks. If MASKED, a row sees the keys up to its own position [M], WINDOW of them unless 0.
    """
    column = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        if SLOTS % BLOCK_N == 0:
            block = tl.load(table + start // SLOTS).to(tl.int64)
            tile = block * STRIDE + (start % SLOTS) * D
            row = (tl.arange(0, BLOCK_N) * D)[:, None] + column[None, :]
            key, value = keys + tile + row, values + tile + row
        else:
            block = tl.load(table + n // SLOTS, mask=n < last, other=0).to(tl.int64)
            row = (block * STRIDE + (n % SLOTS) * D)[:, None] + column[None, :]
            key, value = keys + row, values + row
        # Slots beyond the sequence's end hold anything, NaN as well, which a weight of zero would not remove: values
        # are masked, keys need not be.
        k = cast(load_rows(key, n < last, column, False, D, BLOCK_D), q.dtype)
        scores = dot(q, tl.trans(k))
        if MASKED:
            seen = n[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (n[None, :] > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, NOTHING)
        v = cast(load_rows(value, n < last, column, MASKED, D, BLOCK_D), q.dtype)
        acc, top, total = softmax_step(scores, acc, top, total, scale, v)
    return acc, top, total


@triton.jit
def finished(acc, top, total, seen, value_scale):
    """(output [M, D], log-sum-exp [M]) of rows; zeros and -inf of one that has not `seen` a key."""
    total = tl.where(seen, total, 1.0)
    out = tl.where(seen[:, None], acc * (value_scale / total)[:, None], 0.0)
    return out, tl.where(seen, (top + tl.log2(total)) * LN_2, float("-inf"))


@triton.jit
def scales_of(scale, key_scales, value_scales, kv_head, SCALED: tl.constexpr):
    """(factor of the scores, to base 2; factor of the values) of a KV head."""
    if SCALED:
        return scale * LOG2_E * tl.load(key_scales + kv_head), tl.load(value_scales + kv_head)
    else:
        return scale * LOG2_E, 1.0


def expect_queries(queries: torch.Tensor, heads_of: int, d: int) -> tuple[int, int]:
    """(rows, query heads) of queries [rows, A, D], whose rows may lie apart. Raises ValueError."""
    if queries.dim() != 3:
        raise ValueError(f"queries has shape {list(queries.shape)}, expected [tokens, query heads, head size]")
    rows, heads, size = queries.shape
    if size != d or heads < heads_of or heads % heads_of:
        raise ValueError(
            f"queries has {heads} heads of size {size}, expected a whole multiple of the {heads_of} KV heads, "
            f"of their size {d}"
        )
    if (queries.stride(1), queries.stride(2)) != (d, 1):
        raise ValueError(f"the heads of a row of queries lie apart: strides {list(queries.stride())}")
    return rows, heads


def expect_cache(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    queries: torch.Tensor,
) -> tuple[int, int, int]:
    """(KV heads, slots, head size) of a cache that queries attend to. Raises ValueError."""
    if queries.dtype not in FLOATS:
        raise ValueError(f"queries is {queries.dtype}, expected one of {', '.join(map(str, FLOATS))}")
    if keys.dim() != 4:
        raise ValueError(f"keys has shape {list(keys.shape)}, expected [blocks, KV heads, slots, head size]")
    blocks, kv_heads, slots, d = keys.shape
    dtypes = (queries.dtype, torch.float8_e4m3fn)
    expect("keys", keys, (blocks, kv_heads, slots, d), dtypes, queries.device)
    expect("values", values, (blocks, kv_heads, slots, d), (keys.dtype,), queries.device)
    if d % 2 or d > 256:
        raise ValueError(f"the head size is {d}, expected an even number up to 256")
    if (key_scales is None) != (value_scales is None):
        raise ValueError("key_scales and value_scales are given together or not at all")
    for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
        if scales is not None:
            expect(name, scales, (kv_heads,), (torch.float32,), queries.device)
    return kv_heads, slots, d


def expect_tables(block_tables: torch.Tensor, lengths: torch.Tensor, device: torch.device) -> int:
    """How many sequences they describe. Raises ValueError."""
    if block_tables.dim() != 2:
        raise ValueError(f"block_tables has shape {list(block_tables.shape)}, expected [sequences, blocks]")
    sequences = len(block_tables)
    if block_tables.dtype != torch.int32 or block_tables.device != device or block_tables.stride(1) != 1:
        raise ValueError(
            f"block_tables is {block_tables.dtype} on {block_tables.device} with strides "
            f"{list(block_tables.stride())}, expected rows of int32 on {device}"
        )
    expect("lengths", lengths, (sequences,), (torch.int32,), device)
    return sequences


def expect_factors(scale: float, window: int | None) -> int:
    """The window, 0 for none. Raises ValueError."""
    if not scale > 0:
        raise ValueError(f"scale is {scale}, expected a positive number")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, expected at least 1 or None")
    return window or 0


def padded(d: int) -> int:
    """The head size of tiles: a power of two that a matrix instruction takes."""
    return max(16, 1 << (d - 1).bit_length())
