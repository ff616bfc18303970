"""SwiGLU's gate, plain and quantised."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional
from tests.kernels.quantized import assert_quantized, each_quantization, expected_scales
from tests.kernels.tensors import DTYPES, drawn
from tests.kernels.tolerance import assert_as_good

from arriero_kernels.quantization import Scaling
from arriero_kernels.swiglu import silu_mul, silu_mul_quantized
from arriero_kernels.tuning import Tuning

SHAPES = [(0, 64), (1, 1), (1, 2048), (5, 123), (17, 64), (2, 3000)]


def gated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "size"), SHAPES)
def test_silu_mul(device: torch.device, tokens: int, size: int, dtype: torch.dtype) -> None:
    gate_up = drawn(tokens, 2 * size, dtype=dtype, device=device)
    found = silu_mul(gate_up)
    assert found.dtype == dtype
    assert_as_good(found, gated(gate_up.double()), gated(gate_up))


def test_extremes(device: torch.device) -> None:
    gate = [0.0, -0.0, 1e4, -1e4, 88.5, -88.5, 1e-30, -200.0, 3e38, -3e38]
    gate_up = torch.tensor([gate + [1.0] * len(gate)], device=device)
    found = silu_mul(gate_up)
    assert torch.allclose(found.double(), gated(gate_up.double()), rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("block", [16, 64, 1024])
def test_any_block_gives_the_same_result(device: torch.device, block: int) -> None:
    gate_up = drawn(2, 246, dtype=torch.bfloat16, device=device)
    tuning = Tuning.of(device).using("silu_mul", BLOCK=block, num_warps=2)
    assert torch.equal(silu_mul(gate_up, tuning=tuning), silu_mul(gate_up))


def test_it_writes_where_it_is_told_and_nowhere_else(device: torch.device) -> None:
    out = torch.full((7, 40), 7.0, dtype=torch.bfloat16, device=device)
    gate_up = drawn(5, 80, dtype=torch.bfloat16, device=device)
    assert torch.equal(silu_mul(gate_up, out_TI=out[1:6]), silu_mul(gate_up))
    assert (out[[0, 6]] == 7).all()


@each_quantization
@pytest.mark.parametrize(("tokens", "size"), [(0, 64), (1, 512), (5, 192), (3, 1088)])
def test_quantized(device: torch.device, tokens: int, size: int, dtype: torch.dtype, scaling: Scaling) -> None:
    gate_up = drawn(tokens, 2 * size, dtype=torch.bfloat16, device=device)
    exact = gated(gate_up.float())
    scale = expected_scales(exact, dtype, scaling, 64) if scaling is Scaling.TENSOR else None
    codes, scales = silu_mul_quantized(gate_up, dtype=dtype, scaling=scaling, scale=scale, group=64)
    assert_quantized(codes, scales, exact, dtype, scaling, 64)


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    gate_up = torch.zeros(4, 8, device=device)
    with pytest.raises(ValueError, match="gate_up has 7 columns, expected a positive even number"):
        silu_mul(torch.zeros(4, 7, device=device))
    with pytest.raises(ValueError, match=r"out_TI has shape \[4, 8\], expected \[4, 4\]"):
        silu_mul(gate_up, out_TI=gate_up)
    with pytest.raises(ValueError, match="gate_up is not contiguous"):
        silu_mul(gate_up[:, :4])
    one = torch.ones(1, device=device)
    with pytest.raises(ValueError, match="scales are written for TOKEN and GROUP"):
        silu_mul_quantized(gate_up, scaling=Scaling.TENSOR, scale=one, scales=one)
