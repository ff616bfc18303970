"""How activations are quantised: by which scales, into which tensors. `numerics.store_row` does it."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch

from arriero_kernels.checks import QUANTIZED, expect
from arriero_kernels.numerics import NONE, PER_GROUP, PER_TENSOR, PER_TOKEN


class Scaling(Enum):
    """Which values share a scale. Quantised * scale is the value."""

    NONE = NONE.value
    TENSOR = PER_TENSOR.value
    """All: one scale, given."""
    TOKEN = PER_TOKEN.value
    """Those of a token: found from its largest."""
    GROUP = PER_GROUP.value
    """A token's, `group` after `group`: found from the group's largest."""


class Outputs(NamedTuple):
    """Where `numerics.store_row` writes, and how it groups."""

    codes_TN: torch.Tensor
    scales: torch.Tensor
    stride: int
    """Scales in a row of them: what a kernel steps by from token to token."""
    group: int
    """Columns that share a scale, for GROUP; else 1."""


def quantized_outputs(
    t: int,
    n: int,
    device: torch.device,
    dtype: torch.dtype,
    scaling: Scaling,
    scale: torch.Tensor | None,
    group: int,
    out_TN: torch.Tensor | None,
    scales: torch.Tensor | None,
) -> Outputs:
    """What an operation with T rows of N columns writes to, checked, or made where None is given.

    dtype: float8_e4m3fn or int8; both saturate.
    scaling: TENSOR, TOKEN or GROUP.
    scale: float32 [1], on the device; for TENSOR, and only for it.
    group: for GROUP: a power of two that divides N.
    out_TN: [T, N] of `dtype`, contiguous.
    scales: float32, contiguous: [T] for TOKEN, [T, N / group] for GROUP. Not for TENSOR.

    The outputs' scales are `scale` for TENSOR. Raises ValueError.
    """
    if dtype not in QUANTIZED:
        raise ValueError(f"dtype is {dtype}, expected float8_e4m3fn or int8")
    if scaling is Scaling.NONE:
        raise ValueError("scaling is NONE: quantising needs a scale")
    if (scale is not None) != (scaling is Scaling.TENSOR):
        raise ValueError(f"scaling is {scaling.name}: a scale is given with TENSOR, and only with it")
    if scaling is Scaling.GROUP and (group < 1 or group & (group - 1) or n % group):
        raise ValueError(f"group is {group}, expected a power of two that divides the row's {n} columns")
    out_TN = torch.empty(t, n, dtype=dtype, device=device) if out_TN is None else out_TN
    expect("out", out_TN, (t, n), (dtype,), device)
    if scale is not None:
        if scales is not None:
            raise ValueError("scales are written for TOKEN and GROUP, not for TENSOR")
        expect("scale", scale, (1,), (torch.float32,), device)
        return Outputs(out_TN, scale, 0, 1)
    shape = (t, n // group) if scaling is Scaling.GROUP else (t,)
    scales = torch.empty(shape, dtype=torch.float32, device=device) if scales is None else scales
    expect("scales", scales, shape, (torch.float32,), device)
    return Outputs(out_TN, scales, *((n // group, group) if scaling is Scaling.GROUP else (1, 1)))
