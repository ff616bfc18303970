"""Rotary position embedding, fused with the write of keys and values to the paged KV cache.

Legend: T tokens, A query heads, K key/value heads, D head size, P positions, B blocks, S slots of a block.
Source: Su et al., "RoFormer" (2021), in the halves' form of Hugging Face's checkpoints. Tuned by T.

The cache's layout: keys and values [B, K, S, D], so that a head's tokens of a block lie in one piece.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arriero_kernels.checks import FLOATS, INDICES, expect, expect_2d
from arriero_kernels.numerics import narrow, widen
from arriero_kernels.tuning import Tuning

CACHE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)


@triton.jit
def _turned(low, high, cos, sin):
    return low * cos - high * sin, high * cos + low * sin


@triton.jit(do_not_specialize=["tokens"])  # which varies from step to step: nothing is compiled while serving
def _rope_kv_kernel(
    qkv,
    cos_sin,
    positions,
    slots,
    keys,
    values,
    key_scales,
    value_scales,
    tokens,
    SCALED: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    SLOTS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """BLOCK_T tokens of one KV head and its query heads a program."""
    group: tl.constexpr = HEADS // KV_HEADS
    half: tl.constexpr = D // 2
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    kv_head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    i = tl.arange(0, HALF)
    present = token < tokens
    mask = present[:, None] & (i < half)[None, :]
    angle = tl.load(positions + token, mask=present, other=0).to(tl.int64)[:, None] * D + i[None, :]
    cos = tl.load(cos_sin + angle, mask=mask, other=0.0)
    sin = tl.load(cos_sin + angle + half, mask=mask, other=0.0)
    row = qkv + token.to(tl.int64)[:, None] * width + i[None, :]

    for h in tl.static_range(group):
        query = row + (kv_head * group + h) * D
        low, high = widen(tl.load(query, mask=mask, other=0.0)), widen(tl.load(query + half, mask=mask, other=0.0))
        low, high = _turned(low, high, cos, sin)
        tl.store(query, narrow(low, qkv.dtype.element_ty), mask=mask)
        tl.store(query + half, narrow(high, qkv.dtype.element_ty), mask=mask)

    slot = tl.load(slots + token, mask=present, other=-1).to(tl.int64)
    kept = mask & (slot >= 0)[:, None]
    target = (((slot // SLOTS) * KV_HEADS + kv_head) * SLOTS + slot % SLOTS)[:, None] * D + i[None, :]
    key = row + (HEADS + kv_head) * D
    low, high = widen(tl.load(key, mask=kept, other=0.0)), widen(tl.load(key + half, mask=kept, other=0.0))
    low, high = _turned(low, high, cos, sin)
    value = key + KV_HEADS * D
    value_low = widen(tl.load(value, mask=kept, other=0.0))
    value_high = widen(tl.load(value + half, mask=kept, other=0.0))
    if SCALED:
        key_inverse = 1.0 / tl.load(key_scales + kv_head)
        value_inverse = 1.0 / tl.load(value_scales + kv_head)
        low, high = low * key_inverse, high * key_inverse
        value_low, value_high = value_low * value_inverse, value_high * value_inverse
    tl.store(keys + target, narrow(low, keys.dtype.element_ty), mask=kept)
    tl.store(keys + target + half, narrow(high, keys.dtype.element_ty), mask=kept)
    tl.store(values + target, narrow(value_low, values.dtype.element_ty), mask=kept)
    tl.store(values + target + half, narrow(value_high, values.dtype.element_ty), mask=kept)


def rope_table(inverse_frequencies: torch.Tensor, positions: int) -> torch.Tensor:
    """float32 [P, D]: of each position, the cosines of its D / 2 angles, then their sines.

    inverse_frequencies: float32 [D / 2], with the model's scaling (llama3's, say) already in them. The angles are
    rounded to float32, as transformers has them.
    positions: how many, P; the model's longest context.
    """
    angles = (
        torch.arange(positions, dtype=torch.float32, device=inverse_frequencies.device)[:, None] * inverse_frequencies
    )
    return torch.cat([angles.cos(), angles.sin()], -1)


def rope_and_store(
    qkv: torch.Tensor,
    cos_sin_PD: torch.Tensor,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    keys_BKSD: torch.Tensor,
    values_BKSD: torch.Tensor,
    *,
    key_scales_K: torch.Tensor | None = None,
    value_scales_K: torch.Tensor | None = None,
    tuning: Tuning | None = None,
) -> None:
    """Turn the queries by their positions, in place; write the turned keys, and the values, to their slots.

    qkv: [T, (A + 2 * K) * D] bfloat16, float16 or float32, contiguous; queries, keys, values. Keys and values stay.
    cos_sin_PD: `rope_table` of all positions that occur. D is even.
    positions_T: int64 or int32 [T], below P: not checked.
    slots_T: int64 or int32 [T], block * S + offset, below B * S: not checked; negative: the token is not stored.
        No slot occurs twice.
    keys_BKSD, values_BKSD: [B, K, S, D] contiguous, of one dtype: bfloat16, float16, float32 or float8_e4m3fn.
    key_scales_K, value_scales_K: float32 [K]; stored * scale is the key or value. Both or neither; None: 1. float8
        saturates.

    Raises ValueError for other shapes, dtypes, devices or strides.
    """
    t, width = expect_2d("qkv", qkv, FLOATS)
    device = qkv.device
    if keys_BKSD.dim() != 4:
        raise ValueError(f"keys_BKSD has shape {list(keys_BKSD.shape)}, expected [blocks, KV heads, slots, head size]")
    blocks, kv_heads, slots, d = keys_BKSD.shape
    expect("keys_BKSD", keys_BKSD, (blocks, kv_heads, slots, d), CACHE_DTYPES, device)
    expect("values_BKSD", values_BKSD, (blocks, kv_heads, slots, d), (keys_BKSD.dtype,), device)
    heads = width // d - 2 * kv_heads
    if d % 2 or heads < kv_heads or heads % kv_heads or width % d:
        raise ValueError(
            f"qkv has {width} columns, which is no whole multiple of {kv_heads} query heads of an even size {d} "
            f"beside {kv_heads} keys and values"
        )
    expect("cos_sin_PD", cos_sin_PD, (cos_sin_PD.shape[0], d), (torch.float32,), device)
    expect("positions_T", positions_T, (t,), INDICES, device)
    expect("slots_T", slots_T, (t,), INDICES, device)
    if (key_scales_K is None) != (value_scales_K is None):
        raise ValueError("key_scales_K and value_scales_K are given together or not at all")
    for name, scales in (("key_scales_K", key_scales_K), ("value_scales_K", value_scales_K)):
        if scales is not None:
            expect(name, scales, (kv_heads,), (torch.float32,), device)
    if t == 0:
        return
    parameters = (tuning or Tuning.of(device)).choose("rope_and_store", t)
    _rope_kv_kernel[(triton.cdiv(t, parameters["BLOCK_T"]), kv_heads)](
        qkv,
        cos_sin_PD,
        positions_T,
        slots_T,
        keys_BKSD,
        values_BKSD,
        key_scales_K,
        value_scales_K,
        t,
        SCALED=key_scales_K is not None,
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=d,
        SLOTS=slots,
        HALF=triton.next_power_of_2(d // 2),
        **parameters,
    )
