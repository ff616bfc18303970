"""RMSNorm, fused with the addition to the residual before it and the quantisation after it.

Legend: T tokens, H hidden size. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
Tuned by H.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arriero_kernels.checks import FLOATS, expect, expect_2d
from arriero_kernels.numerics import narrow, store_row, widen
from arriero_kernels.quantization import Outputs, Scaling, quantized_outputs
from arriero_kernels.tuning import Tuning


@triton.jit
def _rms_norm_kernel(
    residual,
    delta,
    weight,
    out,
    scales,
    eps,
    n,
    stride,
    WITH_DELTA: tl.constexpr,
    SCALING: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < n
    x = widen(tl.load(residual + row * n + column, mask=mask, other=0.0))
    if WITH_DELTA:
        x += widen(tl.load(delta + row * n + column, mask=mask, other=0.0))
        # The norm is that of the residual as it is kept: so a stage that receives it computes the very same.
        kept = narrow(x, residual.dtype.element_ty)
        tl.store(residual + row * n + column, kept, mask=mask)
        x = widen(kept)
    scale = tl.rsqrt(tl.sum(x * x, 0) / n + eps)
    y = x * scale * widen(tl.load(weight + column, mask=mask, other=0.0))
    store_row(y, column, n, out + row * n, scales + row * stride, SCALING, GROUP, BLOCK)


def add_rms_norm(
    residual_TH: torch.Tensor,
    delta_TH: torch.Tensor | None,
    weight_H: torch.Tensor,
    eps: float,
    *,
    out_TH: torch.Tensor | None = None,
    tuning: Tuning | None = None,
) -> torch.Tensor:
    """residual += delta, in place, then residual / sqrt(mean(residual^2) + eps) * weight.

    residual_TH: [T, H] bfloat16, float16 or float32, contiguous; rounded once, after the addition.
    delta_TH: [T, H] of the residual's dtype, contiguous, or None: only the norm.
    weight_H: [H], any of these dtypes.
    out_TH: [T, H] of the residual's dtype, contiguous, not the residual; made if None.

    Returns out_TH. Raises ValueError for other shapes, dtypes, devices or strides.
    """
    t, h = expect_2d("residual_TH", residual_TH, FLOATS)
    out_TH = torch.empty_like(residual_TH) if out_TH is None else out_TH
    expect("out_TH", out_TH, (t, h), (residual_TH.dtype,), residual_TH.device)
    _launch(residual_TH, delta_TH, weight_H, eps, Outputs(out_TH, out_TH, 0, 1), Scaling.NONE, tuning)
    return out_TH


def add_rms_norm_quantized(
    residual_TH: torch.Tensor,
    delta_TH: torch.Tensor | None,
    weight_H: torch.Tensor,
    eps: float,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scaling: Scaling = Scaling.TOKEN,
    scale: torch.Tensor | None = None,
    group: int = 128,
    out_TH: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    tuning: Tuning | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm`, its result quantised before it is written.

    The first arguments are those of `add_rms_norm`; the others, and what is returned, those of
    `quantization.quantized_outputs`. Raises ValueError as both do.
    """
    t, h = expect_2d("residual_TH", residual_TH, FLOATS)
    out = quantized_outputs(t, h, residual_TH.device, dtype, scaling, scale, group, out_TH, scales)
    _launch(residual_TH, delta_TH, weight_H, eps, out, scaling, tuning)
    return out.codes_TN, out.scales


def _launch(
    residual_TH: torch.Tensor,
    delta_TH: torch.Tensor | None,
    weight_H: torch.Tensor,
    eps: float,
    out: Outputs,
    scaling: Scaling,
    tuning: Tuning | None,
) -> None:
    t, h = residual_TH.shape
    if delta_TH is not None:
        expect("delta_TH", delta_TH, (t, h), (residual_TH.dtype,), residual_TH.device)
    expect("weight_H", weight_H, (h,), FLOATS, residual_TH.device)
    if t == 0:
        return
    parameters = (tuning or Tuning.of(residual_TH.device)).choose("rms_norm", h)
    _rms_norm_kernel[(t,)](
        residual_TH,
        delta_TH,
        weight_H,
        out.codes_TN,
        out.scales,
        eps,
        h,
        out.stride,
        WITH_DELTA=delta_TH is not None,
        SCALING=scaling.value,
        GROUP=out.group,
        BLOCK=triton.next_power_of_2(h),
        **parameters,
    )
