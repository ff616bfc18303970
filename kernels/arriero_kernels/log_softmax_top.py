"""Log-probabilities of a row's token and of its highest ones, without the row's log-softmax.

Legend: N rows, V vocabulary, K highest tokens. Tuned by V.

Tokens are ordered by logit, highest first, ties by id, as the cpu backend's are. A row is divided into chunks, each
held in registers: its sum, its highest tokens and how much of it comes before the asked token; then put together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arriero_kernels.checks import FLOATS, INDICES, expect, expect_2d
from arriero_kernels.numerics import widen
from arriero_kernels.ordering import NOTHING, packed, score_of, token_of
from arriero_kernels.tuning import Tuning

MOST = 20
"""Of the highest tokens."""


@triton.jit(do_not_specialize=["top_k"])  # which varies from step to step: nothing is compiled while serving
def _chunk_kernel(
    logits,
    tokens,
    highest,
    sums,
    before,
    pairs,
    top_k,
    V: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A chunk's highest logit, sum of exponentials against it, tokens before the asked one, top_k highest tokens."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = row * SPLITS + split
    asked = tl.load(tokens + row).to(tl.int64)
    x_asked = widen(tl.load(logits + row * V + asked))
    token = split * BLOCK + tl.arange(0, BLOCK)
    present = token < V
    x = widen(tl.load(logits + row * V + token, mask=present, other=float("-inf")))
    earlier = (x > x_asked) | ((x == x_asked) & (token < asked))
    top = tl.max(x, 0)
    shift = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    tl.store(highest + part, top)
    tl.store(sums + part, tl.sum(tl.exp(tl.minimum(x - shift, 0.0)), 0))
    tl.store(before + part, tl.sum((present & earlier).to(tl.int32), 0))
    pair = tl.where(present, packed(x, token), NOTHING)
    for k in range(top_k):
        best = tl.max(pair, 0)
        tl.store(pairs + part * top_k + k, best)
        pair = tl.where(pair == best, NOTHING, pair)


@triton.jit(do_not_specialize=["top_k"])
def _join_kernel(
    logits,
    tokens,
    highest,
    sums,
    before,
    pairs,
    ids,
    values,
    top_k,
    V: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    mask = part < SPLITS
    tops = tl.load(highest + row * SPLITS + part, mask=mask, other=float("-inf"))
    top = tl.max(tops, 0)
    finite = tl.abs(top) < float("inf")
    # A chunk that is infinitely lower, or of a row that is infinitely high, adds nothing.
    scale = tl.where(tl.abs(tops) < float("inf"), tl.exp(tl.where(finite, tops, 0.0) - tl.where(finite, top, 0.0)), 0.0)
    total = tl.sum(tl.load(sums + row * SPLITS + part, mask=mask, other=0.0) * scale, 0)
    total = top + tl.where(finite, tl.log(tl.where(finite, total, 1.0)), 0.0)
    asked = tl.load(tokens + row).to(tl.int64)
    tl.store(ids + row * (top_k + 2), asked)
    tl.store(ids + row * (top_k + 2) + 1, tl.sum(tl.load(before + row * SPLITS + part, mask=mask, other=0), 0) + 1)
    tl.store(values + row * (top_k + 1), widen(tl.load(logits + row * V + asked)) - total)
    place = tl.arange(0, PAIRS)
    pair = tl.load(pairs + row * SPLITS * top_k + place, mask=place < SPLITS * top_k, other=NOTHING)
    for k in range(top_k):
        best = tl.max(pair, 0)
        tl.store(ids + row * (top_k + 2) + 2 + k, token_of(best))
        tl.store(values + row * (top_k + 1) + 1 + k, score_of(best) - total)
        pair = tl.where(pair == best, NOTHING, pair)


def log_softmax_top(
    logits_NV: torch.Tensor, tokens_N: torch.Tensor, top: int, *, tuning: Tuning | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of each row's token, its rank, and the row's `top` highest tokens with theirs.

    logits_NV: [N, V] bfloat16, float16 or float32, contiguous; without NaN.
    tokens_N: int64 or int32 [N], contiguous, each in [0, V).
    top: K, at most MOST and V; 0 for none.

    Returns (int64 [N, 2 + K]: the token, its rank (1: the most likely), the highest tokens;
    float32 [N, 1 + K]: log-probabilities of the token and of the highest). Raises ValueError for other shapes, dtypes,
    devices, strides or numbers.
    """
    n, v = expect_2d("logits_NV", logits_NV, FLOATS)
    device = logits_NV.device
    expect("tokens_N", tokens_N, (n,), INDICES, device)
    if not 0 <= top <= min(MOST, v):
        raise ValueError(f"top is {top}, expected 0 to {min(MOST, v)}: of {v} tokens, at most {MOST}")
    ids = torch.empty(n, 2 + top, dtype=torch.int64, device=device)
    values = torch.empty(n, 1 + top, dtype=torch.float32, device=device)
    if n == 0:
        return ids, values
    if v == 0:
        raise ValueError("logits_NV has no columns: there is no token to ask for")
    tuning = tuning or Tuning.of(device)
    parameters = tuning.choose("log_softmax_top", v)
    splits = triton.cdiv(v, parameters["BLOCK"])
    highest, sums = torch.empty(2, n, splits, dtype=torch.float32, device=device).unbind()
    before = torch.empty(n, splits, dtype=torch.int32, device=device)
    pairs = torch.empty(n, splits, top, dtype=torch.int64, device=device)
    found = (logits_NV, tokens_N, highest, sums, before, pairs)
    _chunk_kernel[(n, splits)](*found, top, V=v, SPLITS=splits, **parameters)
    _join_kernel[(n,)](
        *found,
        ids,
        values,
        top,
        V=v,
        SPLITS=splits,
        PARTS=triton.next_power_of_2(splits),
        PAIRS=triton.next_power_of_2(splits * MOST),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return ids, values
