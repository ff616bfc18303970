"""Attention among the tokens of a speculated tree, and its merge with the attention to what came before the tree.

Legend: S sequences, N tokens of the tree of each, A query heads, K KV heads, D head size. Source: Miao et al.,
"SpecInfer" (2023), for the tree mask; Dao et al., "Flash-Decoding" (2023), for the merge by log-sum-exp.

A tree is verified in three launches: `paged_attention` or `decode_attention` of its tokens to the prefix in the cache,
not causal; `tree_attention` among themselves; `merge_attention`.

Tuned by N, `tree_attention` and, for float32, `tree_attention_float32`; `merge_attention` by D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arriero_kernels.attention import LN_2, LOG2_E, NOTHING, expect_factors, expect_queries
from arriero_kernels.checks import FLOATS, expect
from arriero_kernels.numerics import cast, dot, narrow, widen
from arriero_kernels.tuning import Tuning

MAX_TOKENS = 64
"""Of a tree: as many as a bit mask has bits."""


@triton.jit
def _tree_attention_kernel(
    queries,
    keys,
    values,
    ancestors,
    out,
    log_sum_exp,
    scale,
    query_stride,
    key_stride,
    value_stride,
    SHARED: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_M rows (a token's heads of the group side by side) of a sequence and a KV head a program.

    All tokens of a tree fit into one tile, so heads of any size are done BLOCK_D columns at a time.
    """
    tiles: tl.constexpr = (TOKENS * GROUP + BLOCK_M - 1) // BLOCK_M
    kv_head = tl.program_id(0) % KV_HEADS
    row = tl.program_id(0) // KV_HEADS % tiles * BLOCK_M
    sequence = (tl.program_id(0) // KV_HEADS // tiles).to(tl.int64)
    m = row + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    present, existing = m < TOKENS * GROUP, n < TOKENS
    token, other = sequence * TOKENS + m // GROUP, sequence * TOKENS + n
    head = kv_head * GROUP + m % GROUP
    query = queries + (token * query_stride + head * D)[:, None]
    key = keys + (other * key_stride)[:, None] + kv_head * D
    value = values + (other * value_stride)[:, None] + kv_head * D

    scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, D, BLOCK_D):
        column = (first + tl.arange(0, BLOCK_D))[None, :]
        q = tl.load(query + column, mask=present[:, None] & (column < D), other=0.0)
        k = tl.load(key + column, mask=existing[:, None] & (column < D), other=0.0)
        scores = dot(q, tl.trans(k), scores)

    if SHARED:
        tree = m // GROUP
    else:
        tree = token
    inside = present[:, None] & existing[None, :]
    if BITS:
        word = tl.load(ancestors + tree, mask=present, other=0)
        seen = inside & (((word[:, None] >> n[None, :].to(tl.int64)) & 1) != 0)
    else:
        seen = tl.load(ancestors + tree[:, None] * TOKENS + n[None, :], mask=inside, other=0) != 0
    scores = tl.where(seen, scores * (scale * LOG2_E), NOTHING)
    top = tl.max(scores, 1)
    p = tl.where(seen, tl.exp2(scores - top[:, None]), 0.0)
    total = tl.sum(p, 1)

    target = token * (KV_HEADS * GROUP) + head
    inverse = 1.0 / tl.where(total > 0.0, total, 1.0)
    p = cast(p, values.dtype.element_ty)
    for first in range(0, D, BLOCK_D):
        column = (first + tl.arange(0, BLOCK_D))[None, :]
        v = tl.load(value + column, mask=existing[:, None] & (column < D), other=0.0)
        y = dot(p, v) * inverse[:, None]
        mask = present[:, None] & (column < D)
        tl.store(out + target[:, None] * D + column, narrow(y, out.dtype.element_ty), mask=mask)
    lse = tl.where(total > 0.0, (top - tl.log2(inverse)) * LN_2, float("-inf"))
    tl.store(log_sum_exp + target, lse, mask=present)


