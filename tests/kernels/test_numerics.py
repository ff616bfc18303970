"""Conversions inside kernels: to the bit what PyTorch does, in the interpreter as on a device."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.conversions import convert, round_to_whole

N = 1024


def converted(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    target = torch.empty(source.shape, dtype=dtype, device=source.device)
    convert[(source.numel() // N,)](source, target, BLOCK=N)
    return target


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit, but for what NaN looks like."""
    found, expected = found.float(), expected.float()
    number = ~expected.isnan()
    return bool(
        torch.equal(found.isnan(), expected.isnan())
        and torch.equal(found[number], expected[number])
        and torch.equal(found[number].signbit(), expected[number].signbit())
    )


def numbers() -> torch.Tensor:
    """Of every size, with ties, subnormals, zeros, infinities and a NaN."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3 * N, generator=generator) * torch.exp2(torch.randint(-20, 12, (3 * N,), generator=generator))
    ties = torch.arange(-N // 2, N // 2) / 1024.0
    special = torch.tensor([0.0, -0.0, 448.0, 464.0, 465.0, -500.0, 1e9, 3e38, -3e38, 1e-30, 127.5, -127.5])
    return torch.cat([wide, ties, special, torch.full((N - len(special),), float("nan"))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_floats(device: torch.device, dtype: torch.dtype) -> None:
    x = numbers().to(device)
    if dtype == torch.float16:
        x = x.where(x.isnan(), x.clamp(-65504, 65504))  # beyond, the interpreter warns
    assert same(converted(x, dtype), x.to(dtype))


def test_float8(device: torch.device) -> None:
    x = numbers().to(device)
    assert same(converted(x, torch.float8_e4m3fn), x.clamp(-448, 448).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_every_code_is_read(device: torch.device, dtype: torch.dtype) -> None:
    codes = torch.arange(1 << 8 * dtype.itemsize).to({1: torch.uint8, 2: torch.uint16}[dtype.itemsize])
    x = codes.view(dtype).repeat(4).to(device)
    assert same(converted(x, torch.float32), x.float())


def test_int8(device: torch.device) -> None:
    x = numbers()[: 4 * N].to(device)
    assert torch.equal(converted(x, torch.int8), x.round().clamp(-127, 127).to(torch.int8))


def test_rint(device: torch.device) -> None:
    x = (torch.arange(-4 * N, 4 * N) / 4.0).to(device)
    found = torch.empty_like(x)
    round_to_whole[(8,)](x, found, BLOCK=N)
    assert torch.equal(found, x.round())
