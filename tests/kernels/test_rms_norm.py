"""RMSNorm with the addition before it and the quantisation after it."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.quantized import assert_quantized, each_quantization, expected_scales
from tests.kernels.tensors import DTYPES, drawn
from tests.kernels.tolerance import assert_as_good

from arriero_kernels.quantization import Scaling
from arriero_kernels.rms_norm import add_rms_norm, add_rms_norm_quantized
from arriero_kernels.tuning import Tuning

EPS = 1e-5
SHAPES = [(0, 64), (1, 1), (1, 2048), (5, 123), (17, 64), (3, 1000), (2, 3072)]


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """In the precision of its arguments."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "hidden"), SHAPES)
@pytest.mark.parametrize("with_delta", [False, True], ids=["alone", "with delta"])
def test_add_rms_norm(device: torch.device, tokens: int, hidden: int, dtype: torch.dtype, with_delta: bool) -> None:
    residual = drawn(tokens, hidden, dtype=dtype, device=device)
    delta = drawn(tokens, hidden, dtype=dtype, device=device, seed=1) if with_delta else None
    weight = drawn(hidden, dtype=dtype, device=device, seed=2)
    total = residual if delta is None else residual + delta
    given = residual.clone()
    found = add_rms_norm(given, delta, weight, EPS)
    assert torch.equal(given, total)
    assert found.dtype == dtype
    torchs = norm(total.float(), weight.float()).to(dtype) if dtype == torch.float32 else norm(total, weight)
    assert_as_good(found, norm(total.double(), weight.double()), torchs)


def test_a_float32_weight_keeps_its_precision(device: torch.device) -> None:
    x = drawn(3, 256, dtype=torch.bfloat16, device=device)
    weight = 1 + drawn(256, dtype=torch.float32, device=device, seed=1) * 1e-3
    found = add_rms_norm(x, None, weight, EPS)
    assert torch.equal(found, norm(x.double(), weight.double()).to(torch.bfloat16))


def test_it_writes_where_it_is_told_and_nowhere_else(device: torch.device) -> None:
    out = torch.full((7, 40), 7.0, dtype=torch.bfloat16, device=device)
    x = drawn(5, 40, dtype=torch.bfloat16, device=device)
    found = add_rms_norm(x, None, torch.ones(40, device=device), EPS, out_TH=out[1:6])
    assert found.data_ptr() == out[1:6].data_ptr()
    assert (out[0] == 7).all()
    assert (out[6] == 7).all()
    assert not (out[1:6] == 7).any()


def test_huge_and_tiny_rows(device: torch.device) -> None:
    x = torch.tensor([[1e18, -1e18, 0.0], [0.0, 0.0, 0.0], [1e-20, 0.0, -1e-20]], device=device)
    weight = torch.ones(3, device=device)
    found = add_rms_norm(x, None, weight, EPS)
    assert torch.allclose(found.double(), norm(x.double(), weight.double()), rtol=1e-6, atol=0)


@each_quantization
@pytest.mark.parametrize(("tokens", "hidden"), [(0, 64), (1, 512), (5, 192), (3, 1088)])
def test_quantized(device: torch.device, tokens: int, hidden: int, dtype: torch.dtype, scaling: Scaling) -> None:
    residual = drawn(tokens, hidden, dtype=torch.bfloat16, device=device)
    delta = drawn(tokens, hidden, dtype=torch.bfloat16, device=device, seed=1)
    weight = drawn(hidden, dtype=torch.bfloat16, device=device, seed=2)
    total = residual + delta
    exact = norm(total.float(), weight.float())
    scale = expected_scales(exact, dtype, scaling, 64) if scaling is Scaling.TENSOR else None
    codes, scales = add_rms_norm_quantized(
        residual, delta, weight, EPS, dtype=dtype, scaling=scaling, scale=scale, group=64
    )
    assert torch.equal(residual, total)
    assert_quantized(codes, scales, exact, dtype, scaling, 64)


def test_a_row_of_zeros_is_quantized_to_zeros(device: torch.device) -> None:
    x = torch.zeros(2, 64, dtype=torch.bfloat16, device=device)
    codes, scales = add_rms_norm_quantized(x, None, torch.ones(64, device=device), EPS)
    assert (codes.float() == 0).all()
    assert scales.isfinite().all()


def test_every_number_of_warps_gives_the_same_result(device: torch.device) -> None:
    x = drawn(3, 1000, dtype=torch.bfloat16, device=device)
    weight = drawn(1000, dtype=torch.bfloat16, device=device, seed=1)
    exact = norm(x.double(), weight.double())
    for warps in (1, 2, 8):
        found = add_rms_norm(x, None, weight, EPS, tuning=Tuning.of(device).using("rms_norm", num_warps=warps))
        assert_as_good(found, exact, norm(x, weight))


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    x = torch.zeros(4, 8, dtype=torch.bfloat16, device=device)
    weight = torch.ones(8, device=device)
    with pytest.raises(ValueError, match=r"delta_TH has shape \[3, 8\], expected \[4, 8\]"):
        add_rms_norm(x, x[:3], weight, EPS)
    with pytest.raises(ValueError, match="delta_TH is float32, expected bfloat16"):
        add_rms_norm(x, x.float(), weight, EPS)
    with pytest.raises(ValueError, match=r"residual_TH is not contiguous: strides \[1, 4\]"):
        add_rms_norm(x.view(8, 4).T, None, weight[:8], EPS)
    with pytest.raises(ValueError, match="weight_H has shape"):
        add_rms_norm(x, None, weight[:7], EPS)
    with pytest.raises(ValueError, match="residual_TH is int64"):
        add_rms_norm(x.long(), None, weight, EPS)
    with pytest.raises(ValueError, match="two dimensions"):
        add_rms_norm(x[0], None, weight, EPS)
    with pytest.raises(ValueError, match="group is 3, expected a power of two that divides the row's 8 columns"):
        add_rms_norm_quantized(x, None, weight, EPS, scaling=Scaling.GROUP, group=3)
    with pytest.raises(ValueError, match="a scale is given with TENSOR, and only with it"):
        add_rms_norm_quantized(x, None, weight, EPS, scaling=Scaling.TENSOR)
    with pytest.raises(ValueError, match="expected float8_e4m3fn or int8"):
        add_rms_norm_quantized(x, None, weight, EPS, dtype=torch.float16)
