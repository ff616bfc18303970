"""Quantisation of activations that no fused operation has quantised: what attention returns.

Legend: T tokens, N columns. Tuned by N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arriero_kernels.checks import FLOATS, expect_2d
from arriero_kernels.numerics import store_row, widen
from arriero_kernels.quantization import Scaling, quantized_outputs
from arriero_kernels.tuning import Tuning


@triton.jit
def _quantize_kernel(x, out, scales, n, stride, SCALING: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    y = widen(tl.load(x + row * n + column, mask=column < n, other=0.0))
    store_row(y, column, n, out + row * n, scales + row * stride, SCALING, GROUP, BLOCK)


def quantize(
    x_TN: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scaling: Scaling = Scaling.TOKEN,
    scale: torch.Tensor | None = None,
    group: int = 128,
    out_TN: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    tuning: Tuning | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x / scale, rounded to nearest, ties to even.

    x_TN: [T, N] bfloat16, float16 or float32, contiguous. The other arguments, and what is returned, are those of
    `quantization.quantized_outputs`. Raises ValueError as it does.
    """
    t, n = expect_2d("x_TN", x_TN, FLOATS)
    out = quantized_outputs(t, n, x_TN.device, dtype, scaling, scale, group, out_TN, scales)
    if t == 0:
        return out.codes_TN, out.scales
    parameters = (tuning or Tuning.of(x_TN.device)).choose("quantize", n)
    _quantize_kernel[(t,)](
        x_TN,
        out.codes_TN,
        out.scales,
        n,
        out.stride,
        SCALING=scaling.value,
        GROUP=out.group,
        BLOCK=triton.next_power_of_2(n),
        **parameters,
    )
    return out.codes_TN, out.scales
