"""Sampling as documented, one row at a time, in plain numpy: what the runner's compiled code is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from arriero_worker.engine.messages import SamplingParams

F = np.float32


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low = 0xFFFFFFFF
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [c0, c1, c2, c3]


def words(seed: int, position: int, vocab: int) -> np.ndarray:
    """uint32 [vocab], the random word of each token."""
    seed &= (1 << 64) - 1
    counters = range(-(-vocab // 4))
    key, high = (seed & 0xFFFFFFFF, seed >> 32), (position & 0xFFFFFFFF, position >> 32)
    return np.array([w for c in counters for w in philox((c, 0, *high), key)][:vocab], dtype=np.uint32)


def _a(t: np.ndarray) -> np.ndarray:
    s = t * t
    p = F(1 / 15)
    for n in (13, 11, 9, 7, 5, 3, 1):
        p = F(1 / n) + s * p
    return (t + t) * p


def gumbel(x: np.ndarray) -> np.ndarray:
    """float32, step by step as `runner/random.py` states it."""
    w = (x.astype(F) + F(0.5)) * F(2.0**-32)
    m, k = np.frexp(((~x).astype(F) + F(0.5)) * F(2.0**-32))
    low = _a(w / (F(2) - w))
    high = (-k).astype(F) * F(math.log(2)) + _a((F(1) - m) / (F(1) + m))
    m, k = np.frexp(np.where(x < 2**31, low, high))
    result: np.ndarray = _a((F(1) - m) / (F(1) + m)) - k.astype(F) * F(math.log(2))
    return result


def edited(logits: np.ndarray, tokens: Sequence[int], prompt_length: int, sampling: SamplingParams) -> np.ndarray:
    """Penalties, bias and ban; `tokens` are the sequence so far."""
    x = logits.astype(F)
    output = tokens[prompt_length:]
    for token in set(tokens):
        r = F(sampling.repetition_penalty)
        x[token] = x[token] / r if x[token] > 0 else x[token] * r
    for token in set(output):
        x[token] -= F(sampling.presence_penalty)
        x[token] -= F(sampling.frequency_penalty) * F(output.count(token))
    for token, bias in sampling.logit_bias.items():
        x[token] += F(bias)
    if len(output) < sampling.min_tokens:
        x[list(sampling.stop_token_ids)] = -np.inf
    return x


def filtered(x: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """Depths, float32, infinite where excluded."""
    with np.errstate(over="ignore"):
        depths = (x.max() - x) / F(sampling.temperature)
    order = sorted(range(len(x)), key=lambda token: (depths[token], token))
    if sampling.top_k > 0:
        order = order[: sampling.top_k]
    weights = np.exp(-depths[order].astype(np.float64))
    weights /= weights.sum()
    before = np.concatenate([[0.0], np.cumsum(weights)[:-1]])
    if sampling.top_p < 1:
        order = [token for token, mass in zip(order, before, strict=True) if mass < sampling.top_p] or order[:1]
    kept = [token for token in order if math.exp(-depths[token]) >= sampling.min_p]
    result = np.full_like(depths, np.inf)
    result[kept] = depths[kept]
    return result


def probabilities(x: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """float64 [vocab], after temperature and filters."""
    weights = np.exp(-filtered(x, sampling).astype(np.float64))
    result: np.ndarray = weights / weights.sum()
    return result


def sample(logits: np.ndarray, tokens: Sequence[int], prompt_length: int, sampling: SamplingParams) -> int:
    """The next token of a sequence."""
    x = edited(logits, tokens, prompt_length, sampling)
    if sampling.temperature == 0:
        return int(np.argmax(x))
    scores = gumbel(words(sampling.seed, len(tokens), len(x))) - filtered(x, sampling)
    return int(np.argmax(scores))
