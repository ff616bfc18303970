"""Counter-based random numbers, and the choice of a token with them.

Sampling is Gumbel-max: of all tokens left by the filters, take the one with the largest

    score(token) = g(token) - depth(token),    ties to the lowest id,

where depth is (highest logit - logit) / temperature, and g(token) is a Gumbel number that depends on the sequence's
seed, the token's position in the sequence and the token id, and on nothing else. So a choice needs no sum over the
vocabulary: it is a maximum, the same in whatever order or tiles it is taken, and a row's result cannot depend on the
batch around it. Where logits differ in their last bits (other layouts, prefill instead of decode after a replay),
by e at most, the choice differs only if the two best scores lie within 2e: a chance below 2e at any vocabulary size.
With the inverse of a cumulative sum, each token's boundary moves by the summed errors of all tokens before it.

The numbers, exactly, so that another backend can reproduce every bit (float32, round to nearest, no contraction of
multiply and add into one rounding):

1. Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011) with key
   (seed mod 2^32, seed / 2^32) and counter (token / 4, 0, position mod 2^32, position / 2^32) gives four words; the
   token's is x = word[token mod 4]. The counter's second word is the purpose: 0 here, others for other draws.
2. E = -ln(1 - w), w = (x + 1/2) / 2^32, an exponential number whose small values, which win, are not rounded away:
   x < 2^31: w = (float(x) + 0.5) * 2^-32, t = w / (2 - w), E = A(t)
   else:     v = (float(2^32 - 1 - x) + 0.5) * 2^-32 = m * 2^-k with 0.5 <= m < 1, t = (1 - m) / (1 + m),
             E = float(k) * LN2 + A(t)
   with A(t) = 2 atanh(t) = (t + t) * (1 + s * (C1 + s * (C2 + ... + s * C7))), s = t * t, Cn = float(1 / (2n + 1)).
3. g = -ln(E): E = m * 2^k as above, t = (1 - m) / (1 + m), g = A(t) - float(k) * LN2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compile at the first call (cached on disk), run without the interpreter's lock. Arithmetic stays IEEE's.

    Functions that call each other live in one file: the cache looks at no other.
    """
    machine: Any = numba.njit(nogil=True, cache=True)(function)
    return cast(_Function, machine)


_U32 = np.uint32
_F32 = np.float32
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)

_HALF, _ONE, _TWO = _F32(0.5), _F32(1), _F32(2)
_2_32, _2_23 = _F32(2.0**-32), _F32(2.0**-23)
_LN2 = _F32(np.log(2.0))
_C1, _C2, _C3, _C4, _C5, _C6, _C7 = (_F32(1 / (2 * n + 1)) for n in range(1, 8))

_TILE = 256
"""Tokens whose numbers are made together: long enough for vector instructions, and skipped together."""
_HIGHEST = _F32(22.88)
"""No Gumbel number is higher: the highest is -ln(2^-33) = 22.874."""
_SLACK = _F32(1e-3)
"""More than rounding adds up to in the bounds below."""


