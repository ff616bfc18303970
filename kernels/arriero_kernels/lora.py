"""Low-rank adapters for batches that mix them: out += (x @ A.T) @ B.T * scaling, each token with its own adapter's.

Legend: T tokens, N outputs, K inputs, L adapters, R rank, S splits of K. Tuned by T. Source: Hu et al., "LoRA: Low-Rank
Adaptation of Large Language Models" (2021).

A program takes a tile of tokens and goes through the adapters that occur in it, in their order, with the other tokens
masked: one adapter where a prompt fills the tile, each once where requests are mixed. The grid depends on T alone, the
map from tokens to adapters is read on the device: both kernels may be captured in CUDA graphs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arriero_kernels.checks import expect, expect_2d
from arriero_kernels.numerics import cast, dot, narrow, widen
from arriero_kernels.tuning import Tuning

_HALF = (torch.bfloat16, torch.float16)
_WIDE = 64
"""Larger ranks have launch parameters of their own."""
_NONE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _next(adapter_T, last):
    """The lowest adapter above `last` in the tile, or _NONE."""
    return tl.min(tl.where(adapter_T > last, adapter_T, _NONE), 0)


@triton.jit(do_not_specialize=["t", "steps"])
def _shrink_kernel(
    x,
    a,
    adapters,
    sums,
    t,
    k,
    steps,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sums [S, T, R] float32 = x @ A.T over `steps` blocks of K; not written for tokens without an adapter."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    adapter_T = tl.load(adapters + row, mask=row < t, other=-1)
    rank = tl.arange(0, BLOCK_R)
    inside = tl.arange(0, BLOCK_K)
    x_T = x + row.to(tl.int64) * k
    acc = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    adapter = _next(adapter_T, -1)
    while adapter < _NONE:
        a_R = a + (adapter.to(tl.int64) * RANK + rank) * k
        mine = adapter_T == adapter
        for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(k, BLOCK_K))):
            column = step * BLOCK_K + inside
            x_tile = tl.load(x_T[:, None] + column[None, :], mask=mine[:, None] & (column < k)[None, :], other=0.0)
            a_tile = tl.load(
                a_R[:, None] + column[None, :], mask=(rank < RANK)[:, None] & (column < k)[None, :], other=0.0
            )
            acc = dot(x_tile, a_tile.T, acc)
        adapter = _next(adapter_T, adapter)
    place = sums + (split.to(tl.int64) * t + row)[:, None] * RANK + rank[None, :]
    tl.store(place, acc, mask=(adapter_T >= 0)[:, None] & (rank < RANK)[None, :])


@triton.jit(do_not_specialize=["t", "splits"])
def _expand_kernel(
    sums,
    b,
    adapters,
    scaling,
    out,
    t,
    n,
    stride,
    splits,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out += (sums added up over S) @ B.T * scaling."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = tl.arange(0, BLOCK_R)
    adapter_T = tl.load(adapters + row, mask=row < t, other=-1)
    adapter = _next(adapter_T, -1)
    if adapter < _NONE:
        mask = (adapter_T >= 0)[:, None] & (rank < RANK)[None, :]
        place = sums + row.to(tl.int64)[:, None] * RANK + rank[None, :]
        h = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
        for _ in range(splits):
            h += tl.load(place, mask=mask, other=0.0)
            place += t.to(tl.int64) * RANK
        acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        while adapter < _NONE:
            b_N = b + (adapter.to(tl.int64) * n + column) * RANK
            b_tile = tl.load(
                b_N[:, None] + rank[None, :], mask=(column < n)[:, None] & (rank < RANK)[None, :], other=0.0
            )
            mine = cast(tl.where((adapter_T == adapter)[:, None], h, 0.0), b.dtype.element_ty)
            acc += dot(mine, b_tile.T) * tl.load(scaling + adapter)
            adapter = _next(adapter_T, adapter)
        place = out + row.to(tl.int64)[:, None] * stride + column[None, :]
        mask = (adapter_T >= 0)[:, None] & (column < n)[None, :]
        y = widen(tl.load(place, mask=mask, other=0.0)) + acc
        tl.store(place, narrow(y, out.dtype.element_ty), mask=mask)


def lora_add(
    out_TN: torch.Tensor,
    x_TK: torch.Tensor,
    adapters_T: torch.Tensor,
    a_LRK: torch.Tensor,
    b_LNR: torch.Tensor,
    scaling_L: torch.Tensor,
    *,
    tuning: Tuning | None = None,
) -> torch.Tensor:
    """out[t] += (x[t] @ a[l].T) @ b[l].T * scaling[l] with l = adapters[t], in place.

    out_TN: [T, N] of x's dtype; rows may lie further apart than N: some columns of a fused layer's output.
    x_TK: [T, K] bfloat16 or float16, contiguous.
    adapters_T: int32 [T], on the device: below L; negative for tokens without an adapter, whose rows stay as they are.
    a_LRK: [L, R, K] of x's dtype, contiguous. Adapters of a lower rank than R are filled up with zeros.
    b_LNR: [L, N, R] likewise.
    scaling_L: float32 [L]: alpha / rank.

    Sums are float32; x @ a.T is rounded to x's dtype once. Returns out_TN. Raises ValueError for other shapes, dtypes,
    devices or strides.
    """
    t, k = expect_2d("x_TK", x_TK, _HALF)
    device, dtype = x_TK.device, (x_TK.dtype,)
    if a_LRK.dim() != 3 or b_LNR.dim() != 3:
        raise ValueError(
            f"a_LRK and b_LNR have shapes {list(a_LRK.shape)} and {list(b_LNR.shape)}, expected three dimensions"
        )
    adapters, rank = a_LRK.shape[:2]
    n = b_LNR.shape[1]
    expect("a_LRK", a_LRK, (adapters, rank, k), dtype, device)
    expect("b_LNR", b_LNR, (adapters, n, rank), dtype, device)
    expect("scaling_L", scaling_L, (adapters,), (torch.float32,), device)
    expect("adapters_T", adapters_T, (t,), (torch.int32,), device)
    if out_TN.shape != (t, n) or out_TN.dtype != x_TK.dtype or out_TN.device != device or out_TN.stride(1) != 1:
        raise ValueError(
            f"out_TN is {str(out_TN.dtype).removeprefix('torch.')} {list(out_TN.shape)} with strides "
            f"{list(out_TN.stride())} on {out_TN.device}, expected {[t, n]} like x_TK, with neighbouring columns"
        )
    if not 0 < rank <= 256:
        raise ValueError(f"the rank is {rank}, expected 1 to 256")
    if t == 0 or n == 0 or adapters == 0:
        return out_TN
    tuning = tuning or Tuning.of(device)
    block_r = max(16, triton.next_power_of_2(rank))
    kind = "_wide" if rank > _WIDE else ""
    shrink, expand = dict(tuning.choose(f"lora_shrink{kind}", t)), tuning.choose(f"lora_expand{kind}", t)
    t_tiles, all_steps = triton.cdiv(t, shrink["BLOCK_T"]), triton.cdiv(k, shrink["BLOCK_K"])
    wanted = max(1, min(shrink.pop("SPLITS"), tuning.multiprocessors // t_tiles, all_steps))
    steps = triton.cdiv(all_steps, wanted)
    splits = triton.cdiv(all_steps, steps)
    sums = torch.empty(splits, t, rank, dtype=torch.float32, device=device)
    _shrink_kernel[(t_tiles, splits)](x_TK, a_LRK, adapters_T, sums, t, k, steps, RANK=rank, BLOCK_R=block_r, **shrink)
    _expand_kernel[(triton.cdiv(t, expand["BLOCK_T"]), triton.cdiv(n, expand["BLOCK_N"]))](
        sums,
        b_LNR,
        adapters_T,
        scaling_L,
        out_TN,
        t,
        n,
        out_TN.stride(0),
        splits,
        RANK=rank,
        BLOCK_R=block_r,
        **expand,
    )
    return out_TN
