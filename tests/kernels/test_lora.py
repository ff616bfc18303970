"""Adapters mixed in a batch."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.tensors import drawn
from tests.kernels.tolerance import assert_as_good

from arriero_kernels.lora import lora_add
from arriero_kernels.tuning import Tuning

BF16 = torch.bfloat16


class Batch:
    """Tensors of one call; adapters differ in scaling as well."""

    def __init__(
        self,
        adapters: list[int],
        n: int,
        k: int,
        rank: int,
        device: torch.device,
        dtype: torch.dtype = BF16,
        most: int = 5,
    ) -> None:
        t = len(adapters)
        self.out = drawn(t, n, dtype=dtype, device=device)
        self.x = drawn(t, k, dtype=dtype, device=device, seed=1)
        self.adapters = torch.tensor(adapters, dtype=torch.int32, device=device)
        self.a = drawn(most, rank, k, dtype=dtype, device=device, seed=2) / k**0.5
        self.b = drawn(most, n, rank, dtype=dtype, device=device, seed=3)
        self.scaling = torch.arange(1, most + 1, dtype=torch.float32, device=device) / 4

    def run(self, tuning: Tuning | None = None) -> torch.Tensor:
        return lora_add(self.out.clone(), self.x, self.adapters, self.a, self.b, self.scaling, tuning=tuning)

    def expected(self, dtype: torch.dtype) -> torch.Tensor:
        """By PyTorch, token for token, each operation in `dtype`."""
        rows = []
        for row, x, adapter in zip(self.out, self.x, self.adapters.tolist(), strict=True):
            if adapter < 0:
                rows.append(row.to(dtype))
                continue
            a, b = self.a[adapter].to(dtype), self.b[adapter].to(dtype)
            rows.append(row.to(dtype) + (x.to(dtype) @ a.T) @ b.T * self.scaling[adapter].to(dtype))
        return torch.stack(rows)

    def check(self, found: torch.Tensor) -> None:
        assert_as_good(found, self.expected(torch.float64), self.expected(self.x.dtype))
        without = self.adapters < 0
        assert torch.equal(found[without], self.out[without])


MIXES = {
    "one token": [3],
    "one adapter": [2] * 17,
    "mixed": [4, -1, 0, 0, 3, 4, -1, 1, 2, 4],
    "prompts": [1] * 20 + [-1] * 15 + [0] * 3,
    "every second": [0, -1] * 9,
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize(("n", "k", "rank"), [(64, 256, 16), (50, 72, 8), (130, 300, 20)])
def test_lora_add(device: torch.device, mix: list[int], n: int, k: int, rank: int) -> None:
    batch = Batch(mix, n, k, rank, device)
    batch.check(batch.run())


def test_float16_and_a_rank_of_one(device: torch.device) -> None:
    batch = Batch(MIXES["mixed"], 40, 64, 1, device, torch.float16)
    batch.check(batch.run())


@pytest.mark.parametrize("kind", ["", "_wide"])
@pytest.mark.parametrize("size", [64, 8192])
def test_every_row_of_the_table(device: torch.device, size: int, kind: str) -> None:
    tuning = Tuning.of(device)
    for op in (f"lora_shrink{kind}", f"lora_expand{kind}"):
        row = dict(tuning.choose(op, size))
        del row["enable_fp_fusion"]
        tuning = tuning.using(op, **row)
    batch = Batch([1] * 50 + [-1] * 20 + [0, 3] * 10, 72, 264, 80 if kind else 16, device)
    batch.check(batch.run(tuning))


def test_no_adapter_at_all(device: torch.device) -> None:
    batch = Batch([-1] * 20, 40, 64, 16, device)
    batch.a.fill_(float("nan"))
    assert torch.equal(batch.run(), batch.out)


def test_another_adapter_is_not_looked_at(device: torch.device) -> None:
    batch = Batch([0, 2, -1, 2], 40, 64, 16, device)
    clean = batch.run()
    for other in (1, 3, 4):
        batch.a[other] = float("nan")
        batch.b[other] = float("inf")
        batch.scaling[other] = float("nan")
    batch.x[2] = float("nan")
    assert torch.equal(batch.run(), clean)


def test_some_columns_of_a_wider_output(device: torch.device) -> None:
    batch = Batch(MIXES["mixed"], 40, 64, 16, device)
    wide = torch.full((10, 100), 7.0, dtype=BF16, device=device)
    wide[:, 30:70] = batch.out
    found = lora_add(wide[:, 30:70], batch.x, batch.adapters, batch.a, batch.b, batch.scaling)
    assert found.data_ptr() == wide[:, 30:70].data_ptr()
    assert torch.equal(wide[:, 30:70], batch.run())
    assert (wide[:, :30] == 7).all()
    assert (wide[:, 70:] == 7).all()


def test_no_token(device: torch.device) -> None:
    out, x = torch.zeros(0, 40, dtype=BF16, device=device), torch.zeros(0, 64, dtype=BF16, device=device)
    batch = Batch([0], 40, 64, 16, device)
    assert lora_add(out, x, batch.adapters[:0], batch.a, batch.b, batch.scaling).shape == (0, 40)


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    batch = Batch(MIXES["mixed"], 40, 64, 16, device)
    rest = (batch.adapters, batch.a, batch.b, batch.scaling)
    with pytest.raises(ValueError, match=r"adapters_T is int64, expected int32"):
        lora_add(batch.out, batch.x, batch.adapters.long(), *rest[1:])
    with pytest.raises(ValueError, match=r"a_LRK has shape \[5, 16, 64\], expected \[5, 16, 32\]"):
        lora_add(batch.out, batch.x[:, :32].contiguous(), *rest)
    with pytest.raises(ValueError, match=r"b_LNR has shape \[5, 40, 8\], expected \[5, 40, 16\]"):
        lora_add(batch.out, batch.x, batch.adapters, batch.a, batch.b[:, :, :8].contiguous(), batch.scaling)
    with pytest.raises(ValueError, match=r"out_TN is float32 \[10, 40\]"):
        lora_add(batch.out.float(), batch.x, *rest)
    with pytest.raises(ValueError, match=r"with strides \[1, 10\]"):
        lora_add(batch.out.view(40, 10).T, batch.x, *rest)
    with pytest.raises(ValueError, match="expected three dimensions"):
        lora_add(batch.out, batch.x, batch.adapters, batch.a[0], batch.b, batch.scaling)
    large = Batch([0], 40, 64, 512, device, most=1)
    with pytest.raises(ValueError, match="the rank is 512, expected 1 to 256"):
        large.run()
    with pytest.raises(ValueError, match="x_TK is float32"):
        lora_add(batch.out, batch.x.float(), *rest)
