"""Each kernel of the cpu backend against plain torch in float64, at odd sizes; the pool that runs them."""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Iterator

import numba
import pytest
import torch
from tests.worker.stages import Blocks, make_batch

from arriero_worker.model.backend import AttentionShape
from arriero_worker.model.cpu import memory, onednn
from arriero_worker.model.cpu.backend import CpuBackend
from arriero_worker.model.cpu.native import exchange, fetch_add, i64_at
from arriero_worker.model.cpu.pool import BRIEF_SPIN, SPIN, Pool
from arriero_worker.model.forward import ForwardBatch

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16"])
def backend(request: pytest.FixtureRequest, threads: int) -> Iterator[CpuBackend]:
    made = CpuBackend(request.param, threads)
    yield made
    made.close()


@pytest.fixture
def plain() -> CpuBackend:
    return CpuBackend(torch.float32, 1)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- linear

# Tokens on both sides of every cut: one tile, several tiles, blocks that are repacked, a second block.
TOKENS = [0, 1, 2, 5, 6, 7, 13, 36, 37, 100, 193]
# Outputs below, at and beyond a panel; inputs around the unrolled step, and beyond a cut in depth.
SIZES = [(16, 64), (1, 1), (7, 5), (15, 3), (17, 33), (48, 6), (131, 130), (33, 1100)]


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("biased", [False, True])
def test_linear(backend: CpuBackend, n: int, k: int, biased: bool) -> None:
    weight = randn(n, k).to(backend.dtype)
    bias = randn(n, seed=1).to(backend.dtype) if biased else None
    packed = backend.pack_linear(weight, bias)
    for tokens in TOKENS:
        x = randn(tokens, k, seed=2)
        found = backend.linear(x, packed, "out")
        assert found.shape == (tokens, n)
        assert found.is_contiguous()
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        torch.testing.assert_close(found.double(), expected, atol=2e-6 * k**0.5 + 1e-6, rtol=1e-6)


def test_linear_writes_its_result_and_nothing_else(backend: CpuBackend) -> None:
    packed = backend.pack_linear(randn(19, 40).to(backend.dtype), None)
    guard = backend._space.take("out", 50, 19)
    guard.fill_(7.0)
    backend.linear(randn(40, 40), packed, "out")
    assert torch.equal(guard[40:], torch.full((10, 19), 7.0))
    assert not (guard[:40] == 7.0).any()


def test_a_tokens_result_does_not_depend_on_its_neighbours(backend: CpuBackend) -> None:
    packed = backend.pack_linear(randn(100, 700).to(backend.dtype), randn(100).to(backend.dtype))
    x = randn(193, 700)
    whole = backend.linear(x, packed, "whole").clone()
    for tokens in TOKENS[1:]:
        assert torch.equal(backend.linear(x[:tokens].contiguous(), packed, "part"), whole[:tokens]), tokens


