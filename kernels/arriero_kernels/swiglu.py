"""SwiGLU's gate, silu(gate) * up, and the quantisation after it.

Legend: T tokens, I intermediate size. Source: Shazeer, "GLU Variants Improve Transformer" (2020).
`silu_mul` is tuned by I, `silu_mul_quantized` as well: it keeps a whole row in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arriero_kernels.checks import FLOATS, expect, expect_2d
from arriero_kernels.numerics import narrow, store_row, widen
from arriero_kernels.quantization import Scaling, quantized_outputs
from arriero_kernels.tuning import Tuning


@triton.jit
def _silu_mul(gate_up, n, column, mask):
    gate = widen(tl.load(gate_up + column, mask=mask, other=0.0))
    up = widen(tl.load(gate_up + n + column, mask=mask, other=0.0))
    small = tl.exp(-tl.abs(gate))  # of the negative size, so that nothing overflows
    return gate * (tl.where(gate < 0, small, 1.0) / (1.0 + small)) * up


@triton.jit
def _silu_mul_kernel(gate_up, out, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < n
    y = _silu_mul(gate_up + row * 2 * n, n, column, mask)
    tl.store(out + row * n + column, narrow(y, out.dtype.element_ty), mask=mask)


@triton.jit
def _silu_mul_quantized_kernel(
    gate_up, out, scales, n, stride, SCALING: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    y = _silu_mul(gate_up + row * 2 * n, n, column, column < n)
    store_row(y, column, n, out + row * n, scales + row * stride, SCALING, GROUP, BLOCK)


def silu_mul(
    gate_up: torch.Tensor, *, out_TI: torch.Tensor | None = None, tuning: Tuning | None = None
) -> torch.Tensor:
    """silu of the first half of each row, times the second half.

    gate_up: [T, 2 * I] bfloat16, float16 or float32, contiguous.
    out_TI: [T, I] of its dtype, contiguous; made if None.

    Returns out_TI. Raises ValueError for other shapes, dtypes, devices or strides.
    """
    t, i = _sizes(gate_up)
    out_TI = gate_up.new_empty(t, i) if out_TI is None else out_TI
    expect("out_TI", out_TI, (t, i), (gate_up.dtype,), gate_up.device)
    if t == 0:
        return out_TI
    parameters = (tuning or Tuning.of(gate_up.device)).choose("silu_mul", i)
    _silu_mul_kernel[(t, triton.cdiv(i, parameters["BLOCK"]))](gate_up, out_TI, i, **parameters)
    return out_TI


def silu_mul_quantized(
    gate_up: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scaling: Scaling = Scaling.TOKEN,
    scale: torch.Tensor | None = None,
    group: int = 128,
    out_TI: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    tuning: Tuning | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`silu_mul`, its result quantised before it is written, without having been rounded in between.

    gate_up: as in `silu_mul`. The other arguments, and what is returned, are those of
    `quantization.quantized_outputs`. Raises ValueError as both do.
    """
    t, i = _sizes(gate_up)
    out = quantized_outputs(t, i, gate_up.device, dtype, scaling, scale, group, out_TI, scales)
    if t == 0:
        return out.codes_TN, out.scales
    parameters = (tuning or Tuning.of(gate_up.device)).choose("silu_mul_quantized", i)
    _silu_mul_quantized_kernel[(t,)](
        gate_up,
        out.codes_TN,
        out.scales,
        i,
        out.stride,
        SCALING=scaling.value,
        GROUP=out.group,
        BLOCK=triton.next_power_of_2(i),
        **parameters,
    )
    return out.codes_TN, out.scales


def _sizes(gate_up: torch.Tensor) -> tuple[int, int]:
    t, columns = expect_2d("gate_up", gate_up, FLOATS)
    if columns == 0 or columns % 2:
        raise ValueError(f"gate_up has {columns} columns, expected a positive even number")
    return t, columns // 2
