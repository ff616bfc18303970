"""Attention of mixed batches, prefill chunks and decodes in one launch, over a paged KV cache.

Legend: T query tokens of all sequences, S sequences, A query heads, K KV heads, D head size, B blocks of the cache,
Z slots of a block, W blocks of the longest sequence. Source: Dao, "FlashAttention-2" (2023); Kwon et al.,
"PagedAttention" (2023).

The grid depends on T and S alone. Which rows of which sequence a program has, and how many keys, it reads from device
memory: so a CUDA graph that was captured once serves every batch that fits.

Tuned by the padded head size (D rounded up to a power of two), in four settings: `paged_attention_decode` where the
sequences have a token each (T <= S), `paged_attention_chunk` where large tiles would leave multiprocessors idle,
`paged_attention_prefill` for the rest, `paged_attention_float32` for float32, whatever the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arriero_kernels.attention import (
    NOTHING,
    attend,
    expect_cache,
    expect_factors,
    expect_queries,
    expect_tables,
    finished,
    load_rows,
    padded,
    scales_of,
)
from arriero_kernels.checks import expect
from arriero_kernels.numerics import narrow
from arriero_kernels.tuning import Parameters, Tuning

_SEARCHED = tl.constexpr(256)
"""Sequences looked at together in the search for a program's own."""


