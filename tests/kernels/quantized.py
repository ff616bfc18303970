"""What quantising operations must give: codes and scales, by PyTorch."""

from __future__ import annotations

import pytest
import torch

from arriero_kernels.quantization import Scaling

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}

each_quantization = pytest.mark.parametrize(
    ("dtype", "scaling"),
    [(dtype, scaling) for dtype in LARGEST for scaling in (Scaling.TENSOR, Scaling.TOKEN, Scaling.GROUP)],
    ids=lambda value: value.name.lower() if isinstance(value, Scaling) else str(value).removeprefix("torch."),
)


def expected_scales(y_TN: torch.Tensor, dtype: torch.dtype, scaling: Scaling, group: int) -> torch.Tensor:
    """float32 [T], or [T, N / group] for GROUP; for TENSOR [1]: one under which the largest values saturate."""
    if scaling is Scaling.TENSOR:
        return (y_TN.abs().amax() if y_TN.numel() else y_TN.new_ones(())).float().reshape(1) / LARGEST[dtype] * 0.8
    y = y_TN.unflatten(1, (-1, group)) if scaling is Scaling.GROUP else y_TN
    return (y.abs().amax(-1) if y.numel() else y.new_zeros(y.shape[:-1])).float().clamp(min=1e-12) / LARGEST[dtype]


def quantized(y_TN: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, scaling: Scaling) -> torch.Tensor:
    """Codes of y under the scales."""
    y = y_TN / wide(scales, scaling, y_TN.shape[1])
    largest = LARGEST[dtype]
    return (y.round() if dtype == torch.int8 else y).clamp(-largest, largest).to(dtype)


def restored(codes_TN: torch.Tensor, scales: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """float64 [T, N]: code * scale."""
    return codes_TN.double() * wide(scales, scaling, codes_TN.shape[1]).double()


def wide(scales: torch.Tensor, scaling: Scaling, n: int) -> torch.Tensor:
    """The scales in a shape that goes with [T, N]."""
    if scaling is Scaling.GROUP:
        return scales.repeat_interleave(n // scales.shape[1], 1) if scales.shape[1] else scales
    return scales if scaling is Scaling.TENSOR else scales[:, None]


def assert_quantized(
    codes_TN: torch.Tensor,
    scales: torch.Tensor,
    exact_TN: torch.Tensor,
    dtype: torch.dtype,
    scaling: Scaling,
    group: int,
) -> None:
    """Codes and scales say what `exact` (float32) does, as nearly as PyTorch's do, which quantises the same values.

    A value on the border of two codes may go either way, as the kernel multiplies by the scale's reciprocal; so the
    error is compared, and codes may differ by a step in one place of a hundred.
    """
    assert codes_TN.dtype == dtype
    assert scales.dtype == torch.float32
    if scaling is not Scaling.TENSOR:
        assert torch.allclose(scales, expected_scales(exact_TN, dtype, scaling, group), rtol=1e-5, atol=0)
    if exact_TN.numel() == 0:
        return
    torchs = quantized(exact_TN, scales, dtype, scaling)
    error = (restored(codes_TN, scales, scaling) - exact_TN.double()).abs()
    allowed = (restored(torchs, scales, scaling) - exact_TN.double()).abs()
    assert error.max() <= 1.001 * allowed.max() + 1e-12
    assert error.mean() <= 1.001 * allowed.mean() + 1e-12
    assert (codes_TN.float() != torchs.float()).float().mean() <= 0.01
