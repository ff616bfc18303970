"""Sampling without a sort: temperature, top_k, top_p and min_p, then the largest of logit and Gumbel number.

Legend: N rows, S slots, V vocabulary. Sources: Park et al., "Qrita" (2026), for the search by several pivots at once;
Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011), for Philox. Tuned by N.

A token is, to the bit, that of the cpu backend (docs/decisions/0004): the same float32 operations, each rounded, none
contracted; weights that are whole numbers, so that sums do not depend on the tiles; and tokens ordered by depth,
(highest logit - logit) / temperature, ties by id. What top_k and top_p keep is a beginning of that order, so both come
to one key (depth's bits, id), the last one kept.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from arriero_kernels.checks import FLOATS, INDICES, expect, expect_2d
from arriero_kernels.gumbel import HIGHEST_GUMBEL, LN2, float32, gumbel, words
from arriero_kernels.numerics import widen
from arriero_kernels.ordering import NOTHING, packed, score_of, token_of
from arriero_kernels.tuning import Tuning

LARGEST_VOCABULARY = 1 << 18
"""So many weights add up to less than 2^63."""

_INFINITY = tl.constexpr(0x7F800000)
_LARGEST = tl.constexpr((1 << 63) - 1)
_LOG2E = tl.constexpr(float32(math.log2(math.e)))
_E3, _E4, _E5, _E6 = (tl.constexpr(float32(1 / math.factorial(n))) for n in (3, 4, 5, 6))
_FIRST_BOUND = tl.constexpr(0x3E800000)  # a depth of 1/4; the other bounds follow by half octaves
_HALF_OCTAVE = tl.constexpr(0x400000)
_BOUNDS = 16


@triton.jit
def _depth(x, highest, temperature):
    """(highest - x) / temperature, 0 at the highest, infinite where x is not a number."""
    lower = x < highest
    gap = tl.where(lower, highest, 0.0) - tl.where(lower, x, 0.0)
    return tl.where(x <= highest, tl.div_rn(gap, temperature), float("inf"))


@triton.jit
def _weight(depth):
    """e^-depth * 2^44, a whole number."""
    t = tl.minimum(depth * _LOG2E, 126.0)
    n = (t + 0.5).to(tl.int32)
    y = (n.to(tl.float32) - t) * LN2
    power = ((171 - n) << 23).to(tl.float32, bitcast=True)
    return ((1.0 + y * (1.0 + y * (0.5 + y * (_E3 + y * (_E4 + y * (_E5 + y * _E6)))))) * power).to(tl.int64)


@triton.jit
def _slot(slots, row, WITH_SLOTS: tl.constexpr):
    if WITH_SLOTS:
        return tl.load(slots + row).to(tl.int64)
    else:
        return row


@triton.jit
def _highest_kernel(logits, highest, V: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The highest logit of a chunk of a row."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(split * CHUNK, min((split + 1) * CHUNK, V), BLOCK):
        token = first + tl.arange(0, BLOCK)
        x = widen(tl.load(logits + row * V + token, mask=token < V, other=float("-inf")))
        best = tl.maximum(best, tl.where(x == x, x, float("-inf")))
    tl.store(highest + row * SPLITS + split, tl.max(best, 0))


@triton.jit
def _row_highest(highest, row, SPLITS: tl.constexpr):
    return tl.max(tl.load(highest + row * SPLITS + tl.arange(0, SPLITS)), 0)


@triton.jit
def _bound(j, WAYS: tl.constexpr, SHIFT: tl.constexpr):
    """The first key behind part j of all keys."""
    bits = (j * _HALF_OCTAVE + _FIRST_BOUND).to(tl.int64) << SHIFT
    return tl.where(j < WAYS - 1, bits, _LARGEST)


@triton.jit
def _parts_kernel(
    logits,
    highest,
    temperatures,
    top_ks,
    top_ps,
    slots,
    parts,
    V: tl.constexpr,
    WITH_SLOTS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    SHIFT: tl.constexpr,
    WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a chunk of a row holds below each bound: of tokens where top_k is on, else of weight."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = _slot(slots, row, WITH_SLOTS)
    temperature, k, p = tl.load(temperatures + slot), tl.load(top_ks + slot), tl.load(top_ps + slot)
    by_count = (k > 0) & (k < V)
    if (temperature > 0) & (by_count | (p < 1)):
        top = _row_highest(highest, row, SPLITS)
        way = tl.arange(0, WAYS)
        bounds = _bound(way, WAYS, SHIFT)
        below = tl.zeros((WAYS, BLOCK), tl.int64)
        for first in range(split * CHUNK, min((split + 1) * CHUNK, V), BLOCK):
            token = first + tl.arange(0, BLOCK)
            x = widen(tl.load(logits + row * V + token, mask=token < V, other=float("nan")))
            depth = _depth(x, top, temperature)
            key = (depth.to(tl.int32, bitcast=True).to(tl.int64) << SHIFT) | token
            amount = tl.where(token < V, tl.where(by_count, 1, _weight(depth)), 0)
            below += tl.where(key[None, :] < bounds[:, None], amount[None, :], 0)
        tl.store(parts + (row * SPLITS + split) * WAYS + way, tl.sum(below, 1))


@triton.jit
def _key(logits_V, token, present, top, temperature, V: tl.constexpr, SHIFT: tl.constexpr):
    x = widen(tl.load(logits_V + token, mask=present, other=float("nan")))
    depth = _depth(x, top, temperature)
    return depth, (depth.to(tl.int32, bitcast=True).to(tl.int64) << SHIFT) | token


@triton.jit
def _collect(
    logits_V, tokens, n, low, high, top, temperature, LISTED: tl.constexpr, WEIGH: tl.constexpr, V: tl.constexpr,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """List the tokens with low <= key < high, of the first n that are LISTED or of the vocabulary, in their order.

    Returns how many, their least key, the key behind their greatest, and, if to WEIGH, the sum of their weights.
    """
    least, greatest = tl.full((BLOCK,), _LARGEST, tl.int64), tl.full((BLOCK,), -1, tl.int64)
    weight = tl.zeros((BLOCK,), tl.int64)
    found = 0
    for first in range(0, n, BLOCK):
        token = first + tl.arange(0, BLOCK)
        present = token < n
        if LISTED:
            token = tl.load(tokens + token, mask=present, other=0)
        depth, key = _key(logits_V, token, present, top, temperature, V, SHIFT)
        inside = present & (key >= low) & (key < high)
        # In place: what is written lies before what has been read.
        tl.store(tokens + found + tl.cumsum(inside.to(tl.int32), 0) - 1, token, mask=inside)
        found += tl.sum(inside.to(tl.int32), 0)
        least, greatest = (
            tl.minimum(least, tl.where(inside, key, _LARGEST)),
            tl.maximum(greatest, tl.where(inside, key, -1)),
        )
        if WEIGH:
            weight += tl.where(inside, _weight(depth), 0)
    tl.debug_barrier()
    return found, tl.min(least, 0), tl.max(greatest, 0) + 1, tl.sum(weight, 0)


@triton.jit
def _last_kept(
    logits_V, tokens, n, low, high, before, limit, by_count, top, temperature, V: tl.constexpr, SHIFT: tl.constexpr,
    WAYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of n listed tokens with keys in [low, high): the key with which what is before it, and it, reach `limit`."""
    while n > 1:
        step = (high - low + WAYS - 1) // WAYS
        way = tl.arange(0, WAYS).to(tl.int64)
        bounds = low + (way + 1) * step
        parts = tl.zeros((WAYS, BLOCK), tl.int64)
        for first in range(0, n, BLOCK):
            place = first + tl.arange(0, BLOCK)
            present = place < n
            token = tl.load(tokens + place, mask=present, other=0)
            depth, key = _key(logits_V, token, present, top, temperature, V, SHIFT)
            amount = tl.where(present, tl.where(by_count, 1, _weight(depth)), 0)
            parts += tl.where(key[None, :] < bounds[:, None], amount[None, :], 0)
        below = before + tl.sum(parts, 1)
        before = tl.maximum(before, tl.max(tl.where(below < limit, below, 0), 0))
        low = low + tl.minimum(tl.sum((below < limit).to(tl.int64), 0), WAYS - 1) * step
        n, low, high, _weights = _collect(
            logits_V, tokens, n, low, tl.minimum(low + step, high), top, temperature, True, False, V, SHIFT, BLOCK
        )
    return tl.where(n == 1, low, _LARGEST)


