"""float8 by float8, with every kind of scale."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from tests.kernels.tensors import DTYPES, drawn
from tests.kernels.tolerance import assert_as_good

from arriero_kernels.fp8_matmul import fp8_matmul
from arriero_kernels.gemm import splits_of
from arriero_kernels.tuning import Tuning

FLOAT8 = torch.float8_e4m3fn
SHAPES = [(1, 64, 128), (3, 40, 208), (17, 130, 144), (33, 96, 48), (70, 24, 16), (5, 1, 256)]
"""Tokens, outputs, inputs."""
FAST_ACCUMULATION = 2e-3
"""Of the largest result: what the matrix units' sums may err by."""


class Inputs(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    x_scales: torch.Tensor
    weight_scales: torch.Tensor


def blocks(n: int) -> int:
    return -(-n // 128)


def inputs(t: int, n: int, k: int, kind: str, device: torch.device) -> Inputs:
    """Scales differ by up to a hundred times, so that one taken in place of another is seen."""
    x = drawn(t, k, dtype=FLOAT8, device=device)
    weight = drawn(n, k, dtype=FLOAT8, device=device, seed=1)
    shapes = {
        "tensor": ((1,), (1,)),
        "row": ((t,), (n,)),
        "token": ((t,), (1,)),
        "channel": ((1,), (n,)),
        "block": ((t, blocks(k)), (blocks(n), blocks(k))),
    }[kind]
    scales = [drawn(*shape, dtype=torch.float32, device=device, seed=2).exp() for shape in shapes]
    return Inputs(x, weight, *scales)


def restored(given: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """x and the weight, float64."""
    x, weight = given.x.double(), given.weight.double()
    if given.x_scales.dim() == 2:
        x_scales = given.x_scales.repeat_interleave(128, 1)[:, : x.shape[1]]
        rows = given.weight_scales.repeat_interleave(128, 0)[: weight.shape[0]]
        return x * x_scales, weight * rows.repeat_interleave(128, 1)[:, : x.shape[1]]
    return x * given.x_scales[:, None], weight * given.weight_scales[:, None]


def assert_product(found: torch.Tensor, given: Inputs, bias: torch.Tensor | None = None) -> None:
    x, weight = restored(given)
    exact = x @ weight.T
    torchs = x.float() @ weight.float().T
    if bias is not None:
        exact += bias.double()
        torchs += bias.float()
    floor = FAST_ACCUMULATION if found.is_cuda else 2e-6
    assert_as_good(found, exact, torchs.to(found.dtype), floor)


@pytest.mark.parametrize("kind", ["tensor", "row", "block"])
@pytest.mark.parametrize(("t", "n", "k"), SHAPES)
def test_fp8_matmul(device: torch.device, t: int, n: int, k: int, kind: str) -> None:
    given = inputs(t, n, k, kind, device)
    found = fp8_matmul(*given)
    assert found.shape == (t, n)
    assert found.dtype == torch.bfloat16
    assert_product(found, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["token", "channel", "block"])
def test_bias_and_dtypes(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    given = inputs(9, 70, 160, kind, device)
    bias = drawn(70, dtype=torch.bfloat16, device=device, seed=3)
    found = fp8_matmul(*given, bias_N=bias, dtype=dtype)
    assert found.dtype == dtype
    assert_product(found, given, bias)


@pytest.mark.parametrize("op", ["fp8_matmul", "fp8_matmul_grouped"])
@pytest.mark.parametrize("size", [16, 32, 64, 512, 8192])
def test_every_row_of_the_table(device: torch.device, op: str, size: int) -> None:
    row = dict(Tuning.of(device).choose(op, size))
    del row["enable_fp_fusion"]
    t, n = min(150, 2 * row["BLOCK_T"] + 5), row["BLOCK_N"] + 24
    given = inputs(t, n, 272, "block" if op.endswith("grouped") else "row", device)
    bias = drawn(n, dtype=torch.float32, device=device, seed=3)
    found = fp8_matmul(*given, bias_N=bias, tuning=Tuning.of(device).using(op, **row))
    assert_product(found, given, bias)


@pytest.mark.parametrize("op", ["fp8_matmul", "fp8_matmul_grouped"])
@pytest.mark.parametrize("swap", [0, 1])
def test_a_tile_divided_among_programs(device: torch.device, op: str, swap: int) -> None:
    grouped = op.endswith("grouped")
    k = 2000 if grouped else 560
    tuning = Tuning.of(device).using(
        op,
        BLOCK_T=16 if swap else 64,
        BLOCK_N=64,
        BLOCK_K=128 if grouped else 32,
        GROUP_T=8,
        HALVES=1,
        SWAP=swap,
        PROGRAMS=1,
        SPLITS=4,
        num_warps=4,
        num_stages=2,
    )
    given = inputs(5, 72, k, "block" if grouped else "row", device)
    bias = drawn(72, dtype=torch.bfloat16, device=device, seed=3)
    first = fp8_matmul(*given, bias_N=bias, tuning=tuning)
    assert_product(first, given, bias)
    assert torch.equal(first, fp8_matmul(*given, bias_N=bias, tuning=tuning))


def test_how_often_a_tile_is_divided() -> None:
    assert splits_of(tiles=64, steps=16, most=8, multiprocessors=132) == 1  # not worth a second kernel
    assert splits_of(tiles=64, steps=56, most=8, multiprocessors=132) == 2
    assert splits_of(tiles=20, steps=32, most=8, multiprocessors=132) == 6
    assert splits_of(tiles=20, steps=32, most=4, multiprocessors=132) == 4
    assert splits_of(tiles=1, steps=25, most=8, multiprocessors=132) == 5  # of five steps each: six would leave none
    assert splits_of(tiles=132, steps=999, most=8, multiprocessors=132) == 1
    assert splits_of(tiles=1000, steps=999, most=8, multiprocessors=132) == 1


def test_one_token_and_no_token(device: torch.device) -> None:
    given = inputs(1, 48, 64, "row", device)
    alone = fp8_matmul(*given)
    shared = fp8_matmul(given.x, given.weight, given.x_scales.clone(), given.weight_scales)
    assert torch.equal(alone, shared)
    none = given._replace(x=given.x[:0], x_scales=given.x_scales[:0])
    assert fp8_matmul(*none).shape == (0, 48)


def test_it_writes_where_it_is_told_and_nowhere_else(device: torch.device) -> None:
    for kind in ("row", "block"):
        given = inputs(5, 40, 128, kind, device)
        out = torch.full((9, 40), 7.0, dtype=torch.bfloat16, device=device)
        found = fp8_matmul(*given, out_TN=out[2:7])
        assert found.data_ptr() == out[2:7].data_ptr()
        assert torch.equal(found, fp8_matmul(*given))
        assert (out[:2] == 7).all()
        assert (out[7:] == 7).all()


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    given = inputs(4, 32, 256, "row", device)
    x, weight, x_scales, weight_scales = given
    grouped = inputs(4, 32, 256, "block", device)
    with pytest.raises(ValueError, match="x_TK is bfloat16, expected float8_e4m3fn"):
        fp8_matmul(x.bfloat16(), weight, x_scales, weight_scales)
    with pytest.raises(ValueError, match=r"weight_NK has shape \[32, 128\], expected \[32, 256\]"):
        fp8_matmul(x, weight[:, :128].contiguous(), x_scales, weight_scales)
    with pytest.raises(ValueError, match="weight_NK is not contiguous"):
        fp8_matmul(x, weight.view(256, 32).T, x_scales, weight_scales)
    with pytest.raises(ValueError, match="x_TK has rows of 40 1-byte values"):
        fp8_matmul(x[:, :40].contiguous(), weight[:, :40].contiguous(), x_scales, weight_scales)
    with pytest.raises(ValueError, match=r"x_scales has shape \[3\], expected \[4\]"):
        fp8_matmul(x, weight, x_scales[:3], weight_scales)
    with pytest.raises(ValueError, match="weight_scales is float16"):
        fp8_matmul(x, weight, x_scales, weight_scales.half())
    with pytest.raises(ValueError, match=r"weight_scales has shape \[32\], expected \[1, 2\]"):
        fp8_matmul(x, weight, grouped.x_scales, weight_scales)
    with pytest.raises(ValueError, match=r"weight_scales has shape \[1, 2\], expected \[32\]"):
        fp8_matmul(x, weight, x_scales, grouped.weight_scales)
    with pytest.raises(ValueError, match="bias_N has shape"):
        fp8_matmul(*given, bias_N=torch.zeros(31, device=device))
    with pytest.raises(ValueError, match="expected bfloat16 or float16 or float32"):
        fp8_matmul(*given, dtype=torch.float64)
    with pytest.raises(ValueError, match="out_TN is float32, expected bfloat16"):
        fp8_matmul(*given, out_TN=torch.zeros(4, 32, device=device))
