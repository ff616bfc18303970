"""Matrix product of bfloat16 or float16 activations and 4-bit weights (W4A16), widened a tile at a time.

Legend: T tokens, N outputs, K inputs, G groups of inputs, P inputs paired. Tuned by T. The weights come from `int4`.

A tile's weights minus their zero points are small whole numbers, exact in the activations' dtype; the scales multiply
the float32 sums of each step along K. So nothing is rounded but the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from arriero_kernels import gemm
from arriero_kernels.checks import FLOATS, expect, expect_2d
from arriero_kernels.int4 import SPAN, WORDS, Int4Weight
from arriero_kernels.numerics import INTERPRET, dot, narrow, widen
from arriero_kernels.tuning import Tuning

_HALF = (torch.bfloat16, torch.float16)
_SPAN = tl.constexpr(SPAN)
_QUARTER = tl.constexpr(SPAN // 4)
_WORDS = tl.constexpr(WORDS)


@triton.jit
def _halves(pair, dtype: tl.constexpr):
    return pair.to(tl.int16).to(dtype, bitcast=True), (pair >> 16).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _difference(pair, zeros, dtype: tl.constexpr):
    """Of both halves of words, which are numbers of `dtype`: one instruction for two."""
    if INTERPRET:
        low, high = _halves(pair, dtype)
        low_zero, high_zero = _halves(zeros, dtype)
        return narrow(widen(low) - widen(low_zero), dtype), narrow(widen(high) - widen(high_zero), dtype)
    else:
        subtract: tl.constexpr = "sub.rn.bf16x2 $0, $1, $2;" if dtype == tl.bfloat16 else "sub.rn.f16x2 $0, $1, $2;"
        pair = tl.inline_asm_elementwise(subtract, "=r,r,r", [pair, zeros], dtype=tl.int32, is_pure=True, pack=1)
        return _halves(pair, dtype)


@triton.jit
def _widened(words, zero, i: tl.constexpr, dtype: tl.constexpr):
    """The i-th quarter of a tile, [N, 2 W] of words [N, W], less the zero points [N, 1]."""
    # The codes become the last bits of 128 (bfloat16) or 1024 (float16), and so do the zero points: exact, and no
    # conversion.
    one: tl.constexpr = 0x43004300 if dtype == tl.bfloat16 else 0x64006400
    pair = (words >> (4 * i) & 0x000F000F) | one
    low, high = _difference(pair, zero | (zero << 16) | one, dtype)
    return tl.reshape(tl.join(low, high), (words.shape[0], 2 * words.shape[1]))


@triton.jit(do_not_specialize=["t", "splits"])
def _int4_matmul_kernel(
    x,
    codes,
    out,
    scales,
    zeros,
    bias,
    t,
    n,
    k,
    group,
    splits,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA_STORE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Tiles one after another, as in `gemm`. A step takes _SPAN inputs, of GROUPS groups, a quarter after another.

    The weight's rows are those of the matrix instructions, which take them from registers, where they were widened.
    """
    t_tiles = tl.cdiv(t, BLOCK_T)
    n_tiles = tl.cdiv(n, BLOCK_N)
    all_steps = tl.cdiv(k, _SPAN)
    steps = tl.cdiv(all_steps, splits)
    for item in tl.range(tl.program_id(0), t_tiles * n_tiles * splits, tl.num_programs(0), flatten=not SPLIT):
        tile_t, tile_n = gemm.tile_at(item // splits, t_tiles, n_tiles, GROUP_T)
        t0 = tile_t * BLOCK_T
        n0 = tile_n * BLOCK_N
        column = n0 + tl.arange(0, BLOCK_N)
        first = (item % splits) * steps if SPLIT else 0
        end = tl.minimum(first + steps, all_steps) if SPLIT else all_steps
        acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
        for step in range(first, end):
            words = codes.load([n0, step * _WORDS])
            for i in tl.static_range(4):
                if i % (4 // GROUPS) == 0:
                    index = (step * _SPAN + i * _QUARTER) // group
                    mask = column < tl.where(index * group < k, n, 0)
                    scale = widen(tl.load(scales + index * n + column, mask=mask, other=0.0))
                    zero = tl.full((BLOCK_N, 1), 8, dtype=tl.int32)
                    if ZEROS:
                        zero = tl.load(zeros + index * n + column, mask=mask, other=0).to(tl.int32)[:, None]
                    part = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
                weight_tile = _widened(words, zero, i, x.dtype)
                x_tile = x.load([t0, step * _SPAN + i * _QUARTER])
                part = dot(weight_tile, x_tile.T, part)
                if i % (4 // GROUPS) == 4 // GROUPS - 1:
                    acc += part * scale[:, None]
        acc = acc.T
        if SPLIT:
            gemm.store_part(acc, out, item % splits, t0, n0, t, n)
        else:
            y = gemm.finish(acc, t0, n0, t, n, scales, scales, bias, 0, 0, True, BIAS)
            gemm.store(y, out, t0, n0, t, n, TMA_STORE)


def int4_matmul(
    x_TK: torch.Tensor,
    weight: Int4Weight,
    *,
    bias_N: torch.Tensor | None = None,
    out_TN: torch.Tensor | None = None,
    tuning: Tuning | None = None,
) -> torch.Tensor:
    """x @ ((codes - zeros) * scales).T + bias, rounded once.

    x_TK: [T, K] bfloat16 or float16, contiguous, 16-byte aligned.
    weight: [N, K], from one of the functions of `int4`, on x's device.
    bias_N: [N] bfloat16, float16 or float32, or None.
    out_TN: [T, N] of x's dtype, contiguous; made if None.

    Returns out_TN. Raises ValueError for other shapes, dtypes, devices or strides.
    """
    t, k = expect_2d("x_TK", x_TK, _HALF)
    n = weight.codes.shape[0]
    device = x_TK.device
    gemm.expect_rows("x_TK", x_TK)
    weight.expect(k, device)
    if bias_N is not None:
        expect("bias_N", bias_N, (n,), FLOATS, device)
    out_TN = torch.empty(t, n, dtype=x_TK.dtype, device=device) if out_TN is None else out_TN
    expect("out_TN", out_TN, (t, n), (x_TK.dtype,), device)
    if not t or not n:
        return out_TN
    tuning = tuning or Tuning.of(device)
    groups = {32: 4, 64: 2}.get(weight.group, 1)
    parameters = dict(tuning.choose("int4_matmul" if groups == 1 else "int4_matmul_fine", t))
    programs, most = parameters.pop("PROGRAMS"), parameters.pop("SPLITS")
    block_t, block_n = parameters["BLOCK_T"], parameters["BLOCK_N"]
    tiles = triton.cdiv(t, block_t) * triton.cdiv(n, block_n)
    splits = gemm.splits_of(tiles, triton.cdiv(k, SPAN), most, tuning.multiprocessors)
    target, tma_store = gemm.target(out_TN, splits, torch.float32, [block_t, block_n])
    _int4_matmul_kernel[(min(tiles * splits, programs * tuning.multiprocessors),)](
        TensorDescriptor.from_tensor(x_TK, [block_t, SPAN // 4]),
        TensorDescriptor.from_tensor(weight.codes, [block_n, WORDS]),
        target,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        out_TN if bias_N is None else bias_N,
        t,
        n,
        k,
        weight.group,
        splits,
        ZEROS=weight.zeros is not None,
        BIAS=bias_N is not None,
        SPLIT=splits > 1,
        TMA_STORE=tma_store,
        GROUPS=groups,
        **parameters,
    )
    if splits > 1:
        gemm.sum_splits(target, out_TN, gemm.Scales(weight.scales, weight.scales, 0, 0, True), bias_N)
    return out_TN
