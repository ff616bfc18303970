"""Numbers inside kernels: widening on load, rounding on store, on the device and in Triton's interpreter alike.

Kernels compute in float32. The interpreter does arithmetic on bfloat16's bits, cuts off what does not fit into bfloat16
and misreads subnormal numbers, all without a word; so every kernel loads through `widen` and stores through `narrow`,
which on a device are the plain conversions.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run in the interpreter: fixed when Triton decorates them, that is, when this package is imported."""

FLOAT8_MAX = 448.0
"""Largest float8_e4m3fn."""
INT8_MAX = 127.0
"""Symmetric: -128 is not used."""

_FLOAT8_MAX = tl.constexpr(FLOAT8_MAX)
_INT8_MAX = tl.constexpr(INT8_MAX)
_RINT = tl.constexpr(12582912.0)  # 1.5 * 2**23: a float32 this large has no fraction bits


@triton.jit
def widen(x):
    """To float32, exactly."""
    if INTERPRET and x.dtype == tl.float8e4nv:
        bits = x.to(tl.uint8, bitcast=True).to(tl.uint32)
        exponent = (bits >> 3) & 15
        mantissa = bits & 7
        normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
        size = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
        size = tl.where((bits & 127) == 127, float("nan"), size)
        return (size.to(tl.uint32, bitcast=True) | ((bits >> 7) << 31)).to(tl.float32, bitcast=True)
    elif INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def rint(x):
    """float32 to the nearest whole number, ties to even, for |x| < 2**22."""
    return (x + _RINT) - _RINT


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 to `dtype`: to nearest, ties to even; float8 and int8 saturate."""
    if dtype == tl.int8:
        return rint(tl.minimum(tl.maximum(x, -_INT8_MAX), _INT8_MAX)).to(tl.int8)
    elif INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x != x, 0x7FC0, bits)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif INTERPRET and dtype == tl.float8e4nv:
        size = tl.where(x != x, 0.0, tl.minimum(tl.abs(x), _FLOAT8_MAX))
        bits = size.to(tl.uint32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
        code = tl.where(size < 0.015625, rint(size * 512.0).to(tl.uint32), normal)
        code = tl.where(x != x, 127, code)
        sign = (x.to(tl.uint32, bitcast=True) >> 31) << 7
        return (code | sign).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """To another float dtype, which holds every value of x or is rounded to as `narrow` does."""
    if x.dtype == dtype:
        return x
    elif INTERPRET:
        return narrow(widen(x), dtype)
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b, acc=None):
    """a @ b (+ acc), of one dtype: int8 to int32, all others to float32; float32 keeps its precision."""
    if INTERPRET and a.dtype != tl.int8:
        return tl.dot(widen(a), widen(b), acc, input_precision="ieee")
    elif a.dtype == tl.int8:
        return tl.dot(a, b, acc, out_dtype=tl.int32)
    else:
        return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def scale_of(amax, dtype: tl.constexpr):
    """The scale by which values up to `amax` fill `dtype`; of zeros, one that is harmless to divide by."""
    if dtype == tl.int8:
        return tl.maximum(amax, 1e-12) / _INT8_MAX
    else:
        return tl.maximum(amax, 1e-12) / _FLOAT8_MAX


NONE = tl.constexpr(0)
PER_TENSOR = tl.constexpr(1)
PER_TOKEN = tl.constexpr(2)
PER_GROUP = tl.constexpr(3)


@triton.jit
def store_row(y, column, n, out, scales, SCALING: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Write one row y [BLOCK] float32, whose columns from n on are zeros, to `out`, in its dtype.

    SCALING: NONE; PER_TENSOR: divided by the scale that `scales` points at; PER_TOKEN and PER_GROUP: divided by the
    row's, or each GROUP columns', own scale, which is written to `scales`.
    """
    dtype: tl.constexpr = out.dtype.element_ty
    if SCALING == PER_TENSOR:
        y = y * (1.0 / tl.load(scales))
    elif SCALING == PER_TOKEN:
        scale = scale_of(tl.max(tl.abs(y), 0), dtype)
        tl.store(scales, scale)
        y = y * (1.0 / scale)
    elif SCALING == PER_GROUP:
        y_GC = tl.reshape(y, (BLOCK // GROUP, GROUP))
        scale_G = scale_of(tl.max(tl.abs(y_GC), 1), dtype)
        group = tl.arange(0, BLOCK // GROUP)
        tl.store(scales + group, scale_G, mask=group < n // GROUP)
        y = tl.reshape(y_GC * (1.0 / scale_G)[:, None], (BLOCK,))
    tl.store(out + column, narrow(y, dtype), mask=column < n)
