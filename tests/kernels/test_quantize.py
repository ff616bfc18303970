"""Quantisation of activations, by itself."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.quantized import assert_quantized, each_quantization, expected_scales, quantized
from tests.kernels.tensors import DTYPES, drawn

from arriero_kernels.quantization import Scaling
from arriero_kernels.quantize import quantize


@each_quantization
@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "columns"), [(0, 64), (1, 64), (5, 192)])
def test_quantize(
    device: torch.device, tokens: int, columns: int, given: torch.dtype, dtype: torch.dtype, scaling: Scaling
) -> None:
    x = drawn(tokens, columns, dtype=given, device=device)
    scale = expected_scales(x.float(), dtype, scaling, 64) if scaling is Scaling.TENSOR else None
    codes, scales = quantize(x, dtype=dtype, scaling=scaling, scale=scale, group=64)
    assert_quantized(codes, scales, x.float(), dtype, scaling, 64)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_a_scale_that_is_a_power_of_two_gives_pytorchs_codes(device: torch.device, dtype: torch.dtype) -> None:
    x = drawn(4, 1000, dtype=torch.bfloat16, device=device)
    x[0, :4] = torch.tensor([1e30, -1e30, 0.0, -0.0])
    scale = torch.full((1,), 2.0**-6, device=device)
    codes, returned = quantize(x, dtype=dtype, scaling=Scaling.TENSOR, scale=scale)
    assert returned is scale
    assert torch.equal(codes.float(), quantized(x.float(), scale, dtype, Scaling.TENSOR).float())


def test_each_group_has_its_own_scale(device: torch.device) -> None:
    x = torch.tensor([[1.0, -2.0, 1e-3, 5e-4, 0.0, 0.0, 7e4, 1.0]], device=device)
    codes, scales = quantize(x, scaling=Scaling.GROUP, group=2)
    assert torch.allclose(scales * 448, torch.tensor([[2.0, 1e-3, 1e-12, 7e4]], device=device), rtol=1e-6, atol=0)
    assert codes.float().tolist() == [[224.0, -448.0, 448.0, 224.0, 0.0, 0.0, 448.0, 0.0058593750]]


def test_given_outputs_are_used(device: torch.device) -> None:
    x = drawn(3, 8, dtype=torch.bfloat16, device=device)
    out, scales = torch.empty(3, 8, dtype=torch.int8, device=device), torch.empty(3, device=device)
    codes, returned = quantize(x, dtype=torch.int8, out_TN=out, scales=scales)
    assert codes is out
    assert returned is scales
    assert (out.abs().amax(1) == 127).all()


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    x = torch.zeros(3, 8, device=device)
    with pytest.raises(ValueError, match=r"scales has shape \[3\], expected \[3, 2\]"):
        quantize(x, scaling=Scaling.GROUP, group=4, scales=torch.zeros(3, device=device))
    with pytest.raises(ValueError, match="out is int8, expected float8_e4m3fn"):
        quantize(x, out_TN=torch.zeros(3, 8, dtype=torch.int8, device=device))
    with pytest.raises(ValueError, match="scaling is NONE"):
        quantize(x, scaling=Scaling.NONE)
