"""Kernels between the matrix products: norm, rotary angles, KV writes, SwiGLU, copies. float32 activations."""

from __future__ import annotations

import math
import struct

import numba
import numpy as np

from arriero_worker.model.cpu.native import (
    bits_of_float,
    f32_at,
    f64_at,
    i64_at,
    power_of_two,
    u16_at,
)
from arriero_worker.model.cpu.tiles import FLOAT32

_LOG2E = np.float32(1.44269504088896341)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_LOWEST = np.float32(-87.0)
_HIGHEST = np.float32(88.0)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_HALF, _ONE, _ZERO = np.float32(0.5), np.float32(1.0), np.float32(0.0)


@numba.njit(inline="always")
def exp_float32(x):  # type: ignore[no-untyped-def]
    """exp in float32 without a call, so that loops over it vectorise (Cephes' expf, 2 ulp); 0 below -87."""
    clamped = min(max(x, _LOWEST), _HIGHEST)
    power = np.floor(clamped * _LOG2E + _HALF)
    r = clamped - power * _LN2_HIGH - power * _LN2_LOW
    y = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    y = y * r * r + r + _ONE
    return y * power_of_two(power) if x > _LOWEST else _ZERO


@numba.njit(inline="always")
def bfloat16_of(x):  # type: ignore[no-untyped-def]
    """Round a finite float32 to bfloat16 bits, to nearest, ties to even."""
    bits = np.uint32(bits_of_float(x))
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


NORM_LAYOUT = struct.Struct("6qd")
"""residual, delta (0: none), weight, out (0: only add), T, H, eps."""


def add_rms_norm_kernel(arguments, thread, threads):  # type: ignore[no-untyped-def]
    """residual[T, H] += delta, in place; out = residual / rms(residual) * weight."""
    a = i64_at(arguments)
    delta_at, out_at, count, h = a[1], a[3], a[4], a[5]
    eps = np.float32(f64_at(arguments)[6])
    weight = f32_at(a[2])
    for t in range(count * thread // threads, count * (thread + 1) // threads):
        x = f32_at(a[0] + t * h * 4)
        if delta_at != 0:
            _add(x, f32_at(delta_at + t * h * 4), h)
        if out_at != 0:
            out = f32_at(out_at + t * h * 4)
            scale = np.float32(_ONE / math.sqrt(_sum_of_squares(x, h) / np.float32(h) + eps))
            for i in range(h):
                out[i] = x[i] * scale * weight[i]


@numba.njit
def _add(x, delta, h):  # type: ignore[no-untyped-def]
    for i in range(h):
        x[i] += delta[i]


@numba.njit(fastmath={"reassoc", "contract"})
def _sum_of_squares(x, h):  # type: ignore[no-untyped-def]
    total = _ZERO
    for i in range(h):
        total += x[i] * x[i]
    return total


ROWS_LAYOUT = struct.Struct("5q")
"""x, rows, out, R, H."""


def rows_kernel(arguments, thread, threads):  # type: ignore[no-untyped-def]
    """out[R, H] = x[rows]."""
    a = i64_at(arguments)
    rows, count, h = i64_at(a[1]), a[3], a[4]
    for r in range(count * thread // threads, count * (thread + 1) // threads):
        source, target = f32_at(a[0] + rows[r] * h * 4), f32_at(a[2] + r * h * 4)
        for i in range(h):
            target[i] = source[i]


SILU_LAYOUT = struct.Struct("4q")
"""gate_up, out, T, I."""


def silu_mul_kernel(arguments, thread, threads):  # type: ignore[no-untyped-def]
    """out[T, I] = silu(gate_up[:, :I]) * gate_up[:, I:]. Threads share out columns: one token is work for all."""
    a = i64_at(arguments)
    count, n = a[2], a[3]
    first, end = n * thread // threads, n * (thread + 1) // threads
    for t in range(count):
        gate, up, out = f32_at(a[0] + t * n * 8), f32_at(a[0] + t * n * 8 + n * 4), f32_at(a[1] + t * n * 4)
        for i in range(first, end):
            out[i] = gate[i] / (_ONE + exp_float32(-gate[i])) * up[i]


ANGLES_LAYOUT = struct.Struct("6q")
"""positions, inverse frequencies, cos, sin, T, D / 2."""


def angles_kernel(arguments, thread, threads):  # type: ignore[no-untyped-def]
    """cos, sin [T, D / 2] of position * inverse frequency, in float32 as transformers has it."""
    a = i64_at(arguments)
    positions, inverse, cos, sin, count, half = i64_at(a[0]), f32_at(a[1]), f32_at(a[2]), f32_at(a[3]), a[4], a[5]
    for t in range(count * thread // threads, count * (thread + 1) // threads):
        position = np.float32(positions[t])
        for i in range(half):
            angle = np.float32(position * inverse[i])
            cos[t * half + i] = math.cos(angle)
            sin[t * half + i] = math.sin(angle)


ROPE_LAYOUT = struct.Struct("15q")
"""qkv, cos, sin, slots, keys, values, T, heads, kv heads, D, block size, key width, value width, kind, and a spare."""


def rope_kernel(arguments, thread, threads):  # type: ignore[no-untyped-def]
    """Turn the queries of qkv[T, (heads + 2 kv heads) D] in place; turn the keys, write them and the values to slots.

    keys: [blocks, kv heads, D, key width], a block's tokens along the last axis. values: [blocks, kv heads, block size,
    value width]. float32 or bfloat16.
    """
    a = i64_at(arguments)
    qkv_at, cos_at, sin_at, slots, keys, values = a[0], a[1], a[2], i64_at(a[3]), a[4], a[5]
    count, heads, kv_heads, d, block_size, key_width, value_width, kind = (
        a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13]
    )  # fmt: skip
    half = d // 2
    for t in range(count * thread // threads, count * (thread + 1) // threads):
        cos, sin = f32_at(cos_at + t * half * 4), f32_at(sin_at + t * half * 4)
        row = qkv_at + t * (heads + 2 * kv_heads) * d * 4
        for h in range(heads + kv_heads):
            _turn(f32_at(row + h * d * 4), f32_at(row + h * d * 4 + half * 4), cos, sin, half)
        block, offset = slots[t] // block_size, slots[t] % block_size
        for h in range(kv_heads):
            key = f32_at(row + (heads + h) * d * 4)
            value = f32_at(row + (heads + kv_heads + h) * d * 4)
            key_to = (block * kv_heads + h) * d * key_width + offset
            value_to = ((block * kv_heads + h) * block_size + offset) * value_width
            if kind == FLOAT32:
                _write_float32(key, f32_at(keys + key_to * 4), key_width, d)
                _write_float32(value, f32_at(values + value_to * 4), 1, d)
            else:
                _write_bfloat16(key, u16_at(keys + key_to * 2), key_width, d)
                _write_bfloat16(value, u16_at(values + value_to * 2), 1, d)


@numba.njit
def _turn(low, high, cos, sin, half):  # type: ignore[no-untyped-def]
    for i in range(half):
        x, y = low[i], high[i]
        low[i] = x * cos[i] - y * sin[i]
        high[i] = y * cos[i] + x * sin[i]


@numba.njit
def _write_float32(source, target, stride, d):  # type: ignore[no-untyped-def]
    for i in range(d):
        target[i * stride] = source[i]


@numba.njit
def _write_bfloat16(source, target, stride, d):  # type: ignore[no-untyped-def]
    for i in range(d):
        target[i * stride] = bfloat16_of(source[i])