@compiled
def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Philox4x32-10: four uint32 words of a counter (four uint32) and a key (two uint32)."""
    for _ in range(10):
        p0 = _MULTIPLIER_0 * np.uint64(c0)
        p1 = _MULTIPLIER_1 * np.uint64(c2)
        c0 = _U32(p1 >> _32) ^ c1 ^ k0
        c1 = _U32(p1 & _LOW)
        c2 = _U32(p0 >> _32) ^ c3 ^ k1
        c3 = _U32(p0 & _LOW)
        k0 = _U32(k0 + _WEYL_0)
        k1 = _U32(k1 + _WEYL_1)
    return c0, c1, c2, c3


@compiled
def _twice_atanh(t: Any) -> Any:
    s = t * t
    p = _ONE + s * (_C1 + s * (_C2 + s * (_C3 + s * (_C4 + s * (_C5 + s * (_C6 + s * _C7))))))
    return (t + t) * p


@compiled
def _mantissa(x: Any) -> Any:
    """x = m * 2^k with 0.5 <= m < 1, for x > 0 and normal."""
    m, k = math.frexp(x)
    return _F32(m), _F32(k)


@compiled
def gumbel(x: Any) -> Any:
    """The Gumbel number (float32) of a random word (uint32)."""
    if x < _U32(0x80000000):
        w = (_F32(x) + _HALF) * _2_32
        e = _twice_atanh(w / (_TWO - w))
    else:
        m, k = _mantissa((_F32(_U32(0xFFFFFFFF) - x) + _HALF) * _2_32)
        e = -k * _LN2 + _twice_atanh((_ONE - m) / (_ONE + m))
    m, k = _mantissa(e)
    return _twice_atanh((_ONE - m) / (_ONE + m)) - k * _LN2


@compiled
def _words(first: Any, key: Any, position: Any, words: Any) -> None:
    """Random words of the tokens [first, first + _TILE); `first` a multiple of 4."""
    k0, k1 = _U32(key & _LOW), _U32(key >> _32)
    c2, c3 = _U32(position & _LOW), _U32(position >> _32)
    for i in range(_TILE // 4):
        w0, w1, w2, w3 = philox(_U32(first // 4 + i), _U32(0), c2, c3, k0, k1)
        words[4 * i] = w0
        words[4 * i + 1] = w1
        words[4 * i + 2] = w2
        words[4 * i + 3] = w3


@compiled
def _any_reaches(depths: Any, highest: Any, score: Any) -> Any:
    reaching = 0
    for i in range(depths.shape[0]):
        reaching += highest - depths[i] >= score
    return reaching > 0


@compiled
def _bound(words: Any, bounds: Any, bits: Any) -> Any:
    """Write what the Gumbel number of each word is at most to `bounds`; `bits` are the bounds' bits.

    g <= -ln(w), and -log2(w) <= 127 - bits(w) / 2^23: a float's bits are its logarithm, made piecewise linear.
    """
    for i in range(_TILE):
        bounds[i] = (_F32(words[i]) + _HALF) * _2_32
    for i in range(_TILE):
        bounds[i] = (_F32(127) - _F32(bits[i]) * _2_23) * _LN2 + _SLACK


@compiled
def _better(words: Any, bounds: Any, depths: Any, score: Any) -> Any:
    """The best score of a tile and its place, or `score` and -1 where none is above. (Inline, `choose` runs 2.5 times
    as long.)
    """
    at = -1
    for i in range(depths.shape[0]):
        if bounds[i] - depths[i] >= score and depths[i] < np.inf:
            exact = gumbel(words[i]) - depths[i]
            if exact > score:
                score = exact
                at = i
    return score, at


@compiled
def choose(depths_NV: Any, keys_N: Any, positions_N: Any, tokens_N: Any) -> None:
    """Write each row's token, the one with the best score, to `tokens_N` (int64).

    depths_NV: float32, contiguous, >= 0, infinite where a token is excluded; keys_N: uint64; positions_N: int64.
    A row without any finite depth gives token 0.
    """
    rows, vocab = depths_NV.shape
    words = np.empty(_TILE, np.uint32)
    bounds = np.empty(_TILE, np.float32)
    bits = bounds.view(np.int32)
    for row in range(rows):
        best_score = _F32(-np.inf)
        best = 0
        for first in range(0, vocab, _TILE):
            depths = depths_NV[row, first : first + _TILE]
            # Most tiles hold no token that any number could lift to the best score seen so far.
            if not _any_reaches(depths, _HIGHEST, best_score):
                continue
            _words(first, keys_N[row], np.uint64(positions_N[row]), words)
            _bound(words, bounds, bits)
            best_score, at = _better(words, bounds, depths, best_score)
            if at >= 0:
                best = first + at
        tokens_N[row] = best
