"""Products of quantised activations and quantised weights: what float8 and int8 have in common.

One persistent kernel: tiles come and go through the tensor memory accelerator, and each program computes one tile after
another. Where tiles are fewer than multiprocessors, several programs share a tile, each with a part of K, and a second
kernel adds up what they found, always in the same order.

Legend: T tokens, N outputs, K inputs, S splits of K. Tuned by T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from arriero_kernels.checks import FLOATS, expect, expect_2d
from arriero_kernels.numerics import dot, narrow, widen
from arriero_kernels.tuning import Tuning

BLOCK = 128
"""Inputs that share a scale of an activation, and inputs and outputs that share one of a weight, where scales are
GROUPED."""

_BLOCK = tl.constexpr(BLOCK)
_SUM_COLUMNS = 1024
_WORTH = 12
_FLOAT32 = (torch.float32,)


@triton.jit
def tile_at(i, t_tiles, n_tiles, GROUP_T: tl.constexpr):
    """Row and column of the i-th tile: GROUP_T rows at a time, so that tiles of the same time share what they read."""
    group = i // (GROUP_T * n_tiles)
    first = group * GROUP_T
    rows = tl.minimum(t_tiles - first, GROUP_T)
    inside = i % (GROUP_T * n_tiles)
    return first + inside % rows, inside // rows


@triton.jit
def finish(
    acc, t0, n0, t, n, x_scales, weight_scales, bias, x_stride, weight_stride, GROUPED: tl.constexpr, BIAS: tl.constexpr
):
    """Scales and bias of a tile's float32 sums, or of their columns from n0 on."""
    row = t0 + tl.arange(0, acc.shape[0])
    column = n0 + tl.arange(0, acc.shape[1])
    y = acc.to(tl.float32)
    if not GROUPED:
        y = y * tl.load(x_scales + row * x_stride, mask=row < t, other=0.0)[:, None]
        y = y * tl.load(weight_scales + column * weight_stride, mask=column < n, other=0.0)[None, :]
    if BIAS:
        y += widen(tl.load(bias + column, mask=column < n, other=0.0))[None, :]
    return y


@triton.jit
def store(y, out, t0, n0, t, n, TMA_STORE: tl.constexpr):
    """A tile of float32, rounded, to a descriptor or a contiguous matrix."""
    if TMA_STORE:
        out.store([t0, n0], narrow(y, out.dtype))
    else:
        row = t0 + tl.arange(0, y.shape[0])
        column = n0 + tl.arange(0, y.shape[1])
        place = out + row.to(tl.int64)[:, None] * n + column[None, :]
        tl.store(place, narrow(y, out.dtype.element_ty), mask=(row < t)[:, None] & (column < n)[None, :])


@triton.jit
def store_part(acc, out, split, t0, n0, t, n):
    """A tile's sums over one part of K, to out [S, T, N] of their dtype."""
    row = t0 + tl.arange(0, acc.shape[0])
    column = n0 + tl.arange(0, acc.shape[1])
    place = out + (split.to(tl.int64) * t + row)[:, None] * n + column[None, :]
    tl.store(place, acc, mask=(row < t)[:, None] & (column < n)[None, :])


