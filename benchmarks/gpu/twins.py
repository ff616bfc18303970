"""PyTorch's way to quantise, which several operations' twins end with."""

from __future__ import annotations

import torch

from arriero_kernels.quantization import Scaling

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def quantize(
    y_TN: torch.Tensor, dtype: torch.dtype, scaling: Scaling, scale: torch.Tensor | None, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [T, N], scales) of a float32 or bfloat16 tensor."""
    largest = LARGEST[dtype]
    y = y_TN.float()
    if scaling is Scaling.GROUP:
        y = y.unflatten(1, (-1, group))
    if scale is None:
        wide = y.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest
        scales = wide.squeeze(-1)
    else:
        wide = scales = scale
    y = y / wide
    codes = (y.round() if dtype == torch.int8 else y).clamp(-largest, largest).to(dtype)
    return codes.view(y_TN.shape), scales


def scale_bytes(scaling: Scaling, tokens: int, columns: int, group: int) -> int:
    """What is written of scales."""
    return 4 * {Scaling.TOKEN: tokens, Scaling.GROUP: tokens * columns // group}.get(scaling, 0)
