"""4-bit weights: the layouts of checkpoints, and the product."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.tensors import drawn
from tests.kernels.tolerance import assert_as_good

from arriero_kernels.int4 import Int4Weight, from_awq, from_gptq, pack_int4, quantize_int4
from arriero_kernels.int4_matmul import int4_matmul
from arriero_kernels.tuning import Tuning

BF16 = torch.bfloat16
SHAPES = [
    (1, 64, 256, 128),
    (3, 40, 160, 32),
    (17, 136, 192, 64),
    (70, 24, 144, -1),
    (5, 8, 16, -1),
    (2, 72, 512, 256),
]
"""Tokens, outputs, inputs, group."""


class Plain:
    """A 4-bit weight as numbers: what a checkpoint means."""

    def __init__(self, n: int, k: int, group: int, device: torch.device, dtype: torch.dtype = torch.float16) -> None:
        self.group = k if group == -1 else group
        generator = torch.Generator().manual_seed(n + k)
        self.codes_NK = torch.randint(0, 16, (n, k), generator=generator)
        self.zeros_NG = torch.randint(0, 16, (n, k // self.group), generator=generator)
        self.scales_NG = (
            drawn(n, k // self.group, dtype=torch.float32, device=torch.device("cpu"), seed=7).exp().to(dtype)
        )
        self.device = device

    def value(self) -> torch.Tensor:
        """float64 [N, K]."""
        wide = (x.repeat_interleave(self.group, 1) for x in (self.zeros_NG, self.scales_NG))
        zeros, scales = wide
        return ((self.codes_NK - zeros) * scales.double()).to(self.device)

    def packed(self, zeros: bool = True) -> Int4Weight:
        zeros_GN = self.zeros_NG.T.to(self.device, torch.uint8) if zeros else None
        return pack_int4(self.codes_NK.to(self.device, torch.uint8), self.scales_NG.T.to(self.device), zeros_GN)


def words(values: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """int32 [R, C / 8] of [R, C]: bits 4 i.. of a word are its order[i]-th column."""
    rows = []
    for row in values.tolist():
        packed = []
        for first in range(0, len(row), 8):
            word = sum(row[first + order[i]] << (4 * i) for i in range(8))
            packed.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(packed)
    return torch.tensor(rows, dtype=torch.int32)


IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def assert_product(x: torch.Tensor, value: torch.Tensor, found: torch.Tensor) -> None:
    exact = x.double() @ value.T
    torchs = (x.float() @ value.float().T).to(x.dtype)
    assert found.dtype == x.dtype
    assert_as_good(found, exact, torchs)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize(("t", "n", "k", "group"), SHAPES)
def test_int4_matmul(device: torch.device, t: int, n: int, k: int, group: int, dtype: torch.dtype) -> None:
    plain = Plain(n, k, group, device)
    x = drawn(t, k, dtype=dtype, device=device)
    weight = plain.packed()
    assert_product(x, plain.value(), int4_matmul(x, weight))


@pytest.mark.parametrize("scales", [BF16, torch.float32], ids=str)
def test_symmetric_weights_have_no_zeros(device: torch.device, scales: torch.dtype) -> None:
    plain = Plain(48, 256, 128, device, scales)
    plain.zeros_NG.fill_(8)
    x = drawn(4, 256, dtype=BF16, device=device)
    for weight in (plain.packed(), plain.packed(zeros=False)):
        assert weight.zeros is None
        assert_product(x, plain.value(), int4_matmul(x, weight))


@pytest.mark.parametrize(("op", "group"), [("int4_matmul", 128), ("int4_matmul_fine", 64)])
@pytest.mark.parametrize("size", [16, 32, 64, 8192])
def test_every_row_of_the_table(device: torch.device, size: int, op: str, group: int) -> None:
    row = dict(Tuning.of(device).choose(op, size))
    del row["enable_fp_fusion"]
    t, n = row["BLOCK_T"] + 5, row["BLOCK_N"] + 8
    plain = Plain(n, 256, group, device)
    x, bias = drawn(t, 256, dtype=BF16, device=device), drawn(n, dtype=BF16, device=device, seed=3)
    found = int4_matmul(x, plain.packed(), bias_N=bias, tuning=Tuning.of(device).using(op, **row))
    exact = x.double() @ plain.value().T + bias.double()
    torchs = x.float() @ plain.value().float().T + bias.float()
    assert_as_good(found, exact, torchs.to(BF16))


def test_four_bits_a_weight_and_a_scale_and_a_zero_point_a_group() -> None:
    plain = Plain(40, 512, 128, torch.device("cpu"))
    assert plain.packed().bytes == 40 * 512 // 2 + 40 * 4 * (2 + 1)
    assert plain.packed(zeros=False).bytes == 40 * 512 // 2 + 40 * 4 * 2


def test_a_tile_divided_among_programs(device: torch.device) -> None:
    parameters = {"BLOCK_T": 16, "BLOCK_N": 64, "GROUP_T": 8, "PROGRAMS": 1, "SPLITS": 4}
    tuning = Tuning.of(device).using("int4_matmul", **parameters, num_warps=4, num_stages=2)
    plain = Plain(8, 2176, 128, device)  # 17 steps: parts of 5, 5, 5 and 2
    x, bias = drawn(3, 2176, dtype=BF16, device=device), drawn(8, dtype=BF16, device=device, seed=3)
    found = int4_matmul(x, plain.packed(), bias_N=bias, tuning=tuning)
    exact = x.double() @ plain.value().T + bias.double()
    assert_as_good(found, exact, (x.float() @ plain.value().float().T + bias.float()).to(BF16))
    assert torch.equal(found, int4_matmul(x, plain.packed(), bias_N=bias, tuning=tuning))


def test_awq(device: torch.device) -> None:
    plain = Plain(24, 256, 128, device)
    qweight = words(plain.codes_NK.T, AWQ).to(device)
    qzeros = words(plain.zeros_NG.T, AWQ).to(device)
    weight = from_awq(qweight, qzeros, plain.scales_NG.T.to(device))
    x = drawn(3, 256, dtype=BF16, device=device)
    assert_product(x, plain.value(), int4_matmul(x, weight))


@pytest.mark.parametrize("minus_one", [True, False])
def test_gptq(device: torch.device, minus_one: bool) -> None:
    plain = Plain(24, 256, 64, device)
    assert {0, 15} <= set(plain.zeros_NG.flatten().tolist())
    qweight = words(plain.codes_NK, IN_ORDER).T.contiguous().to(device)
    qzeros = words((plain.zeros_NG.T - int(minus_one)) % 16, IN_ORDER).to(device)
    g_idx = torch.arange(256, device=device, dtype=torch.int32) // 64
    weight = from_gptq(qweight, qzeros, plain.scales_NG.T.to(device), g_idx, zeros_minus_one=minus_one)
    x = drawn(3, 256, dtype=BF16, device=device)
    assert_product(x, plain.value(), int4_matmul(x, weight))


def test_inputs_out_of_their_groups_order_are_refused() -> None:
    qweight, scales = torch.zeros(32, 8, dtype=torch.int32), torch.ones(2, 8)
    qzeros = torch.zeros(2, 1, dtype=torch.int32)
    mixed = torch.arange(256) % 2
    with pytest.raises(ValueError, match=r"g_idx mixes the inputs of the groups .* desc_act false"):
        from_gptq(qweight, qzeros, scales, mixed)


@pytest.mark.parametrize("group", [32, 128, -1])
def test_quantizing_comes_as_near_as_16_steps_can(device: torch.device, group: int) -> None:
    original = drawn(40, 256, dtype=BF16, device=device)
    original[0] = 0
    original[1] = original[1].abs() + 1
    original[2] = -original[2].abs()
    weight = quantize_int4(original, group)
    x = torch.eye(256, dtype=BF16, device=device)[:48]
    found = int4_matmul(x, weight).T.double()
    rows = original.double().unflatten(1, (-1, 256 if group == -1 else group))
    step = (rows.amax(2).clamp(min=0) - rows.amin(2).clamp(max=0)) / 15
    allowed = (0.52 * step + 0.01 * rows.abs().amax(2)).repeat_interleave(rows.shape[2], 1)[:, :48]
    assert ((found - original[:, :48].double()).abs() <= allowed).all()
    assert (found[0] == 0).all()


def test_no_token_and_nowhere_else(device: torch.device) -> None:
    weight = Plain(40, 128, 128, device).packed()
    x = drawn(5, 128, dtype=BF16, device=device)
    assert int4_matmul(x[:0], weight).shape == (0, 40)
    out = torch.full((9, 40), 7.0, dtype=BF16, device=device)
    found = int4_matmul(x, weight, out_TN=out[2:7])
    assert found.data_ptr() == out[2:7].data_ptr()
    assert torch.equal(found, int4_matmul(x, weight))
    assert (out[:2] == 7).all()
    assert (out[7:] == 7).all()


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    plain = Plain(40, 256, 128, device)
    weight = plain.packed()
    x = drawn(5, 256, dtype=BF16, device=device)
    with pytest.raises(ValueError, match="x_TK is float32, expected bfloat16 or float16"):
        int4_matmul(x.float(), weight)
    with pytest.raises(ValueError, match=r"weight.codes has shape \[40, 32\], expected \[40, 16\]"):
        int4_matmul(x[:, :128].contiguous(), weight)
    with pytest.raises(ValueError, match="out_TN is float32"):
        int4_matmul(x, weight, out_TN=torch.zeros(5, 40, device=device))
    with pytest.raises(ValueError, match="bias_N has shape"):
        int4_matmul(x, weight, bias_N=torch.zeros(39, device=device))
    codes, scales = plain.codes_NK.to(torch.uint8), plain.scales_NG.T.contiguous()
    with pytest.raises(ValueError, match="16 groups of 256 inputs: expected groups of 32, 64, a multiple of 128"):
        pack_int4(codes, torch.ones(16, 40), None)
    with pytest.raises(ValueError, match="codes_NK is int64, expected uint8"):
        pack_int4(plain.codes_NK, scales, None)
    with pytest.raises(ValueError, match=r"zeros_GN has shape \[1, 40\], expected \[2, 40\]"):
        pack_int4(codes, scales, torch.zeros(1, 40, dtype=torch.uint8))
    with pytest.raises(ValueError, match="group is 48, which does not divide the row's 256 inputs"):
        quantize_int4(x, 48)
    with pytest.raises(ValueError, match="qweight is float32"):
        from_awq(torch.zeros(4, 4), torch.zeros(1, 4, dtype=torch.int32), torch.ones(1, 32))
    with pytest.raises(ValueError, match=r"scales has shape \[2, 24\], expected \[2, 32\]"):
        from_awq(torch.zeros(4, 4, dtype=torch.int32), torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, 24))
    with pytest.raises(ValueError, match=r"qzeros has shape \[2, 2\], expected \[2, 1\]"):
        from_gptq(torch.zeros(32, 8, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 8))
