"""Matrix product of float8 activations and float8 weights: W8A8 with scales per tensor, per row or per block.

Legend: T tokens, N outputs, K inputs. Tuned by T. The kernel is in `gemm`. Source of the block scales: DeepSeek-AI,
"DeepSeek-V3 Technical Report" (2024), section 3.3.
"""

from __future__ import annotations

import torch

from arriero_kernels import gemm
from arriero_kernels.tuning import Tuning


def fp8_matmul(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    x_scales: torch.Tensor,
    weight_scales: torch.Tensor,
    *,
    bias_N: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out_TN: torch.Tensor | None = None,
    tuning: Tuning | None = None,
) -> torch.Tensor:
    """(x * x_scales) @ (weight * weight_scales).T + bias, rounded once.

    x_TK: [T, K] float8_e4m3fn, contiguous, 16-byte aligned, K a multiple of 16.
    weight_NK: [N, K] float8_e4m3fn, likewise: as checkpoints hold it.
    x_scales: float32, contiguous: [1] for all, [T], or [T, ceil(K / 128)] for each 128 inputs of a token.
    weight_scales: float32, contiguous: [1] for all or [N], which goes with the first two; with the third
        [ceil(N / 128), ceil(K / 128)], for blocks of 128 outputs by 128 inputs.
    bias_N: [N] bfloat16, float16 or float32, or None.
    dtype: the result's: bfloat16, float16 or float32.
    out_TN: [T, N] of `dtype`, contiguous; made if None.

    Sums are kept in float32; the matrix units add up the products of 128 inputs or more with fewer bits (about 14),
    unless scales are per block, whose sums are added in float32 block by block. Returns out_TN. Raises ValueError for
    other shapes, dtypes, devices or strides.
    """
    return gemm.scaled_matmul(
        "fp8_matmul", x_TK, weight_NK, x_scales, weight_scales, bias_N, torch.float8_e4m3fn, dtype, out_TN, tuning
    )