@pytest.mark.parametrize("n", [16, 33, 5])
@pytest.mark.parametrize("k", [3, 64, 130])
def test_panels_hold_column_after_column(backend: CpuBackend, n: int, k: int) -> None:
    wide = randn(n, k + 9).to(backend.dtype)
    for weight in (wide[:, 4 : 4 + k], wide[:, :k].contiguous(), randn(k, n).to(backend.dtype).T):
        packed = backend.pack_table(weight)
        for column in range(packed.panels.shape[0] * 16):
            place = column % 16
            if backend.dtype == torch.bfloat16:
                place = 2 * (place % 8) + place // 8
            stored = packed.panels[column // 16, :, place]
            assert torch.equal(stored, weight[column] if column < n else torch.zeros(k, dtype=backend.dtype))


@pytest.mark.parametrize(("first", "rows"), [(0, 40), (13, 27)])
def test_embed(backend: CpuBackend, first: int, rows: int) -> None:
    table = randn(rows, 21).to(backend.dtype)
    tokens = torch.tensor([0, 12, 13, 39, 40, 5, 25, 25])
    found = backend.embed(tokens, backend.pack_table(table), first)
    for token, row in zip(tokens.tolist(), found, strict=True):
        inside = first <= token < first + rows
        assert torch.equal(row, table[token - first].float() if inside else torch.zeros(21))


@pytest.mark.skipif(not onednn.usable(), reason="this CPU has no bfloat16 matrix units")
@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_linear_on_matrix_units(tokens: int) -> None:
    weight, bias, x = randn(131, 130).bfloat16(), randn(131, seed=1).bfloat16(), randn(tokens, 130, seed=2)
    out = torch.empty(tokens, 131)
    onednn.OneDnnLinear.pack(weight, bias)(x, out)
    expected = x.double() @ weight.double().T + bias.double()
    theirs = torch.nn.functional.linear(x.bfloat16(), weight, bias).double()
    assert (out - expected).abs().max() <= 2 * (theirs - expected).abs().max()


# -- between the products


@pytest.mark.parametrize(("tokens", "hidden"), [(0, 8), (1, 1), (1, 2048), (5, 123), (70, 64)])
@pytest.mark.parametrize("with_delta", [False, True])
def test_add_rms_norm(backend: CpuBackend, tokens: int, hidden: int, with_delta: bool) -> None:
    residual, delta, weight = randn(tokens, hidden), randn(tokens, hidden, seed=1), randn(hidden, seed=2)
    total = residual.double() + (delta.double() if with_delta else 0)
    expected = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    given = residual.clone()
    found = backend.add_rms_norm(given, delta if with_delta else None, backend.pack_vector(weight), 1e-5)
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=2e-6)
    assert torch.equal(given, residual + delta if with_delta else residual)


def test_add(backend: CpuBackend) -> None:
    residual, delta = randn(5, 123), randn(5, 123, seed=1)
    expected = residual + delta
    assert torch.equal(backend.add(residual, delta), expected)


def test_rows(backend: CpuBackend) -> None:
    x, rows = randn(9, 33), torch.tensor([8, 0, 3, 3])
    assert torch.equal(backend.rows(x, rows, "picked"), x[rows])
    assert backend.rows(x, rows[:0], "picked").shape == (0, 33)


def test_silu_mul(backend: CpuBackend) -> None:
    gate_up = randn(5, 246)
    gate_up[0, :8] = torch.tensor([0.0, -0.0, 1e4, -1e4, 88.5, -88.5, 1e-30, -200.0])
    gate, up = gate_up.double().chunk(2, -1)
    found = backend.silu_mul(gate_up.clone())
    torch.testing.assert_close(found.double(), torch.nn.functional.silu(gate) * up, atol=1e-6, rtol=1e-6)


# -- attention


def attention_shape(heads: int, kv_heads: int, d: int, window: int | None = None) -> AttentionShape:
    inverse = 1.0 / (10000.0 ** (torch.arange(0, d, 2).float() / d))
    return AttentionShape(heads, kv_heads, d, window, inverse)


def turned(x: torch.Tensor, positions: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D], turned by transformers' formula."""
    angles = torch.cat([positions.float()[:, None] * inverse] * 2, -1)[:, None]
    low, high = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-high, low], -1) * angles.sin()


class PlainAttention:
    """Keeps every sequence's keys and values in a list, and attends without paging, tiles or online softmax."""

    def __init__(self, shape: AttentionShape, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}

    def __call__(self, qkv: torch.Tensor, work: list[tuple[int, list[int], int]]) -> torch.Tensor:
        s = self.shape
        results = []
        row = 0
        for sequence, new, past in work:
            part = qkv[row : row + len(new)]
            row += len(new)
            positions = torch.arange(past, past + len(new))
            q, k, v = part.split([s.q_size, s.kv_size, s.kv_size], -1)
            q = turned(q.view(-1, s.heads, s.head_dim), positions, s.inverse_frequencies)
            k = turned(k.view(-1, s.kv_heads, s.head_dim), positions, s.inverse_frequencies).to(self.dtype)
            v = v.view(-1, s.kv_heads, s.head_dim).to(self.dtype)
            if past:
                k, v = torch.cat([self.keys[sequence], k]), torch.cat([self.values[sequence], v])
            self.keys[sequence], self.values[sequence] = k, v
            group = s.heads // s.kv_heads
            keys, values = (t.double().repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))
            scores = q.double().transpose(0, 1) @ keys.transpose(1, 2) / math.sqrt(s.head_dim)
            distance = positions[:, None] - torch.arange(len(k))
            hidden = (distance < 0) | (distance >= (s.sliding_window or 1 << 40))
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            results.append((weights @ values).transpose(0, 1).flatten(1))
        return torch.cat(results)


