"""Rotary position embedding and the write to the paged KV cache."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.tensors import DTYPES, drawn
from tests.kernels.tolerance import assert_as_good

from arriero_kernels.rope_kv import rope_and_store, rope_table
from arriero_kernels.tuning import Tuning
from arriero_plan.model import ModelShape
from arriero_worker.model.llama import inverse_frequencies

POSITIONS = 300
BLOCKS, SLOTS = 7, 4
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
SHAPES = [(1, 1, 64), (4, 1, 64), (8, 2, 32), (3, 3, 20), (16, 2, 6), (2, 1, 128)]
"""Query heads, KV heads, head size."""


def frequencies(d: int, scaled: bool = False) -> torch.Tensor:
    config = {"model_type": "llama", "hidden_size": d, "num_hidden_layers": 1, "num_attention_heads": 1}
    config |= {"vocab_size": 8, "intermediate_size": 8, "max_position_embeddings": 1024, "rope_theta": 10000.0}
    return inverse_frequencies(ModelShape.from_config(config | ({"rope_scaling": LLAMA3} if scaled else {}), "test"))


def turned(x: torch.Tensor, positions: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D], turned by transformers' formula, in x's precision."""
    angles = torch.cat([positions.float()[:, None] * inverse] * 2, -1)[:, None]
    low, high = x.chunk(2, -1)
    return x * angles.cos().to(x.dtype) + torch.cat([-high, low], -1) * angles.sin().to(x.dtype)


