"""Temperature, top_k, top_p and min_p, row by row.

A row is a function of itself and its own parameters: no library reduction, whose order may change with the batch's
shape, takes part. Tokens are ordered by logit, highest first, ties by id, so each filter keeps one defined set.

top_p adds up weights that are whole numbers, so that their sum is the same in whatever order or tiles it is taken
(float32, round to nearest, no contraction of multiply and add into one rounding; then int64):

    t = min(depth * LOG2E, 126), n = floor(t + 0.5), y = (n - t) * LN2,
    weight = floor((1 + y * (1 + y * (1/2! + y * (1/3! + ... + y / 6!)))) * 2^(44 - n)).

Tokens before which the sum is less than ceil(top_p * total), in float64, and not less than 1, are kept.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from arriero_worker.runner.random import compiled

_F32 = np.float32
_LOG2E = _F32(math.log2(math.e))
_LN2 = _F32(math.log(2.0))
_E2, _E3, _E4, _E5, _E6 = (_F32(1 / math.factorial(n)) for n in range(2, 7))
_BINS = 1 << 13


@compiled
def _weights(depths: Any, values: Any, powers: Any, bits: Any, weights: Any) -> None:
    """weights = e^-depths * 2^44 (int64; to 1e-6 of the value, cut off). `bits` are the bits of `powers`; `values` and
    `powers` are float32 to work in.
    """
    for i in range(depths.shape[0]):
        t = min(depths[i] * _LOG2E, _F32(126))
        n = np.int32(t + _F32(0.5))
        y = (_F32(n) - t) * _LN2
        bits[i] = (np.int32(127 + 44) - n) << np.int32(23)
        values[i] = _F32(1) + y * (_F32(1) + y * (_E2 + y * (_E3 + y * (_E4 + y * (_E5 + y * _E6)))))
    for i in range(depths.shape[0]):
        weights[i] = np.int64(values[i] * powers[i])


@compiled
def _keep(depths: Any, weights: Any, limit: Any, bins: Any) -> None:
    """Keep each token before which, in order, the weights sum to less than `limit` (> 0); others' depths become
    infinite. `weights` and `limit`: int64; `bins`: int64 [_BINS].

    The depth at which the sum reaches the limit is found digit by digit: depths are not negative, so their bits are
    ordered as they are. No sort, so a flat row costs no more than a steep one.
    """
    bits = depths.view(np.uint32)
    before, found = np.int64(0), np.uint32(0)
    above = np.uint32(31)
    for shift in (np.uint32(18), np.uint32(9), np.uint32(0)):
        last = (1 << (above - shift)) - 1
        bins[: last + 1] = 0
        for i in range(depths.shape[0]):
            if bits[i] >> above == found:
                bins[(bits[i] >> shift) & np.uint32(last)] += weights[i]
        digit = 0
        while digit < last and before + bins[digit] < limit:
            before += bins[digit]
            digit += 1
        found = np.uint32((found << (above - shift)) + digit)
        above = shift
    for i in range(depths.shape[0]):
        if bits[i] > found or (bits[i] == found and before >= limit):
            depths[i] = np.inf
        elif bits[i] == found:
            before += weights[i]


@compiled
def filter_rows(logits_NV: Any, temperatures_N: Any, top_ks_N: Any, top_ps_N: Any, min_ps_N: Any) -> None:
    """Replace logits (float32, contiguous) by depths: (highest - logit) / temperature, infinite for tokens that
    top_k, then top_p (of what is left, renormalised), then min_p exclude.

    temperatures_N: float32, > 0; top_ks_N: int64, 0: off; top_ps_N, min_ps_N: float64. The highest logit (the lowest
    id of several) is always left. A logit that is not a number is excluded.
    """
    rows, vocab = logits_NV.shape
    weights = np.empty(vocab, np.int64)
    values, powers = np.empty(vocab, np.float32), np.empty(vocab, np.float32)
    power_bits = powers.view(np.int32)
    bins = np.empty(_BINS, np.int64)
    for row in range(rows):
        depths = logits_NV[row]
        highest = _F32(-np.inf)
        for i in range(vocab):
            highest = max(highest, depths[i])
        _to_depths(depths, highest, temperatures_N[row])
        if 0 < top_ks_N[row] < vocab:
            weights[:] = 1
            _keep(depths, weights, np.int64(top_ks_N[row]), bins)
        if top_ps_N[row] < 1.0:
            _weights(depths, values, powers, power_bits, weights)
            total = np.int64(0)
            for i in range(vocab):
                total += weights[i]
            _keep(depths, weights, max(np.int64(math.ceil(top_ps_N[row] * np.float64(total))), np.int64(1)), bins)
        if min_ps_N[row] > 0.0:
            deepest = -math.log(min_ps_N[row])
            for i in range(vocab):
                if depths[i] > deepest:
                    depths[i] = np.inf


@compiled
def _to_depths(depths: Any, highest: Any, temperature: Any) -> None:
    for i in range(depths.shape[0]):
        depth = (highest - depths[i]) / temperature if depths[i] < highest else _F32(0)
        depths[i] = depth if depths[i] <= highest else _F32(np.inf)
