"""The linear kernel: out[T, N] = x[T, K] @ w[N, K].T + bias, float32 in and out, weights packed in panels.

A panel holds 16 columns of the result: for every k the 16 weights that meet x[:, k], one behind the other (see
`native` for the two formats). Threads share out the panels. Few tokens stream each panel once from memory, through as
many register tiles as the tokens need. Many tokens are cut into blocks that stay in the second-level cache, repacked so
that a tile reads its rows side by side; weights then come from memory once per block of tokens.
"""

from __future__ import annotations

import struct

import numba

from arriero_worker.model.cpu.native import call_tile, f32_at, i32_at, i64_at, u16_at
from arriero_worker.model.cpu.tiles import FLOAT32, MAX_ROWS, PANEL

LAYOUT = struct.Struct("11q")
"""x, w, bias (0: none), out, T, N, K, bytes of a weight, table of tiles, scratch, tail (where N needs one)."""

_FEW = 36
_TOKENS = 96
_DEPTH = 512  # of one chain of multiply-adds, the same for any number of tokens, so that results are too
SCRATCH_BYTES = _TOKENS * _DEPTH * 4
"""Of each thread."""


def tail_bytes(tokens: int) -> int:
    """Room for the last, partial panel."""
    return tokens * PANEL * 4


PACK_LAYOUT = struct.Struct("6q")
"""weight, its elements from row to row, panels, N, K, bytes of a weight."""

_PACK_DEPTH = 64


def pack_kernel(arguments, thread, threads):  # type: ignore[no-untyped-def]
    """Write a weight [N, K] into panels: [ceil(N / 16), K, 16] float32 in order, or bfloat16 as `tiles.PAIRED`. Columns
    that fill up the last panel are zeros.
    """
    a = i64_at(arguments)
    weight, stride, panels, n, k, element = a[0], a[1], a[2], a[3], a[4], a[5]
    count = (n + PANEL - 1) // PANEL
    for p in range(count * thread // threads, count * (thread + 1) // threads):
        at = panels + p * k * PANEL * element
        for k0 in range(0, k, _PACK_DEPTH):
            span = min(_PACK_DEPTH, k - k0)
            for c in range(PANEL):
                row = p * PANEL + c
                if element == 4:
                    source, target = i32_at(weight + (row * stride + k0) * 4), i32_at(at + (k0 * PANEL + c) * 4)
                    for i in range(span):
                        target[i * PANEL] = source[i] if row < n else 0
                else:
                    half = u16_at(weight + (row * stride + k0) * 2)
                    place = 2 * (c % (PANEL // 2)) + c // (PANEL // 2)
                    pair = u16_at(at + (k0 * PANEL + place) * 2)
                    for i in range(span):
                        pair[i * PANEL] = half[i] if row < n else 0


def linear_kernel(arguments, thread, threads):  # type: ignore[no-untyped-def]
    a = i64_at(arguments)
    x, w, bias, out, tokens, n, k = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    w_k, tiles, scratch, tail = PANEL * a[7], a[8], a[9] + thread * SCRATCH_BYTES, a[10]
    panels = (n + PANEL - 1) // PANEL
    first = panels * thread // threads
    end = panels * (thread + 1) // threads
    if tokens <= _FEW:
        for p in range(first, end):
            to, to_row = _target(out, tail, 0, n, p)
            if bias != 0:
                _fill(to, to_row, tokens, bias + p * PANEL * 4)
            for k0 in range(0, k, _DEPTH):
                span = min(_DEPTH, k - k0)
                at = w + (p * k + k0) * w_k
                accumulate = 1 if k0 > 0 or bias != 0 else 0
                r = 0
                while r < tokens:
                    groups = (tokens - r + MAX_ROWS - 1) // MAX_ROWS
                    rows = (tokens - r + groups - 1) // groups
                    from_x = x + (r * k + k0) * 4
                    call_tile(tiles, rows, from_x, k * 4, 4, at, w_k, to + r * to_row, to_row, span, accumulate)
                    r += rows
    else:
        for t0 in range(0, tokens, _TOKENS):
            count = min(_TOKENS, tokens - t0)
            for k0 in range(0, k, _DEPTH):
                span = min(_DEPTH, k - k0)
                _gather(x + (t0 * k + k0) * 4, k, count, span, scratch)
                for p in range(first, end):
                    to, to_row = _target(out, tail, t0, n, p)
                    if bias != 0 and k0 == 0:
                        _fill(to, to_row, count, bias + p * PANEL * 4)
                    at = w + (p * k + k0) * w_k
                    accumulate = 1 if k0 > 0 or bias != 0 else 0
                    for r in range(0, count, MAX_ROWS):
                        rows = min(MAX_ROWS, count - r)
                        from_x = scratch + r * span * 4
                        call_tile(tiles, rows, from_x, 4, rows * 4, at, w_k, to + r * to_row, to_row, span, accumulate)
    if n % PANEL != 0 and end == panels and end > first:
        source, target, start = f32_at(tail), f32_at(out), (panels - 1) * PANEL
        for t in range(tokens):
            for c in range(n - start):
                target[t * n + start + c] = source[t * PANEL + c]


@numba.njit(inline="always")
def _target(out, tail, token, n, panel):  # type: ignore[no-untyped-def]
    """Where a panel's results go, and the bytes from row to row; a partial panel's are copied at the end."""
    if panel * PANEL + PANEL > n:
        return tail + token * PANEL * 4, PANEL * 4
    return out + (token * n + panel * PANEL) * 4, n * 4


@numba.njit
def _gather(x, x_row, count, span, scratch):  # type: ignore[no-untyped-def]
    """Lay `count` rows of `span` values into groups of MAX_ROWS, the rows of a group interleaved."""
    source, target = f32_at(x), f32_at(scratch)
    for r in range(0, count, MAX_ROWS):
        rows = min(MAX_ROWS, count - r)
        base = r * span
        for i in range(rows):
            for j in range(span):
                target[base + j * rows + i] = source[(r + i) * x_row + j]


@numba.njit
def _fill(out, out_row, count, bias):  # type: ignore[no-untyped-def]
    values = f32_at(bias)
    for t in range(count):
        row = f32_at(out + t * out_row)
        for c in range(PANEL):
            row[c] = values[c]


EMBED_LAYOUT = struct.Struct("8q")
"""tokens, w, out, T, K, first token, end token, kind."""


def embed_kernel(arguments, thread, threads):  # type: ignore[no-untyped-def]
    """out[T, K] float32: rows of a packed table of tokens [first, end), zeros for others."""
    a = i64_at(arguments)
    tokens, w, out, count, k, first, end, kind = i64_at(a[0]), a[1], f32_at(a[2]), a[3], a[4], a[5], a[6], a[7]
    words, floats = i32_at(w), f32_at(w)
    out_words = i32_at(a[2])
    half = PANEL // 2
    for t in range(count * thread // threads, count * (thread + 1) // threads):
        token = tokens[t]
        row = token - first
        if token < first or token >= end:
            for i in range(k):
                out[t * k + i] = 0.0
        elif kind == FLOAT32:
            base = (row // PANEL) * k * PANEL + row % PANEL
            for i in range(k):
                out[t * k + i] = floats[base + i * PANEL]
        else:
            base = (row // PANEL) * k * half + row % half
            high = row % PANEL >= half
            for i in range(k):
                word = words[base + i * half]
                out_words[t * k + i] = (word & -65536) if high else (word << 16)
