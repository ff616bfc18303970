"""Matrix product of int8 activations and int8 weights: W8A8 with scales per tensor or per row.

Legend: T tokens, N outputs, K inputs. Tuned by T. The kernel is in `gemm`.
"""

from __future__ import annotations

import torch

from arriero_kernels import gemm
from arriero_kernels.tuning import Tuning


def int8_matmul(
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
    """(x @ weight.T) * x_scales * weight_scales + bias: the product exact in int32, then float32, rounded once.

    x_TK: [T, K] int8, contiguous, 16-byte aligned, K a multiple of 16, less than 2**17.
    weight_NK: [N, K] int8, likewise: as checkpoints hold it.
    x_scales: float32, contiguous: [1] for all, or [T].
    weight_scales: float32, contiguous: [1] for all, or [N].
    bias_N: [N] bfloat16, float16 or float32, or None.
    dtype: the result's: bfloat16, float16 or float32.
    out_TN: [T, N] of `dtype`, contiguous; made if None.

    Returns out_TN. Raises ValueError for other shapes, dtypes, devices or strides.
    """
    if x_TK.dim() == 2 and x_TK.shape[1] >= 1 << 17:
        raise ValueError(
            f"x_TK has rows of {x_TK.shape[1]} values, whose products int32 cannot add up: at most 131,071"
        )
    return gemm.scaled_matmul(
        "int8_matmul", x_TK, weight_NK, x_scales, weight_scales, bias_N, torch.int8, dtype, out_TN, tuning
    )