@triton.jit(do_not_specialize=["rows"])  # which varies from step to step: nothing is compiled while serving
def _merge_attention_kernel(
    out_a, lse_a, out_b, lse_b, out, log_sum_exp, rows, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    present = row < rows
    mask = present[:, None] & (column < D)[None, :]
    a = tl.load(lse_a + row, mask=present, other=0.0)
    b = tl.load(lse_b + row, mask=present, other=0.0)
    top = tl.maximum(a, b)
    some = top > float("-inf")
    top = tl.where(some, top, 0.0)
    weight_a, weight_b = tl.exp(a - top), tl.exp(b - top)
    total = tl.where(some, weight_a + weight_b, 1.0)
    offset = row[:, None] * D + column[None, :]
    # A part of no weight may hold anything.
    y_a = widen(tl.load(out_a + offset, mask=mask & (weight_a > 0.0)[:, None], other=0.0))
    y_b = widen(tl.load(out_b + offset, mask=mask & (weight_b > 0.0)[:, None], other=0.0))
    y = y_a * (weight_a / total)[:, None] + y_b * (weight_b / total)[:, None]
    tl.store(out + offset, narrow(y, out.dtype.element_ty), mask=mask)
    tl.store(log_sum_exp + row, tl.where(some, top + tl.log(total), float("-inf")), mask=present)


def tree_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    ancestors: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor | None = None,
    log_sum_exp: torch.Tensor | None = None,
    tuning: Tuning | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * queries @ keys^T) @ values, of the tokens of a tree over those that their mask lets them see.

    queries: [S * N, A, D] bfloat16, float16 or float32, a sequence's tokens one after the other. A is a multiple of K,
        D even and at most 256, N at most 64.
    keys, values: [S * N, K, D] of the queries' dtype, keys already turned by their positions.
        Of all three, the heads of a row lie side by side, rows may lie apart (views of qkv).
    ancestors: which tokens a token sees, itself among them if it is to. bool [N, N] or [S, N, N]: [..., i, j] says
        whether token i sees token j. Or int64 [N] or [S, N]: bit j of word i says so. Contiguous; without S, the same
        tree for all sequences.
    scale: of the scores, positive.
    out: [S * N, A, D] of the queries' dtype, contiguous; made if None.
    log_sum_exp: float32 [S * N, A], contiguous; made if None. Of the scores, natural; -inf, and zeros in out, for a
        token that sees none.

    Returns (out, log_sum_exp). Raises ValueError for other shapes, dtypes, devices or strides.
    """
    if queries.dtype not in FLOATS:
        raise ValueError(f"queries is {queries.dtype}, expected one of {', '.join(map(str, FLOATS))}")
    if keys.dim() != 3 or keys.shape[1] == 0:
        raise ValueError(f"keys has shape {list(keys.shape)}, expected [tokens, KV heads, head size]")
    kv_heads, d = keys.shape[1:]
    rows, heads = expect_queries(queries, kv_heads, d)
    device = queries.device
    if d % 2 or d > 256:
        raise ValueError(f"the head size is {d}, expected an even number up to 256")
    for name, x in (("keys", keys), ("values", values)):
        if x.shape != (rows, kv_heads, d) or x.dtype != queries.dtype or x.device != device:
            raise ValueError(
                f"{name} is {x.dtype} {list(x.shape)} on {x.device}, expected {queries.dtype} "
                f"{[rows, kv_heads, d]} on {device}"
            )
        if (x.stride(1), x.stride(2)) != (d, 1):
            raise ValueError(f"the heads of a row of {name} lie apart: strides {list(x.stride())}")
    tokens, shared = _tree(ancestors, rows, device)
    expect_factors(scale, None)
    if out is None:
        out = torch.empty((rows, heads, d), dtype=queries.dtype, device=device)
    expect("out", out, (rows, heads, d), (queries.dtype,), device)
    if log_sum_exp is None:
        log_sum_exp = torch.empty((rows, heads), dtype=torch.float32, device=device)
    expect("log_sum_exp", log_sum_exp, (rows, heads), (torch.float32,), device)
    if rows == 0:
        return out, log_sum_exp
    setting = "tree_attention_float32" if queries.dtype == torch.float32 else "tree_attention"
    parameters = (tuning or Tuning.of(device)).choose(setting, tokens)
    group = heads // kv_heads
    tiles = triton.cdiv(tokens * group, parameters["BLOCK_M"])
    _tree_attention_kernel[(rows // tokens * tiles * kv_heads,)](
        queries,
        keys,
        values,
        ancestors if ancestors.dtype == torch.int64 else ancestors.view(torch.uint8),
        out,
        log_sum_exp,
        scale,
        queries.stride(0),
        keys.stride(0),
        values.stride(0),
        SHARED=shared,
        BITS=ancestors.dtype == torch.int64,
        TOKENS=tokens,
        GROUP=group,
        KV_HEADS=kv_heads,
        D=d,
        BLOCK_N=max(16, triton.next_power_of_2(tokens)),
        **parameters,
    )
    return out, log_sum_exp


def merge_attention(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    log_sum_exp: torch.Tensor | None = None,
    tuning: Tuning | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention to two sets of keys, of the attention to each.

    out_a, out_b: [T, A, D] bfloat16, float16 or float32, contiguous, of one dtype.
    lse_a, lse_b: float32 [T, A], contiguous: the log-sum-exps of their scores. Where one is -inf, what the output
        beside it holds is ignored; where both are, the merged output is zeros.
    out: like out_a, made if None; may be out_a or out_b.
    log_sum_exp: like lse_a, made if None; may be lse_a or lse_b.

    Returns (out, log_sum_exp). Raises ValueError for other shapes, dtypes, devices or strides.
    """
    if out_a.dim() != 3:
        raise ValueError(f"out_a has shape {list(out_a.shape)}, expected [tokens, query heads, head size]")
    tokens, heads, d = out_a.shape
    out = torch.empty_like(out_a) if out is None else out
    log_sum_exp = torch.empty_like(lse_a) if log_sum_exp is None else log_sum_exp
    expect("out_a", out_a, (tokens, heads, d), FLOATS, out_a.device)
    for name, x in (("out_b", out_b), ("out", out)):
        expect(name, x, (tokens, heads, d), (out_a.dtype,), out_a.device)
    for name, x in (("lse_a", lse_a), ("lse_b", lse_b), ("log_sum_exp", log_sum_exp)):
        expect(name, x, (tokens, heads), (torch.float32,), out_a.device)
    if out_a.numel() == 0:
        return out, log_sum_exp
    parameters = (tuning or Tuning.of(out_a.device)).choose("merge_attention", d)
    _merge_attention_kernel[(triton.cdiv(tokens * heads, parameters["BLOCK_R"]),)](
        out_a,
        lse_a,
        out_b,
        lse_b,
        out,
        log_sum_exp,
        tokens * heads,
        D=d,
        BLOCK_D=triton.next_power_of_2(d),
        **parameters,
    )
    return out, log_sum_exp


def _tree(ancestors: torch.Tensor, rows: int, device: torch.device) -> tuple[int, bool]:
    """(N, whether all sequences have the same tree). Raises ValueError."""
    own = 2 if ancestors.dtype == torch.bool else 1
    if ancestors.dtype not in (torch.bool, torch.int64) or ancestors.dim() not in (own, own + 1):
        raise ValueError(
            f"ancestors is {ancestors.dtype} {list(ancestors.shape)}, expected bool [N, N] or [S, N, N], or int64 [N] "
            "or [S, N]"
        )
    tokens = ancestors.shape[-1]
    if not 1 <= tokens <= MAX_TOKENS or rows % tokens:
        raise ValueError(
            f"ancestors are of {tokens} tokens, expected 1 to {MAX_TOKENS} that divide the {rows} rows of queries"
        )
    shared = ancestors.dim() == own
    shape = (tokens,) * own if shared else (rows // tokens, *(tokens,) * own)
    expect("ancestors", ancestors, shape, (ancestors.dtype,), device)
    return tokens, shared
