"""A number and its token in one integer, whose order is the order of the pair: so a maximum finds both at once."""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(-(1 << 63))
"""Below every pair."""


@triton.jit
def packed(score, token):
    """int64, ordered by score, and by falling token where scores are equal; what is not a number comes highest."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def score_of(packed):
    ordered = (packed >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def token_of(packed):
    return 0x7FFFFFFF - (packed & 0xFFFFFFFF)
