"""Paged causal attention with an online softmax, for prefill chunks and decodes in one batch.

Work is cut into items: a run of one sequence's queries with one KV head, so that a key read once serves all query heads
that share it. Threads take items from a counter. Keys go by in spans that begin at multiples of the span's length
in the sequence, whatever the chunk: a query meets the same spans in the same order in a prefill, a chunk of one, or a
decode, and gets the same bits.
"""

from __future__ import annotations

import math
import struct

import numba
import numpy as np

from arriero_worker.model.cpu.elementwise import exp_float32
from arriero_worker.model.cpu.native import call_tile, f32_at, f64_at, fetch_add, i32_at, i64_at, u16_at
from arriero_worker.model.cpu.tiles import FLOAT32, MAX_ROWS, PANEL

LAYOUT = struct.Struct("d24q")
"""scale, then qkv, out, keys, values, positions, query starts, context lengths, block tables, table width, work, items,
counter, heads, kv heads, D, block size, key width, value width, window (0: none), kind, scratch, bytes of scratch,
tables of tiles for keys and for float32."""

_ROWS = 48
_SPAN = 64
_MINUS_INFINITY = np.float32(-np.inf)
_ZERO = np.float32(0.0)


def queries_per_item(heads: int, kv_heads: int) -> int:
    return max(1, _ROWS // (heads // kv_heads))


def span_blocks(block_size: int) -> int:
    """Blocks of a span."""
    return max(1, _SPAN // block_size)


def scratch_bytes(heads: int, kv_heads: int, head_dim: int, block_size: int, key_width: int, value_width: int) -> int:
    """Of each thread: queries, scores, sums, two numbers a row, and a span's values."""
    rows = queries_per_item(heads, kv_heads) * (heads // kv_heads)
    blocks = span_blocks(block_size)
    return 4 * (rows * (head_dim + blocks * key_width + value_width + 2) + blocks * block_size * value_width)


WORK_LAYOUT = struct.Struct("5q")
"""query starts, B, queries per item, work, count."""


def work_kernel(arguments, thread, threads):  # type: ignore[no-untyped-def]
    """Cut each sequence's queries into runs: work[i] = (sequence, first query); count[0] = how many."""
    if thread != 0:
        return
    a = i64_at(arguments)
    starts, sequences, step, work = i32_at(a[0]), a[1], a[2], i32_at(a[3])
    count = 0
    for b in range(sequences):
        for q in range(starts[b], starts[b + 1], step):
            work[2 * count] = b
            work[2 * count + 1] = q
            count += 1
    i64_at(a[4])[0] = count


def attention_kernel(arguments, thread, threads):  # type: ignore[no-untyped-def]
    a = i64_at(arguments)
    kv_heads, work, items, counter = a[14], i32_at(a[10]), a[11], a[12]
    scratch = a[21] + thread * a[22]
    scale = np.float32(f64_at(arguments)[0])
    while True:
        i = fetch_add(counter, 1)
        if i >= items * kv_heads:
            return
        # From the back: a prompt's last queries have the most keys, and the longest work should not come last.
        unit = items - 1 - i // kv_heads
        _item(a, work[2 * unit], work[2 * unit + 1], i % kv_heads, scratch, scale)


@numba.njit
def _item(a, sequence, first, kv_head, scratch, scale):  # type: ignore[no-untyped-def]
    qkv, out, keys, values, positions = a[1], a[2], a[3], a[4], i64_at(a[5])
    starts, lengths, table = i32_at(a[6]), i32_at(a[7]), i32_at(a[8] + sequence * a[9] * 4)
    heads, kv_heads, d, block_size, key_width, value_width, window, kind = (
        a[13], a[14], a[15], a[16], a[17], a[18], a[19], a[20]
    )  # fmt: skip
    key_tiles, float32_tiles = a[23], a[24]
    group = heads // kv_heads
    queries = min(starts[sequence + 1] - first, max(1, _ROWS // group))
    rows = queries * group
    blocks = max(1, _SPAN // block_size)
    width = blocks * key_width
    x_at = scratch
    s_at = x_at + rows * d * 4
    o_at = s_at + rows * width * 4
    best, total = f32_at(o_at + rows * value_width * 4), f32_at(o_at + rows * (value_width + 1) * 4)
    v_at = o_at + rows * (value_width + 2) * 4
    sums = f32_at(o_at)
    for r in range(rows):
        best[r] = _MINUS_INFINITY
        total[r] = _ZERO
    for i in range(rows * value_width):
        sums[i] = _ZERO
    row_bytes = (heads + 2 * kv_heads) * d * 4
    for r in range(rows):
        source = f32_at(qkv + (first + r // group) * row_bytes + (kv_head * group + r % group) * d * 4)
        _scaled_copy(f32_at(x_at + r * d * 4), source, scale, d)
    element = 4 if kind == FLOAT32 else 2
    key_bytes, value_bytes = d * key_width * element, block_size * value_width * element
    end = min(positions[first + queries - 1] + 1, np.int64(lengths[sequence]))
    begin = max(0, positions[first] - window + 1) if window > 0 else 0
    for span in range(begin // block_size // blocks, (end - 1) // block_size // blocks + 1):
        first_key = span * blocks * block_size
        seen = min(end - first_key, blocks * block_size)
        for j in range((seen + block_size - 1) // block_size):
            block = np.int64(table[span * blocks + j])
            at = keys + (block * kv_heads + kv_head) * key_bytes
            _scores(key_tiles, x_at, rows, d, at, key_width, element, s_at + j * key_width * 4, width)
            at = values + (block * kv_heads + kv_head) * value_bytes
            count = min(block_size, seen - j * block_size) * value_width
            _gather(v_at + j * block_size * value_width * 4, at, count, kind)
        for r in range(rows):
            position = positions[first + r // group] - first_key
            s = f32_at(s_at + r * width * 4)
            for j in range(blocks):
                visible = min(position + 1, seen) - j * block_size
                hidden = position - window + 1 - j * block_size if window > 0 else 0
                _mask(s, j * key_width, key_width, hidden, min(visible, block_size))
            _softmax(s, width, best, total, r, f32_at(o_at + r * value_width * 4), value_width)
        if key_width != block_size:
            _close_gaps(f32_at(s_at), rows, width, blocks, key_width, block_size)
        _add_values(float32_tiles, s_at, rows, width, v_at, value_width, o_at, seen)
    for r in range(rows):
        target = f32_at(out + ((first + r // group) * heads + kv_head * group + r % group) * d * 4)
        _scaled_copy(target, f32_at(o_at + r * value_width * 4), np.float32(1.0) / total[r], d)


@numba.njit
def _scores(tiles, x, rows, d, keys, key_width, element, scores, width):  # type: ignore[no-untyped-def]
    """All rows against one block's keys."""
    for c in range(0, key_width, PANEL):
        r = 0
        while r < rows:
            m = _next_rows(rows - r)
            to = scores + (r * width + c) * 4
            call_tile(tiles, m, x + r * d * 4, d * 4, 4, keys + c * element, key_width * element, to, width * 4, d, 0)
            r += m


@numba.njit
def _gather(target, source, count, kind):  # type: ignore[no-untyped-def]
    """A block's values behind the others of the span, in float32: sums over a whole span keep their registers four
    times as long as sums over a block, and all rows share the conversion.
    """
    if kind == FLOAT32:
        _copy(f32_at(target), f32_at(source), count)
    else:
        _widen(i32_at(target), u16_at(source), count)


@numba.njit
def _add_values(tiles, weights, rows, width, values, value_width, sums, count):  # type: ignore[no-untyped-def]
    r = 0
    while r < rows:
        m = _next_rows(rows - r)
        for c in range(0, value_width, PANEL):
            to = sums + (r * value_width + c) * 4
            w_k = value_width * 4
            call_tile(tiles, m, weights + r * width * 4, width * 4, 4, values + c * 4, w_k, to, w_k, count, 1)
        r += m


@numba.njit(inline="always")
def _next_rows(left):  # type: ignore[no-untyped-def]
    """Even parts: 8 rows are 4 and 4, not 6 and 2."""
    parts = (left + MAX_ROWS - 1) // MAX_ROWS
    return (left + parts - 1) // parts


@numba.njit
def _copy(target, source, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        target[i] = source[i]


@numba.njit
def _widen(target, source, n):  # type: ignore[no-untyped-def]
    """bfloat16 bits to float32 bits."""
    for i in range(n):
        target[i] = np.int32(source[i]) << np.int32(16)


@numba.njit
def _close_gaps(s, rows, width, blocks, key_width, block_size):  # type: ignore[no-untyped-def]
    """Where blocks are padded to a panel: move each block's weights next to those of the block before."""
    for r in range(rows):
        for j in range(1, blocks):
            for i in range(block_size):
                s[r * width + j * block_size + i] = s[r * width + j * key_width + i]


@numba.njit
def _scaled_copy(target, source, scale, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        target[i] = source[i] * scale


@numba.njit
def _mask(s, base, width, hidden, visible):  # type: ignore[no-untyped-def]
    """Keep scores [hidden, visible) of a block."""
    for i in range(max(0, min(hidden, width))):
        s[base + i] = _MINUS_INFINITY
    for i in range(max(0, visible), width):
        s[base + i] = _MINUS_INFINITY


@numba.njit
def _softmax(s, width, best, total, r, sums, value_width):  # type: ignore[no-untyped-def]
    """Turn a span's scores into weights relative to the best score so far, rescaling what was summed before."""
    top = max(_largest(s, width), best[r])
    if top == _MINUS_INFINITY:  # nothing of this span is visible, nor of those before
        for i in range(width):
            s[i] = _ZERO
        return
    if top > best[r]:
        fade = exp_float32(best[r] - top)
        total[r] *= fade
        for i in range(value_width):
            sums[i] *= fade
        best[r] = top
    _exp(s, width, top)
    total[r] += _sum(s, width)


@numba.njit(fastmath={"contract"})
def _exp(s, width, top):  # type: ignore[no-untyped-def]
    for i in range(width):
        s[i] = exp_float32(s[i] - top)


@numba.njit(fastmath={"nnan", "nsz"})
def _largest(s, width):  # type: ignore[no-untyped-def]
    largest = _MINUS_INFINITY
    for i in range(width):
        largest = s[i] if s[i] > largest else largest
    return largest


@numba.njit(fastmath={"reassoc"})
def _sum(s, width):  # type: ignore[no-untyped-def]
    total = _ZERO
    for i in range(width):
        total += s[i]
    return total


def softmax_scale(head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim)
