"""Attention of a few query tokens a sequence over a paged KV cache, the keys divided among programs.

Legend: S sequences, N query tokens of each (1 but for a speculation), A query heads, K KV heads, D head size, B blocks
of the cache, Z slots of a block, W blocks of the longest sequence, P parts that the keys of a sequence are divided
into. Source: Dao et al., "Flash-Decoding" (2023): each part's output with its log-sum-exp, then their merge.

P follows from S and the number of multiprocessors; how many keys a part has, its program reads from device memory: so
a CUDA graph that was captured once serves all lengths.

Tuned by the padded head size (D rounded up to a power of two), in three settings: `decode_attention` for a token a
sequence, `decode_attention_wide` where the rows of a KV head exceed its tiles, `decode_attention_float32`; PROGRAMS is
how many programs a multiprocessor holds at once.
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

_MAX_PARTS = 128
_WAVES = 4
"""So often all multiprocessors are filled where one filling does not hold a program for each sequence and KV head: so
sequences of unequal lengths even out."""


# Nothing is compiled for sizes that vary from step to step.
@triton.jit(do_not_specialize=["parts", "table_stride"])
def _decode_attention_kernel(
    queries,
    keys,
    values,
    block_tables,
    lengths,
    key_scales,
    value_scales,
    out,
    log_sum_exp,
    scale,
    parts,
    query_stride,
    table_stride,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALED: tl.constexpr,
    WITH_LSE: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_M rows (a token's heads of the group side by side) of a sequence and a KV head, and one part of the keys.

    out and log_sum_exp are [S * N, A, parts, D] and [S * N, A, parts].
    """
    part = tl.program_id(0) % parts
    kv_head = tl.program_id(0) // parts % KV_HEADS
    tile = tl.program_id(0) // parts // KV_HEADS
    tiles: tl.constexpr = (TOKENS * GROUP + BLOCK_M - 1) // BLOCK_M
    sequence = (tile // tiles).to(tl.int64)
    row = tile % tiles * BLOCK_M
    length = tl.load(lengths + sequence)
    m = row + tl.arange(0, BLOCK_M)
    present = m < TOKENS * GROUP
    token = sequence * TOKENS + m // GROUP
    head = kv_head * GROUP + m % GROUP
    target = (token * (KV_HEADS * GROUP) + head) * parts + part
    if CAUSAL:
        position = tl.minimum(length - TOKENS + m // GROUP, length - 1)
        begin = length - TOKENS + row // GROUP
        end = tl.minimum(length - TOKENS + (row + BLOCK_M - 1) // GROUP + 1, length)
    else:
        position = tl.full((BLOCK_M,), 0, tl.int32) + length - 1
        begin = length - 1
        end = length
    if WINDOW > 0:
        begin = tl.maximum(begin - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    else:
        begin = 0
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), parts) * BLOCK_N
    first = begin + part * share
    last = tl.minimum(first + share, end)

    if (first >= last) & (parts > 1):  # the merge does not read the output of a part without keys
        if WITH_LSE:
            tl.store(log_sum_exp + target, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=present)
        return

    column = tl.arange(0, BLOCK_D)
    pointers = queries + (token * query_stride + head * D)[:, None] + column[None, :]
    q = load_rows(pointers, present, column, True, D, BLOCK_D)
    factor, value_scale = scales_of(scale, key_scales, value_scales, kv_head, SCALED)
    stride: tl.constexpr = KV_HEADS * SLOTS * D
    acc, top, total = attend(
        q,
        tl.zeros((BLOCK_M, BLOCK_D), tl.float32),
        tl.full((BLOCK_M,), NOTHING, tl.float32),
        tl.zeros((BLOCK_M,), tl.float32),
        keys + kv_head * SLOTS * D,
        values + kv_head * SLOTS * D,
        block_tables + sequence * table_stride,
        first, last, position, factor, True, WINDOW, stride, SLOTS, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    lowest = first
    if WINDOW > 0:
        lowest = tl.maximum(first, position - WINDOW + 1)
    seen = tl.minimum(position + 1, last) > lowest
    y, lse = finished(acc, top, total, seen, value_scale)
    mask = present[:, None] & (column < D)[None, :]
    tl.store(out + target[:, None] * D + column[None, :], narrow(y, out.dtype.element_ty), mask=mask)
    if WITH_LSE:
        tl.store(log_sum_exp + target, lse, mask=present)


@triton.jit(do_not_specialize=["parts"])
def _merge_parts_kernel(
    outs,
    log_sum_exps,
    out,
    log_sum_exp,
    parts,
    WITH_LSE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One query token's one head a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    top = tl.full((), float("-inf"), tl.float32)
    for first in range(0, parts, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        lse = tl.load(log_sum_exps + row * parts + p, mask=p < parts, other=float("-inf"))
        top = tl.maximum(top, tl.max(lse, 0))
    seen = top > float("-inf")
    top = tl.where(seen, top, 0.0)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, parts, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        lse = tl.load(log_sum_exps + row * parts + p, mask=p < parts, other=float("-inf"))
        weight = tl.exp(lse - top)
        mask = (weight > 0.0)[:, None] & (column < D)[None, :]
        y = tl.load(outs + (row * parts + p)[:, None] * D + column[None, :], mask=mask, other=0.0)
        acc += tl.sum(y * weight[:, None], 0)
        total += tl.sum(weight, 0)
    total = tl.where(seen, total, 1.0)
    tl.store(out + row * D + column, narrow(acc / total, out.dtype.element_ty), mask=column < D)
    if WITH_LSE:
        tl.store(log_sum_exp + row, tl.where(seen, top + tl.log(total), float("-inf")))


def decode_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    tokens: int = 1,
    causal: bool = True,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    log_sum_exp: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    tuning: Tuning | None = None,
) -> torch.Tensor:
    """softmax(scale * queries @ keys^T) @ values, of each sequence's query tokens over its keys and values.

    queries: [S * N, A, D] bfloat16, float16 or float32, a sequence's tokens one after the other; the heads of a row lie
        side by side, rows may lie apart (a view of qkv). A is a multiple of K, D even and at most 256.
    keys, values: [B, K, Z, D] contiguous, of the queries' dtype or float8_e4m3fn.
    block_tables: int32 [S, W], its rows contiguous: a sequence's blocks, of which as many are read as its length needs.
    lengths: int32 [S], the keys of each sequence, those of its query tokens included. 0, as a graph's padding has it:
        nothing is read of the cache, and zeros are the output.
    scale: of the scores, positive.
    window: how many keys a query sees at most, its own included; None: all.
    tokens: N, of each sequence.
    causal: query i is at position length - N + i and sees the keys up to that one. Otherwise every query sees all keys,
        as the tokens of a tree see what came before it; there is no window then.
    key_scales, value_scales: float32 [K], positive; stored * scale is the key or value. Both or neither; None: 1.
    out: [S * N, A, D] of the queries' dtype, contiguous; made if None.
    log_sum_exp: float32 [S * N, A], contiguous, or None: of the scores, natural. -inf for a query that sees no key.
    workspace: float32, contiguous, of at least `decode_workspace_size` elements, whose contents are overwritten; made
        if None.

    What block_tables and lengths say is not checked. Returns out. Raises ValueError for other shapes, dtypes, devices
    or strides.
    """
    kv_heads, slots, d = expect_cache(keys, values, key_scales, value_scales, queries)
    rows, heads = expect_queries(queries, kv_heads, d)
    device = queries.device
    sequences = expect_tables(block_tables, lengths, device)
    if tokens < 1 or rows != sequences * tokens:
        raise ValueError(f"queries has {rows} rows, expected those of {sequences} sequences of {tokens} tokens each")
    within = expect_factors(scale, window)
    if within and not causal:
        raise ValueError("a window is given, which needs positions, and causal is false")
    if out is None:
        out = torch.empty((rows, heads, d), dtype=queries.dtype, device=device)
    expect("out", out, (rows, heads, d), (queries.dtype,), device)
    if log_sum_exp is not None:
        expect("log_sum_exp", log_sum_exp, (rows, heads), (torch.float32,), device)
    if sequences == 0:
        return out
    tuning = tuning or Tuning.of(device)
    group, block_d = heads // kv_heads, padded(d)
    parameters = dict(_chosen(tuning, tokens * group, queries.dtype, block_d))
    held = parameters.pop("PROGRAMS") * tuning.multiprocessors
    tiles = -(-tokens * group // parameters["BLOCK_M"])
    reachable = -(-block_tables.shape[1] * slots // parameters["BLOCK_N"])
    parts = max(1, min(_parts(sequences * tiles * kv_heads, held), reachable))
    part_outs, part_lses = out, log_sum_exp
    if parts > 1:
        n = rows * heads * parts
        if workspace is None:
            workspace = torch.empty(n * (d + 1), dtype=torch.float32, device=device)
        if workspace.numel() < n * (d + 1):
            raise ValueError(f"workspace has {workspace.numel()} elements, expected at least {n * (d + 1)}")
        expect("workspace", workspace, tuple(workspace.shape), (torch.float32,), device)
        part_outs, part_lses = workspace.view(-1)[: n * d], workspace.view(-1)[n * d : n * (d + 1)]
    _decode_attention_kernel[(parts * kv_heads * tiles * sequences,)](
        queries,
        keys,
        values,
        block_tables,
        lengths,
        key_scales,
        value_scales,
        part_outs,
        part_lses,
        scale,
        parts,
        queries.stride(0),
        block_tables.stride(0),
        CAUSAL=causal,
        WINDOW=within,
        SCALED=key_scales is not None,
        WITH_LSE=part_lses is not None,
        TOKENS=tokens,
        GROUP=group,
        KV_HEADS=kv_heads,
        SLOTS=slots,
        D=d,
        BLOCK_D=block_d,
        **parameters,
    )
    if parts > 1:
        _merge_parts_kernel[(rows * heads,)](
            part_outs,
            part_lses,
            out,
            log_sum_exp,
            parts,
            WITH_LSE=log_sum_exp is not None,
            D=d,
            BLOCK_D=block_d,
            **tuning.choose("decode_attention_merge", block_d),
        )
    return out


def decode_workspace_size(
    sequences: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int = 1,
    tuning: Tuning | None = None,
) -> int:
    """How many float32 elements of workspace `decode_attention` takes at most, for up to so many sequences of up to so
    many tokens.

    sequences, tokens: S and N at most.
    heads, kv_heads, head_size: A, K and D.
    dtype, device: the queries'.
    """
    tuning = tuning or Tuning.of(device)
    group = heads // kv_heads
    most = 0
    for n in range(1, tokens + 1):
        parameters = _chosen(tuning, n * group, dtype, padded(head_size))
        tiles = -(-n * group // parameters["BLOCK_M"])
        held = parameters["PROGRAMS"] * tuning.multiprocessors
        for s in range(1, sequences + 1):
            parts = _parts(s * tiles * kv_heads, held)
            most = max(most, s * n * heads * parts * (head_size + 1) if parts > 1 else 0)
    return most


def _parts(programs: int, held: int) -> int:
    """How many parts the keys are divided into, when there are so many programs for one part and so many are held at
    once: as many as are held, or, where those are hardly more, enough to fill the device a few times."""
    wanted = held // programs if 2 * programs <= held else -(-_WAVES * held // programs)
    return min(wanted, _MAX_PARTS)


def _chosen(tuning: Tuning, rows: int, dtype: torch.dtype, block_d: int) -> Parameters:
    if dtype == torch.float32:
        return tuning.choose("decode_attention_float32", block_d)
    parameters = tuning.choose("decode_attention", block_d)
    return parameters if rows <= parameters["BLOCK_M"] else tuning.choose("decode_attention_wide", block_d)
