"""int8 by int8: exact until the scales."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.tensors import DTYPES, drawn
from tests.kernels.tolerance import assert_as_good

from arriero_kernels.int8_matmul import int8_matmul
from arriero_kernels.tuning import Tuning

SHAPES = [(1, 64, 128), (3, 40, 208), (17, 130, 144), (70, 24, 16), (5, 1, 256)]
"""Tokens, outputs, inputs."""


def codes(*shape: int, device: torch.device, seed: int) -> torch.Tensor:
    """All of int8, -128 as well."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8).to(device)


def sums(x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """x @ weight.T, int64, on the CPU, as devices have no such product."""
    return (x_TK.cpu().long() @ weight_NK.cpu().long().T).to(x_TK.device)


def one(device: torch.device) -> torch.Tensor:
    return torch.ones(1, device=device)


@pytest.mark.parametrize(("t", "n", "k"), SHAPES)
def test_sums_are_exact(device: torch.device, t: int, n: int, k: int) -> None:
    x, weight = codes(t, k, device=device, seed=0), codes(n, k, device=device, seed=1)
    found = int8_matmul(x, weight, one(device), one(device), dtype=torch.float32)
    assert torch.equal(found.long(), sums(x, weight))


@pytest.mark.parametrize("size", [16, 32, 64, 512, 8192])
def test_every_row_of_the_table_is_exact(device: torch.device, size: int) -> None:
    row = dict(Tuning.of(device).choose("int8_matmul", size))
    del row["enable_fp_fusion"]
    x = codes(min(150, 2 * row["BLOCK_T"] + 5), 272, device=device, seed=0)
    weight = codes(row["BLOCK_N"] + 24, 272, device=device, seed=1)
    tuning = Tuning.of(device).using("int8_matmul", **row)
    found = int8_matmul(x, weight, one(device), one(device), dtype=torch.float32, tuning=tuning)
    assert torch.equal(found.long(), sums(x, weight))


def test_sums_that_float32_does_not_hold(device: torch.device) -> None:
    """Divided among programs, whose parts are added before anything is rounded."""
    parameters = {"BLOCK_T": 16, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP_T": 8, "HALVES": 1, "SWAP": 1, "PROGRAMS": 1}
    tuning = Tuning.of(device).using("int8_matmul", **parameters, SPLITS=4, num_warps=4, num_stages=2)
    k = 2048
    x = torch.full((2, k), 127, dtype=torch.int8, device=device)
    weight = torch.full((3, k), -127, dtype=torch.int8, device=device)
    weight[1, -1] = 126
    x[1, 0] = 1
    expected = sums(x, weight)
    assert expected.abs().max() > 1 << 24
    found = int8_matmul(x, weight, one(device), one(device), dtype=torch.float32, tuning=tuning)
    assert torch.equal(found, expected.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("per_token", "per_channel"), [(True, True), (True, False), (False, True)])
def test_scales_and_bias(device: torch.device, per_token: bool, per_channel: bool, dtype: torch.dtype) -> None:
    x, weight = codes(9, 160, device=device, seed=0), codes(70, 160, device=device, seed=1)
    x_scales = drawn(9 if per_token else 1, dtype=torch.float32, device=device, seed=2).exp() / 1000
    weight_scales = drawn(70 if per_channel else 1, dtype=torch.float32, device=device, seed=3).exp()
    bias = drawn(70, dtype=torch.bfloat16, device=device, seed=4)
    found = int8_matmul(x, weight, x_scales, weight_scales, bias_N=bias, dtype=dtype)
    assert found.dtype == dtype
    total = sums(x, weight)
    exact = total * x_scales.double()[:, None] * weight_scales.double() + bias.double()
    torchs = total.float() * x_scales[:, None] * weight_scales + bias.float()
    assert_as_good(found, exact, torchs.to(dtype))


def test_no_token(device: torch.device) -> None:
    x, weight = codes(0, 64, device=device, seed=0), codes(48, 64, device=device, seed=1)
    assert int8_matmul(x, weight, one(device), one(device)).shape == (0, 48)


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    x, weight = codes(4, 64, device=device, seed=0), codes(32, 64, device=device, seed=1)
    with pytest.raises(ValueError, match="x_TK is uint8, expected int8"):
        int8_matmul(x.view(torch.uint8), weight, one(device), one(device))
    with pytest.raises(ValueError, match="weight_NK is float8_e4m3fn, expected int8"):
        int8_matmul(x, weight.view(torch.float8_e4m3fn), one(device), one(device))
    with pytest.raises(ValueError, match=r"x_scales has shape \[4, 1\], expected \[4\]"):
        int8_matmul(x, weight, torch.ones(4, 1, device=device), one(device))
    with pytest.raises(ValueError, match="x_TK has rows of 40 1-byte values"):
        int8_matmul(x[:, :40].contiguous(), weight[:, :40].contiguous(), one(device), one(device))
    with pytest.raises(ValueError, match="whose products int32 cannot add up"):
        int8_matmul(torch.zeros(1, 1 << 17, dtype=torch.int8, device=device), weight, one(device), one(device))
