"""What launchers ask of their arguments, in one sentence each."""

from __future__ import annotations

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
QUANTIZED = (torch.float8_e4m3fn, torch.int8)
INDICES = (torch.int64, torch.int32)


def expect(
    name: str, x: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raises ValueError unless `x` is contiguous, on the device, and of the shape and one of the dtypes."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected {list(shape)}")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {_plain(x.dtype)}, expected {' or '.join(map(_plain, dtypes))}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, expected {device}")
    if not x.is_contiguous():
        raise ValueError(f"{name} is not contiguous: strides {list(x.stride())} of shape {list(shape)}")


def expect_2d(name: str, x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> tuple[int, int]:
    """The shape of a contiguous matrix of one of the dtypes. Raises ValueError."""
    if x.dim() != 2:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected two dimensions")
    rows, columns = x.shape
    expect(name, x, (rows, columns), dtypes, x.device)
    return rows, columns


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