class Pass:
    """One launch over random tokens, scattered over a cache."""

    def __init__(
        self,
        device: torch.device,
        tokens: int,
        heads: int,
        kv_heads: int,
        d: int,
        dtype: torch.dtype = torch.bfloat16,
        kv_dtype: torch.dtype | None = None,
        scaled: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(tokens)
        self.sizes = [heads, kv_heads, kv_heads]
        self.d = d
        self.qkv = drawn(tokens, sum(self.sizes) * d, dtype=dtype, device=device)
        self.given = self.qkv.clone()
        self.positions = torch.randint(0, POSITIONS, (tokens,), generator=generator).to(device)
        self.slots = torch.randperm(BLOCKS * SLOTS, generator=generator)[:tokens].to(device)
        self.inverse = frequencies(d, scaled).to(device)
        self.table = rope_table(self.inverse, POSITIONS)
        kv_dtype = kv_dtype or dtype
        self.keys, self.values = (
            torch.full((BLOCKS, kv_heads, SLOTS, d), 7.0, device=device).to(kv_dtype) for _ in range(2)
        )

    def run(self, scales: tuple[torch.Tensor, torch.Tensor] | None = None, tuning: Tuning | None = None) -> None:
        keys, values = scales or (None, None)
        rope_and_store(
            self.qkv,
            self.table,
            self.positions,
            self.slots,
            self.keys,
            self.values,
            key_scales_K=keys,
            value_scales_K=values,
            tuning=tuning,
        )

    def split(self, qkv: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
        """Queries, keys, values [T, heads, D]."""
        return qkv.to(dtype or qkv.dtype).unflatten(1, (-1, self.d)).split(self.sizes, 1)

    def stored(self, cache: torch.Tensor) -> torch.Tensor:
        """[T, KV heads, D] float32: what lies in the tokens' slots."""
        return cache.float()[self.slots // SLOTS, :, self.slots % SLOTS]

    def untouched(self, cache: torch.Tensor) -> bool:
        free = torch.ones(BLOCKS * SLOTS, dtype=torch.bool, device=cache.device)
        free[self.slots[self.slots >= 0]] = False
        free = free.view(BLOCKS, SLOTS)
        return bool((cache.float().transpose(1, 2)[free] == 7).all())


def check(done: Pass) -> None:
    """Against transformers' formula: turned in float64, and in the precision of the launch."""
    exact_q, exact_k, _ = done.split(done.given, torch.float64)
    q, k, v = done.split(done.given)
    positions, inverse = done.positions, done.inverse
    assert_as_good(done.split(done.qkv)[0], turned(exact_q, positions, inverse), turned(q, positions, inverse))
    assert_as_good(done.stored(done.keys), turned(exact_k, positions, inverse), turned(k, positions, inverse))
    assert torch.equal(done.stored(done.values), v.float())
    for now, before in zip(done.split(done.qkv)[1:], (k, v), strict=True):
        assert torch.equal(now, before)
    assert done.untouched(done.keys)
    assert done.untouched(done.values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), SHAPES)
def test_shapes(device: torch.device, heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> None:
    done = Pass(device, 5, heads, kv_heads, d, dtype)
    done.run()
    check(done)


@pytest.mark.parametrize("tokens", [0, 1, 13])
@pytest.mark.parametrize("together", [1, 8])
def test_tokens_of_a_program(device: torch.device, tokens: int, together: int) -> None:
    done = Pass(device, tokens, 4, 2, 16)
    done.run(tuning=Tuning.of(device).using("rope_and_store", BLOCK_T=together, num_warps=2))
    check(done)


def test_llama3s_frequencies(device: torch.device) -> None:
    done = Pass(device, 13, 2, 1, 64, torch.float32, scaled=True)
    assert not torch.equal(done.inverse, frequencies(64).to(device))
    done.run()
    check(done)


def test_far_positions_keep_their_angle(device: torch.device) -> None:
    done = Pass(device, 3, 1, 1, 64, torch.float32)
    done.positions = torch.tensor([131_071, 100_003, 0], device=device, dtype=torch.int32)
    done.table = rope_table(done.inverse, 131_072)
    done.run()
    check(done)


def test_a_token_without_a_slot_is_turned_and_not_stored(device: torch.device) -> None:
    done = Pass(device, 6, 2, 1, 32)
    done.slots[[1, 4]] = -1
    done.run()
    assert done.untouched(done.keys)
    assert done.untouched(done.values)
    q, _, v = done.split(done.given)
    inverse = done.inverse
    assert_as_good(
        done.split(done.qkv)[0], turned(q.double(), done.positions, inverse), turned(q, done.positions, inverse)
    )
    kept = done.slots >= 0
    assert torch.equal(done.stored(done.values)[kept], v.float()[kept])


@pytest.mark.parametrize("heads", [2, 8])
def test_float8_cache(device: torch.device, heads: int) -> None:
    done = Pass(device, 9, heads, 2, 32, kv_dtype=torch.float8_e4m3fn)
    scales = torch.tensor([0.01, 0.02], device=device), torch.tensor([0.005, 1.0], device=device)
    done.run(scales)
    _, k, v = done.split(done.given, torch.float32)
    exact_k = turned(k, done.positions, done.inverse)
    for cache, exact, scale in ((done.keys, exact_k, scales[0]), (done.values, v, scales[1])):
        wide = scale[:, None]
        torchs = (exact / wide).clamp(-448, 448).to(torch.float8_e4m3fn).float() * wide
        assert_as_good(done.stored(cache) * wide, exact, torchs)


def test_float8_saturates(device: torch.device) -> None:
    done = Pass(device, 4, 1, 1, 32, kv_dtype=torch.float8_e4m3fn)
    tiny = torch.full((1,), 1e-4, device=device)
    done.run((tiny, tiny))
    assert done.stored(done.values).abs().max() == 448
    assert done.stored(done.keys).isfinite().all()


def test_scales_apply_to_any_cache(device: torch.device) -> None:
    done = Pass(device, 4, 1, 1, 32)
    half = torch.full((1,), 0.5, device=device)
    done.run((half, half))
    assert torch.equal(done.stored(done.values), 2 * done.split(done.given, torch.float32)[2])


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    done = Pass(device, 4, 2, 1, 32)
    one = torch.ones(1, device=device)
    with pytest.raises(ValueError, match="together or not at all"):
        rope_and_store(done.qkv, done.table, done.positions, done.slots, done.keys, done.values, key_scales_K=one)
    with pytest.raises(ValueError, match="qkv has 64 columns, which is no whole multiple of 1 query heads"):
        rope_and_store(done.qkv[:, :64].contiguous(), done.table, done.positions, done.slots, done.keys, done.values)
    with pytest.raises(ValueError, match=r"slots_T has shape \[3\], expected \[4\]"):
        rope_and_store(done.qkv, done.table, done.positions, done.slots[:3], done.keys, done.values)
    with pytest.raises(ValueError, match="cos_sin_PD is bfloat16, expected float32"):
        rope_and_store(done.qkv, done.table.bfloat16(), done.positions, done.slots, done.keys, done.values)
    with pytest.raises(ValueError, match=r"keys_BKSD has shape \[7, 4, 32\], expected \[blocks, KV heads"):
        rope_and_store(done.qkv, done.table, done.positions, done.slots, done.keys[:, 0], done.values)
