"""Random numbers for sampling: to the bit those of docs/decisions/0004, which the cpu backend draws.

Every operation is float32, rounded by itself: kernels that draw are launched with enable_fp_fusion=False.
"""

from __future__ import annotations

import math
import struct

import triton
import triton.language as tl


def float32(x: float) -> float:
    """The nearest float32: what a constant is when a kernel computes with it."""
    nearest: float = struct.unpack("f", struct.pack("f", x))[0]
    return nearest


HIGHEST_GUMBEL = tl.constexpr(22.88)
"""No number is higher: the highest is -ln(2^-33)."""
LN2 = tl.constexpr(float32(math.log(2.0)))
_C1, _C2, _C3, _C4, _C5, _C6, _C7 = (tl.constexpr(float32(1 / (2 * n + 1))) for n in range(1, 8))


@triton.jit
def _twice_atanh(t):
    s = t * t
    return (t + t) * (1.0 + s * (_C1 + s * (_C2 + s * (_C3 + s * (_C4 + s * (_C5 + s * (_C6 + s * _C7)))))))


@triton.jit
def _mantissa(x):
    """x = m * 2^k with 0.5 <= m < 1, for x > 0 and normal."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True), ((bits >> 23) - 126).to(tl.float32)


@triton.jit
def gumbel(x):
    """The Gumbel number of a random word (uint32)."""
    small = x < 0x80000000
    w = (tl.where(small, x, 0xFFFFFFFF - x).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    m, k = _mantissa(w)
    a = _twice_atanh(tl.div_rn(tl.where(small, w, 1.0 - m), tl.where(small, 2.0 - w, 1.0 + m)))
    m, k = _mantissa(tl.where(small, a, -k * LN2 + a))
    return _twice_atanh(tl.div_rn(1.0 - m, 1.0 + m)) - k * LN2


@triton.jit
def words(first, seed, position, BLOCK: tl.constexpr):
    """The random words of the tokens [first, first + BLOCK); `first` a multiple of 4."""
    counter = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = tl.zeros((BLOCK // 4,), tl.uint32)
    low = zero + (position & 0xFFFFFFFF).to(tl.uint32)
    high = zero + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, counter, zero, low, high)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