def run_attention(
    backend: CpuBackend, shape: AttentionShape, kv: object, block_size: int, qkv: torch.Tensor, batch: ForwardBatch
) -> torch.Tensor:
    backend.begin(batch, shape, block_size)
    given = qkv.clone()
    backend.rope_and_store(given, kv, batch)  # type: ignore[arg-type]
    return backend.attention(given, kv, batch).clone()  # type: ignore[arg-type]


STEPS: list[list[tuple[int, int]]] = [
    [(0, 5), (1, 70)],  # two prompts
    [(0, 1), (1, 1), (2, 130)],  # decodes beside a prompt
    [(2, 7), (0, 20), (1, 1)],
    [(0, 1), (1, 1), (2, 1)],
]


@pytest.mark.parametrize("block_size", [1, 16, 20, 128])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "window"),
    [(4, 4, 16, None), (8, 2, 64, None), (9, 1, 6, None), (64, 1, 18, None), (8, 2, 64, 1), (8, 2, 64, 33)],
)
def test_attention_over_mixed_batches(
    backend: CpuBackend, heads: int, kv_heads: int, d: int, window: int | None, block_size: int
) -> None:
    shape = attention_shape(heads, kv_heads, d, window)
    plain = PlainAttention(shape, backend.dtype)
    kv_blocks = 2 + 3 * -(-170 // block_size)
    kv = backend.allocate_kv(2, kv_blocks, block_size, shape)
    blocks = Blocks(kv_blocks, block_size)
    past = dict.fromkeys(range(3), 0)
    for step, counts in enumerate(STEPS):
        work = [(sequence, [0] * count, past[sequence]) for sequence, count in counts]
        qkv = randn(sum(count for _, count in counts), (heads + 2 * kv_heads) * d, seed=step)
        found = run_attention(backend, shape, kv.layers[1], block_size, qkv, make_batch(blocks, work))
        # A key that lands on the other side of a rounding boundary moves a bfloat16 result a little.
        limit = 3e-6 if backend.dtype == torch.float32 else 2e-4
        torch.testing.assert_close(found.double(), plain(qkv, work), atol=limit, rtol=limit)
        for sequence, count in counts:
            past[sequence] += count
    assert not kv.layers[0][0].any()


def test_attention_ignores_what_lies_in_slots_not_yet_written(backend: CpuBackend) -> None:
    shape = attention_shape(4, 2, 16)
    results = []
    for rubbish in (0.0, torch.nan):
        kv = backend.allocate_kv(1, 8, 16, shape)
        for tensor in kv.layers[0]:
            tensor.fill_(rubbish)
        batch = make_batch(Blocks(8, 16), [(0, [0] * 21, 0)])
        results.append(run_attention(backend, shape, kv.layers[0], 16, randn(21, 8 * 16), batch))
    assert torch.equal(*results)


def test_scores_of_any_size_do_not_overflow(plain: CpuBackend) -> None:
    shape = attention_shape(2, 1, 8)
    kv = plain.allocate_kv(1, 8, 16, shape)
    reference = PlainAttention(shape, torch.float32)
    work = [(0, [0] * 90, 0)]
    qkv = randn(90, 4 * 8)
    qkv[:, :24] *= 100  # scores of tens of thousands
    found = run_attention(plain, shape, kv.layers[0], 16, qkv, make_batch(Blocks(8, 16), work))
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), reference(qkv, work), atol=1e-2, rtol=1e-2)