@triton.jit
def _sequence_of(tile, query_starts, sequences, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The sequence that a tile belongs to. A sequence of n rows that begins at row r has the ceil(n / BLOCK_M) tiles
    from r // BLOCK_M + its index on, which never run into the next one's."""
    begun = 0
    for first in range(0, sequences, _SEARCHED):
        sequence = first + tl.arange(0, _SEARCHED)
        start = tl.load(query_starts + sequence, mask=sequence < sequences, other=0)
        before = (start * GROUP // BLOCK_M + sequence <= tile) & (sequence < sequences)
        begun += tl.sum(before.to(tl.int32), 0)
    return tl.maximum(begun - 1, 0)


# Nothing is compiled for sizes that vary from step to step.
@triton.jit(do_not_specialize=["sequences", "table_stride"])
def _paged_attention_kernel(
    queries,
    keys,
    values,
    block_tables,
    query_starts,
    lengths,
    key_scales,
    value_scales,
    out,
    log_sum_exp,
    scale,
    sequences,
    query_stride,
    table_stride,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALED: tl.constexpr,
    WITH_LSE: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_M rows (a token's heads of the group side by side) of one sequence and one KV head a program."""
    kv_head = tl.program_id(0) % KV_HEADS
    tile = tl.program_id(0) // KV_HEADS
    sequence = _sequence_of(tile, query_starts, sequences, GROUP, BLOCK_M)
    start = tl.load(query_starts + sequence)
    rows = (tl.load(query_starts + sequence + 1) - start) * GROUP
    # The last rows, which see the most keys, come first: so the launch does not end with the longest programs.
    row = (tl.cdiv(rows, BLOCK_M) - 1 - (tile - start * GROUP // BLOCK_M - sequence)) * BLOCK_M
    if (row < 0) | (row >= rows):
        return
    length = tl.load(lengths + sequence)
    m = row + tl.arange(0, BLOCK_M)
    present = m < rows
    column = tl.arange(0, BLOCK_D)
    token = (start + m // GROUP).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    pointers = queries + (token * query_stride + head * D)[:, None] + column[None, :]
    q = load_rows(pointers, present, column, True, D, BLOCK_D)

    # Keys from `first` to `whole` all rows see; from there to `last`, some.
    if CAUSAL:
        context = length - rows // GROUP
        nearest = context + row // GROUP
        position = tl.minimum(context + m // GROUP, length - 1)
        last = tl.minimum(context + (row + BLOCK_M - 1) // GROUP + 1, length)
        whole = tl.maximum(nearest + 1, 0) // BLOCK_N * BLOCK_N
    else:
        nearest = length - 1
        position = tl.full((BLOCK_M,), 0, tl.int32) + nearest
        last = length
        whole = length // BLOCK_N * BLOCK_N
    first = 0
    if WINDOW > 0:
        first = tl.maximum(nearest - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        whole = first

    factor, value_scale = scales_of(scale, key_scales, value_scales, kv_head, SCALED)
    keys += kv_head * SLOTS * D
    values += kv_head * SLOTS * D
    table = block_tables + sequence.to(tl.int64) * table_stride
    top = tl.full((BLOCK_M,), NOTHING, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    stride: tl.constexpr = KV_HEADS * SLOTS * D
    if WINDOW == 0:
        acc, top, total = attend(
            q, acc, top, total, keys, values, table, first, whole, position, factor,
            False, WINDOW, stride, SLOTS, D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, top, total = attend(
        q, acc, top, total, keys, values, table, whole, last, position, factor,
        True, WINDOW, stride, SLOTS, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    y, lse = finished(acc, top, total, position >= 0, value_scale)
    target = token * (KV_HEADS * GROUP) + head
    mask = present[:, None] & (column < D)[None, :]
    tl.store(out + target[:, None] * D + column[None, :], narrow(y, out.dtype.element_ty), mask=mask)
    if WITH_LSE:
        tl.store(log_sum_exp + target, lse, mask=present)


def paged_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    causal: bool = True,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    log_sum_exp: torch.Tensor | None = None,
    tuning: Tuning | None = None,
) -> torch.Tensor:
    """softmax(scale * queries @ keys^T) @ values, of each sequence's query tokens over its keys and values.

    queries: [T, A, D] bfloat16, float16 or float32; the heads of a row lie side by side, rows may lie apart (a view of
        qkv). A is a multiple of K, D even and at most 256.
    keys, values: [B, K, Z, D] contiguous, of the queries' dtype or float8_e4m3fn.
    block_tables: int32 [S, W], its rows contiguous: a sequence's blocks, of which as many are read as its length needs.
    query_starts: int32 [S + 1], ascending, at most T: sequence s has the rows query_starts[s] to query_starts[s + 1],
        none if both are equal. Rows from query_starts[S] on are padding: neither read nor written.
    lengths: int32 [S], the keys of each sequence, those of its query tokens included.
    scale: of the scores, positive.
    window: how many keys a query sees at most, its own included; None: all.
    causal: query i of n is at position length - n + i and sees the keys up to that one. Otherwise every query sees all
        keys, as the tokens of a tree see what came before it; there is no window then.
    key_scales, value_scales: float32 [K], positive; stored * scale is the key or value. Both or neither; None: 1.
    out: [T, A, D] of the queries' dtype, contiguous; made if None.
    log_sum_exp: float32 [T, A], contiguous, or None: of the scores, natural. -inf, and zeros in out, for a query that
        sees no key.

    What block_tables, query_starts and lengths say is not checked. Returns out. Raises ValueError for other shapes,
    dtypes, devices or strides.
    """
    kv_heads, slots, d = expect_cache(keys, values, key_scales, value_scales, queries)
    tokens, heads = expect_queries(queries, kv_heads, d)
    device = queries.device
    sequences = expect_tables(block_tables, lengths, device)
    expect("query_starts", query_starts, (sequences + 1,), (torch.int32,), device)
    within = expect_factors(scale, window)
    if within and not causal:
        raise ValueError("a window is given, which needs positions, and causal is false")
    if out is None:
        out = torch.empty((tokens, heads, d), dtype=queries.dtype, device=device)
    expect("out", out, (tokens, heads, d), (queries.dtype,), device)
    if log_sum_exp is not None:
        expect("log_sum_exp", log_sum_exp, (tokens, heads), (torch.float32,), device)
    if tokens == 0 or sequences == 0:
        return out
    block_d = padded(d)
    parameters = _chosen(tuning or Tuning.of(device), queries, sequences, block_d)
    group = heads // kv_heads
    tiles = tokens * group // parameters["BLOCK_M"] + sequences
    _paged_attention_kernel[(tiles * kv_heads,)](
        queries,
        keys,
        values,
        block_tables,
        query_starts,
        lengths,
        key_scales,
        value_scales,
        out,
        log_sum_exp,
        scale,
        sequences,
        queries.stride(0),
        block_tables.stride(0),
        CAUSAL=causal,
        WINDOW=within,
        SCALED=key_scales is not None,
        WITH_LSE=log_sum_exp is not None,
        GROUP=group,
        KV_HEADS=kv_heads,
        SLOTS=slots,
        D=d,
        BLOCK_D=block_d,
        **parameters,
    )
    return out


def _chosen(tuning: Tuning, queries: torch.Tensor, sequences: int, block_d: int) -> Parameters:
    tokens, heads, _ = queries.shape
    if queries.dtype == torch.float32:
        return tuning.choose("paged_attention_float32", block_d)
    if tokens <= sequences:
        return tuning.choose("paged_attention_decode", block_d)
    parameters = tuning.choose("paged_attention_prefill", block_d)
    if tokens * heads < parameters["BLOCK_M"] * tuning.multiprocessors:
        return tuning.choose("paged_attention_chunk", block_d)
    return parameters