@triton.jit(do_not_specialize=["t", "x_stride", "weight_stride", "splits"])
def _scaled_matmul_kernel(
    x,
    weight,
    out,
    x_scales,
    weight_scales,
    bias,
    t,
    n,
    k,
    x_stride,
    weight_stride,
    splits,
    GROUPED: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA_STORE: tl.constexpr,
    HALVES: tl.constexpr,
    SWAP: tl.constexpr,
    GROUP_T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tiles one after another. With SPLIT, one tile's sums over a part of K go to out [S, T, N], neither scaled (if not
    GROUPED) nor rounded. x and weight are descriptors; so is out with TMA_STORE.

    SWAP: the weight's rows are the rows of the matrix instructions, of which a warpgroup's has 64: for fewer tokens.
    """
    acc_dtype: tl.constexpr = tl.int32 if x.dtype == tl.int8 else tl.float32
    t_tiles = tl.cdiv(t, BLOCK_T)
    n_tiles = tl.cdiv(n, BLOCK_N)
    all_steps = tl.cdiv(k, BLOCK_K)
    steps = tl.cdiv(all_steps, splits)
    for item in tl.range(tl.program_id(0), t_tiles * n_tiles * splits, tl.num_programs(0), flatten=not SPLIT):
        tile_t, tile_n = tile_at(item // splits, t_tiles, n_tiles, GROUP_T)
        t0 = tile_t * BLOCK_T
        n0 = tile_n * BLOCK_N
        first = (item % splits) * steps if SPLIT else 0
        end = tl.minimum(first + steps, all_steps) if SPLIT else all_steps
        acc = tl.zeros((BLOCK_N, BLOCK_T) if SWAP else (BLOCK_T, BLOCK_N), dtype=acc_dtype)
        for step in range(first, end):
            x_tile = x.load([t0, step * BLOCK_K])
            weight_tile = weight.load([n0, step * BLOCK_K])
            left = weight_tile if SWAP else x_tile
            right = x_tile.T if SWAP else weight_tile.T
            if GROUPED:
                row = t0 + tl.arange(0, BLOCK_T)
                scale = tl.load(x_scales + row * x_stride + step, mask=row < t, other=0.0)
                scale *= tl.load(weight_scales + (n0 // _BLOCK) * weight_stride + step)
                acc += dot(left, right) * (scale[None, :] if SWAP else scale[:, None])
            else:
                acc = dot(left, right, acc)
        if SWAP:
            acc = acc.T
        if SPLIT:
            store_part(acc, out, item % splits, t0, n0, t, n)
        elif HALVES == 2:
            # Half a tile at a time takes half the shared memory on its way out, which is another stage on the way in.
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_T, 2, BLOCK_N // 2)), (0, 2, 1)))
            n1 = n0 + BLOCK_N // 2
            y = finish(left, t0, n0, t, n, x_scales, weight_scales, bias, x_stride, weight_stride, GROUPED, BIAS)
            store(y, out, t0, n0, t, n, TMA_STORE)
            y = finish(right, t0, n1, t, n, x_scales, weight_scales, bias, x_stride, weight_stride, GROUPED, BIAS)
            store(y, out, t0, n1, t, n, TMA_STORE)
        else:
            y = finish(acc, t0, n0, t, n, x_scales, weight_scales, bias, x_stride, weight_stride, GROUPED, BIAS)
            store(y, out, t0, n0, t, n, TMA_STORE)


@triton.jit(do_not_specialize=["t", "x_stride", "weight_stride", "splits"])
def _sum_splits_kernel(
    sums,
    out,
    x_scales,
    weight_scales,
    bias,
    t,
    n,
    x_stride,
    weight_stride,
    splits,
    GROUPED: tl.constexpr,
    BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """COLUMNS columns of one row a program: sums [S, T, N] added up over S, scaled and rounded."""
    row = tl.program_id(0)
    n0 = tl.program_id(1) * COLUMNS
    column = n0 + tl.arange(0, COLUMNS)
    acc = tl.zeros((COLUMNS,), dtype=sums.dtype.element_ty)
    place = sums + row.to(tl.int64) * n + column
    for _ in range(splits):
        acc += tl.load(place, mask=column < n, other=0)
        place += t.to(tl.int64) * n
    y = finish(acc[None, :], row, n0, t, n, x_scales, weight_scales, bias, x_stride, weight_stride, GROUPED, BIAS)
    store(y, out, row, n0, t, n, False)


class Scales(NamedTuple):
    """How a kernel finds the scales, all of them float32."""

    x: torch.Tensor
    weight: torch.Tensor
    x_stride: int
    """From token to token; 0 where all share one."""
    weight_stride: int
    """From output to output, or from block to block of them; 0 where all share one."""
    grouped: bool
    """x's are [T, K / BLOCK] and the weight's [N / BLOCK, K / BLOCK], rounded up."""


def expect_rows(name: str, x: torch.Tensor) -> None:
    """Raises ValueError unless the tensor memory accelerator can load tiles of the matrix."""
    columns = x.shape[1]
    if columns == 0 or columns * x.element_size() % 16 or x.data_ptr() % 16:
        raise ValueError(
            f"{name} has rows of {columns} {x.element_size()}-byte values, expected rows, and a first one, "
            "that begin at multiples of 16 bytes"
        )


def plain_scales(x_scales: torch.Tensor, weight_scales: torch.Tensor, t: int, n: int, device: torch.device) -> Scales:
    """Per tensor ([1]) or per row ([T], [N]), checked. Raises ValueError."""
    expect("x_scales", x_scales, (1,) if x_scales.shape == (1,) else (t,), _FLOAT32, device)
    expect("weight_scales", weight_scales, (1,) if weight_scales.shape == (1,) else (n,), _FLOAT32, device)
    return Scales(x_scales, weight_scales, int(x_scales.numel() > 1), int(weight_scales.numel() > 1), False)


def block_scales(
    x_scales: torch.Tensor, weight_scales: torch.Tensor, t: int, n: int, k: int, device: torch.device
) -> Scales:
    """x's per BLOCK inputs of a token, the weight's per BLOCK x BLOCK, checked. Raises ValueError."""
    blocks = triton.cdiv(k, BLOCK)
    expect("x_scales", x_scales, (t, blocks), _FLOAT32, device)
    expect("weight_scales", weight_scales, (triton.cdiv(n, BLOCK), blocks), _FLOAT32, device)
    return Scales(x_scales, weight_scales, blocks, blocks, True)


def splits_of(tiles: int, steps: int, most: int, multiprocessors: int) -> int:
    """Among how many programs the steps along K of each tile are divided: until the device is full, at most `most`.

    A part has at least four steps, none is empty, and what is saved must be worth the second kernel, which takes about
    as long as _WORTH steps.
    """
    wanted = max(1, min(most, multiprocessors // tiles, steps // 4))
    each = triton.cdiv(steps, wanted)
    return triton.cdiv(steps, each) if steps - each >= _WORTH else 1


def scaled_matmul(
    op: str,
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    x_scales: torch.Tensor,
    weight_scales: torch.Tensor,
    bias_N: torch.Tensor | None,
    codes: torch.dtype,
    dtype: torch.dtype,
    out_TN: torch.Tensor | None,
    tuning: Tuning | None,
) -> torch.Tensor:
    """What `fp8_matmul` and `int8_matmul` are: their arguments, of dtype `codes`, checked, and the kernels launched.

    Takes the launch parameters of `op`, or of `op`_grouped where x has two-dimensional scales. In the table, PROGRAMS
    are those that a multiprocessor holds at a time, SPLITS the most parts that K is cut into. Raises ValueError.
    """
    t, k = expect_2d("x_TK", x_TK, (codes,))
    device = x_TK.device
    n = expect_2d("weight_NK", weight_NK, (codes,))[0]
    expect("weight_NK", weight_NK, (n, k), (codes,), device)
    expect_rows("x_TK", x_TK)
    expect_rows("weight_NK", weight_NK)
    grouped = x_scales.dim() == 2 and codes == torch.float8_e4m3fn
    scales = (
        block_scales(x_scales, weight_scales, t, n, k, device)
        if grouped
        else plain_scales(x_scales, weight_scales, t, n, device)
    )
    if bias_N is not None:
        expect("bias_N", bias_N, (n,), FLOATS, device)
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}, expected bfloat16 or float16 or float32")
    out_TN = torch.empty(t, n, dtype=dtype, device=device) if out_TN is None else out_TN
    expect("out_TN", out_TN, (t, n), (dtype,), device)
    if t and n:
        _launch(f"{op}_grouped" if grouped else op, x_TK, weight_NK, scales, bias_N, out_TN, tuning)
    return out_TN


def _launch(
    op: str,
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    scales: Scales,
    bias_N: torch.Tensor | None,
    out_TN: torch.Tensor,
    tuning: Tuning | None,
) -> None:
    (t, k), n = x_TK.shape, weight_NK.shape[0]
    tuning = tuning or Tuning.of(x_TK.device)
    parameters = dict(tuning.choose(op, t))
    programs, most = parameters.pop("PROGRAMS"), parameters.pop("SPLITS")
    block_t, block_n, block_k = (parameters[name] for name in ("BLOCK_T", "BLOCK_N", "BLOCK_K"))
    tiles = triton.cdiv(t, block_t) * triton.cdiv(n, block_n)
    splits = splits_of(tiles, triton.cdiv(k, block_k), most, tuning.multiprocessors)
    sums = torch.int32 if x_TK.dtype == torch.int8 else torch.float32
    written, tma_store = target(out_TN, splits, sums, [block_t, block_n // parameters["HALVES"]])
    bias = out_TN if bias_N is None else bias_N
    _scaled_matmul_kernel[(min(tiles * splits, programs * tuning.multiprocessors),)](
        TensorDescriptor.from_tensor(x_TK, [block_t, block_k]),
        TensorDescriptor.from_tensor(weight_NK, [block_n, block_k]),
        written,
        scales.x,
        scales.weight,
        bias,
        t,
        n,
        k,
        scales.x_stride,
        scales.weight_stride,
        splits,
        GROUPED=scales.grouped,
        BIAS=bias_N is not None,
        SPLIT=splits > 1,
        TMA_STORE=tma_store,
        **parameters,
    )
    if splits > 1:
        sum_splits(written, out_TN, scales, bias_N)


def target(
    out_TN: torch.Tensor, splits: int, dtype: torch.dtype, tile: list[int]
) -> tuple[torch.Tensor | TensorDescriptor, bool]:
    """What a kernel writes its tiles to, and whether that is a descriptor of them: not where rows are badly aligned,
    and not where K is divided, for whose sums, of `dtype`, memory is made."""
    t, n = out_TN.shape
    if splits > 1:
        return torch.empty(splits, t, n, dtype=dtype, device=out_TN.device), False
    if n * out_TN.element_size() % 16 or out_TN.data_ptr() % 16:
        return out_TN, False
    return TensorDescriptor.from_tensor(out_TN, tile), True


def sum_splits(sums_STN: torch.Tensor, out_TN: torch.Tensor, scales: Scales, bias_N: torch.Tensor | None) -> None:
    """out = sums, added up over S, scaled if they are not yet (not GROUPED), with the bias."""
    splits, t, n = sums_STN.shape
    _sum_splits_kernel[(t, triton.cdiv(n, _SUM_COLUMNS))](
        sums_STN,
        out_TN,
        scales.x,
        scales.weight,
        out_TN if bias_N is None else bias_N,
        t,
        n,
        scales.x_stride,
        scales.weight_stride,
        splits,
        GROUPED=scales.grouped,
        BIAS=bias_N is not None,
        COLUMNS=_SUM_COLUMNS,
        num_warps=4,
        enable_fp_fusion=True,
    )