def test_far_positions_turn_as_exactly_as_transformers(plain: CpuBackend) -> None:
    shape = attention_shape(2, 1, 64)
    positions = torch.tensor([0, 1, 4095, 100_000, 131_071])
    batch = ForwardBatch(
        tokens_T=torch.zeros(5, dtype=torch.int64),
        positions_T=positions,
        slots_T=torch.arange(5),
        query_starts_B1=torch.tensor([0, 5], dtype=torch.int32),
        context_lengths_B=torch.tensor([5], dtype=torch.int32),
        block_tables_BP=torch.zeros((1, 1), dtype=torch.int32),
        logits_rows_R=torch.arange(0),
    )
    kv = plain.allocate_kv(1, 1, 16, shape)
    qkv = randn(5, 4 * 64)
    expected = turned(qkv.view(5, 4, 64)[:, :3], positions, shape.inverse_frequencies)
    plain.begin(batch, shape, 16)
    plain.rope_and_store(qkv, kv.layers[0], batch)
    torch.testing.assert_close(qkv.view(5, 4, 64)[:, :3], expected, atol=2e-6, rtol=2e-6)
    keys = kv.layers[0][0][0, 0, :, :5].T
    assert torch.equal(keys, qkv.view(5, 4, 64)[:, 2])


def test_keys_are_rounded_to_bfloat16_as_torch_rounds() -> None:
    shape = attention_shape(1, 1, 64)
    backend = CpuBackend(torch.bfloat16, 1)
    kv = backend.allocate_kv(1, 7, 16, shape)
    batch = make_batch(Blocks(7, 16), [(0, [0] * 100, 0)])
    qkv = randn(100, 3 * 64)
    values = qkv[:, 128:].clone()
    values[0, :4] = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.3895e38])  # ties, and the last below infinity
    qkv[:, 128:] = values
    backend.begin(batch, shape, 16)
    backend.rope_and_store(qkv, kv.layers[0], batch)
    stored = torch.stack([kv.layers[0][1][s // 16, 0, s % 16, :64] for s in batch.slots_T.tolist()])
    assert torch.equal(stored, values.to(torch.bfloat16))


# -- the pool, and memory


def _note(arguments, thread, threads):  # type: ignore[no-untyped-def]
    """Count calls, and mark the thread."""
    a = i64_at(arguments)
    fetch_add(a[0], 1)
    exchange(a[0] + 8 * (1 + thread), threads)


@pytest.fixture(scope="module")
def note() -> int:
    compiled = numba.cfunc("void(int64, int64, int64)")(_note)
    _compiled.append(compiled)
    address: int = compiled.address
    return address


_compiled: list[object] = []
_ONE = struct.Struct("q")


@pytest.mark.parametrize("spin", [0, BRIEF_SPIN, SPIN])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_pool_runs_a_kernel_once_on_each_thread(note: int, count: int, spin: int) -> None:
    pool = Pool(count, spin)
    seen = torch.zeros(8, dtype=torch.int64)
    try:
        for turn in range(2000):
            seen.zero_()
            pool.run(note, _ONE, seen.data_ptr())
            assert seen[0] == count, turn
            assert seen[1:].tolist() == [count] * count + [0] * (7 - count), turn
    finally:
        pool.close()


def test_a_pools_threads_end(note: int) -> None:
    before = threading.active_count()
    pools = [Pool(3) for _ in range(3)]
    seen = torch.zeros(8, dtype=torch.int64)
    pools[0].run(note, _ONE, seen.data_ptr())
    assert threading.active_count() == before + 6
    for pool in pools:
        pool.close()
    assert threading.active_count() == before


def test_one_thread_starts_no_other() -> None:
    before = threading.active_count()
    CpuBackend(torch.float32, 1)
    assert threading.active_count() == before


@pytest.mark.parametrize("shape", [(3,), (5, 7, 11), (600, 1024)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_for_weights(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = memory.huge_empty(shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert torch.equal(tensor.fill_(2.0), torch.full(shape, 2.0, dtype=dtype))


def test_a_workspace_grows_and_keeps_names_apart() -> None:
    space = memory.Workspace()
    a, b = space.take("a", 2, 3).fill_(1.0), space.take("b", 2, 3).fill_(2.0)
    assert space.take("a", 2, 3) is a
    assert torch.equal(space.take("a", 3, 2), torch.ones(3, 2))
    big = space.take("a", 1000, 30)
    assert big.shape == (1000, 30)
    assert space.take("a", 2, 3).data_ptr() == big.data_ptr()
    assert torch.equal(b, torch.full((2, 3), 2.0))


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float32 or bfloat16, not in torch\.float16"):
        CpuBackend(torch.float16, 1)