@triton.jit(do_not_specialize=["rows"])
def _threshold_kernel(
    logits,
    highest,
    parts,
    temperatures,
    top_ks,
    top_ps,
    slots,
    tokens,
    thresholds,
    rows,
    V: tl.constexpr,
    WITH_SLOTS: tl.constexpr,
    SPLITS: tl.constexpr,
    SHIFT: tl.constexpr,
    PARTS: tl.constexpr,
    WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The last key that top_k and top_p keep, of every num_programs-th row."""
    tokens += tl.program_id(0).to(tl.int64) * V
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.zeros((), tl.int64) + index
        slot = _slot(slots, row, WITH_SLOTS)
        temperature, k, p = tl.load(temperatures + slot), tl.load(top_ks + slot), tl.load(top_ps + slot)
        by_count = (k > 0) & (k < V)
        logits_V = logits + row * V
        threshold = tl.full((), _LARGEST, tl.int64)
        if (temperature > 0) & (by_count | (p < 1)):
            top = _row_highest(highest, row, SPLITS)
            split, way = tl.arange(0, SPLITS), tl.arange(0, PARTS)
            below = tl.sum(tl.load(parts + (row * SPLITS + split[:, None]) * PARTS + way[None, :]), 0)
            total = tl.max(below, 0)
            limit = tl.where(by_count, k.to(tl.int64), _mass(p, total))
            before = tl.max(tl.where(below < limit, below, 0), 0)
            part = tl.minimum(tl.sum((below < limit).to(tl.int32), 0), PARTS - 1)
            low = tl.where(part > 0, _bound(part - 1, PARTS, SHIFT), 0)
            n, low, high, _weights = _collect(
                logits_V, tokens, V, low, _bound(part, PARTS, SHIFT), top, temperature, False, False, V, SHIFT, BLOCK
            )
            threshold = _last_kept(
                logits_V, tokens, n, low, high, before, limit, by_count, top, temperature, V, SHIFT, WAYS, BLOCK
            )
            if by_count & (p < 1):
                n, low, high, total = _collect(
                    logits_V, tokens, V, 0, threshold + 1, top, temperature, False, True, V, SHIFT, BLOCK
                )
                threshold = _last_kept(
                    logits_V, tokens, n, low, high, low * 0, _mass(p, total), p >= 1, top, temperature, V, SHIFT, WAYS,
                    BLOCK,
                )  # fmt: skip
        tl.store(thresholds + row, threshold)


@triton.jit
def _mass(p, total):
    """The weight at which top_p is reached."""
    return tl.maximum(tl.ceil(p * total.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def _choose_kernel(
    logits,
    highest,
    thresholds,
    positions,
    temperatures,
    deepest,
    seeds,
    slots,
    best,
    V: tl.constexpr,
    WITH_SLOTS: tl.constexpr,
    FILTERED: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best score of a chunk of a row, packed with its token."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = _slot(slots, row, WITH_SLOTS)
    temperature, limit = tl.load(temperatures + slot), tl.load(deepest + slot)
    seed, position = tl.load(seeds + slot), tl.load(positions + row).to(tl.int64)
    top = _row_highest(highest, row, SPLITS)
    threshold = tl.full((), _LARGEST, tl.int64)
    if FILTERED:
        threshold = tl.load(thresholds + row)
    greedy = temperature <= 0
    temperature = tl.where(greedy, 1.0, temperature)
    found = tl.full((), NOTHING, tl.int64)
    for first in range(split * CHUNK, min((split + 1) * CHUNK, V), BLOCK):
        token = first + tl.arange(0, BLOCK)
        present = token < V
        x = widen(tl.load(logits + row * V + token, mask=present, other=float("-inf")))
        if greedy:
            found = tl.maximum(found, tl.max(tl.where(present, packed(x, token), NOTHING), 0))
        else:
            depth = _depth(x, top, temperature)
            key = (depth.to(tl.int32, bitcast=True).to(tl.int64) << SHIFT) | token
            kept = present & (key <= threshold) & (depth <= limit) & (depth < float("inf"))
            reach = tl.where(kept, -depth, float("-inf")) + HIGHEST_GUMBEL
            # Most tiles hold no token that any number could lift to the best score seen so far.
            if (tl.max(kept.to(tl.int32), 0) > 0) & ((found == NOTHING) | (tl.max(reach, 0) >= score_of(found))):
                score = gumbel(words(first, seed, position, BLOCK)) - tl.where(kept, depth, 0.0)
                found = tl.maximum(found, tl.max(tl.where(kept, packed(score, token), NOTHING), 0))
    tl.store(best + row * SPLITS + split, found)


@triton.jit
def _take_kernel(best, out, SPLITS: tl.constexpr):
    """The token of the best score; 0 where none was left."""
    row = tl.program_id(0).to(tl.int64)
    found = tl.max(tl.load(best + row * SPLITS + tl.arange(0, SPLITS)), 0)
    tl.store(out + row, tl.where(found == NOTHING, 0, token_of(found)))


def deepest(min_p: float) -> float:
    """The greatest depth that min_p keeps, -ln(min_p), as a float32 not above it; infinite for min_p 0, which is off.

    What `sample` takes per slot instead of min_p: a logarithm on the device could round otherwise than the host's.
    """
    if min_p <= 0:
        return math.inf
    exact = -math.log(min_p)
    near = torch.tensor(exact, dtype=torch.float32)
    return float(near if near.item() <= exact else torch.nextafter(near, torch.tensor(-math.inf)))


def sample(
    logits_NV: torch.Tensor,
    positions_N: torch.Tensor,
    temperatures_S: torch.Tensor,
    top_ks_S: torch.Tensor,
    top_ps_S: torch.Tensor,
    deepest_S: torch.Tensor,
    seeds_S: torch.Tensor,
    slots_N: torch.Tensor | None = None,
    *,
    filtered: bool = True,
    out_N: torch.Tensor | None = None,
    tuning: Tuning | None = None,
) -> torch.Tensor:
    """The token of each row, a function of its logits, its slot's parameters and seed, and its position.

    logits_NV: [N, V] bfloat16, float16 or float32, contiguous, V at most LARGEST_VOCABULARY; they are not changed.
    A logit that is not a number is excluded where a token is drawn, and counts as the highest where it is not.
    positions_N: int64 or int32 [N], of the sampled tokens in their sequences.
    temperatures_S: float32 [S]; 0: the highest logit's token, the lowest of several, whatever else is set.
    top_ks_S: int64 or int32 [S]; 0: off.
    top_ps_S: float64 [S]; 1: off. Of what top_k leaves, renormalised.
    deepest_S: float32 [S]: `deepest(min_p)`.
    seeds_S: int64 [S], the 64 bits of a seed.
    slots_N: int64 or int32 [N], the slot of each row; None: row n's is n.
    filtered: False promises that no slot has top_k or top_p on, which saves two launches.
    out_N: int64 [N], contiguous; made if None.

    Returns out_N. A row of which no finite logit is left gives token 0. Raises ValueError for other shapes, dtypes,
    devices or strides.
    """
    n, v = expect_2d("logits_NV", logits_NV, FLOATS)
    device, slots = logits_NV.device, temperatures_S.numel()
    if not 0 < v <= LARGEST_VOCABULARY:
        raise ValueError(f"logits_NV has {v:,} columns, expected 1 to {LARGEST_VOCABULARY:,}")
    expect("positions_N", positions_N, (n,), INDICES, device)
    expect("temperatures_S", temperatures_S, (slots,), (torch.float32,), device)
    expect("top_ks_S", top_ks_S, (slots,), INDICES, device)
    expect("top_ps_S", top_ps_S, (slots,), (torch.float64,), device)
    expect("deepest_S", deepest_S, (slots,), (torch.float32,), device)
    expect("seeds_S", seeds_S, (slots,), (torch.int64,), device)
    if slots_N is not None:
        expect("slots_N", slots_N, (n,), INDICES, device)
    elif slots != n:
        raise ValueError(f"there are {n} rows and {slots} slots: slots_N says which slot each row has")
    out_N = torch.empty(n, dtype=torch.int64, device=device) if out_N is None else out_N
    expect("out_N", out_N, (n,), (torch.int64,), device)
    if n == 0:
        return out_N
    tuning = tuning or Tuning.of(device)
    parameters = {**tuning.choose("sample", n), "enable_fp_fusion": False}
    splits, block = parameters.pop("SPLITS"), parameters["BLOCK"]
    chunk = triton.cdiv(triton.cdiv(v, splits), block) * block
    shift = max(1, (v - 1).bit_length())
    by_slot = {"V": v, "WITH_SLOTS": slots_N is not None, "SPLITS": splits, "SHIFT": shift}
    highest = torch.empty(n, splits, dtype=torch.float32, device=device)
    best = torch.empty(n, splits, dtype=torch.int64, device=device)
    thresholds = best
    _highest_kernel[(n, splits)](logits_NV, highest, V=v, SPLITS=splits, CHUNK=chunk, **parameters)
    if filtered:
        parts = torch.empty(n, splits, _BOUNDS, dtype=torch.int64, device=device)
        thresholds = torch.empty(n, dtype=torch.int64, device=device)
        _parts_kernel[(n, splits)](
            logits_NV, highest, temperatures_S, top_ks_S, top_ps_S, slots_N, parts, CHUNK=chunk, WAYS=_BOUNDS,
            **by_slot, **{**parameters, "BLOCK": block // 2},  # which has a sum per token and bound in registers
        )  # fmt: skip
        # Each program has a list of its own, so there are as many programs as can run at once, not as rows.
        programs = min(n, tuning.multiprocessors)
        _threshold_kernel[(programs,)](
            logits_NV, highest, parts, temperatures_S, top_ks_S, top_ps_S, slots_N,
            torch.empty(programs, v, dtype=torch.int32, device=device), thresholds, n, PARTS=_BOUNDS, **by_slot,
            **{**tuning.choose("sample_threshold", n), "enable_fp_fusion": False},
        )  # fmt: skip
    _choose_kernel[(n, splits)](
        logits_NV, highest, thresholds, positions_N, temperatures_S, deepest_S, seeds_S, slots_N, best,
        FILTERED=filtered, CHUNK=chunk, **by_slot, **parameters,
    )  # fmt: skip
    _take_kernel[(n,)](best, out_N, SPLITS=splits, num_warps=1, enable_fp_fusion=False)
    return out_N
