"""Attention of mixed batches over the paged cache."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.attended import FLOAT8, Batch, assert_lse
from tests.kernels.tensors import DTYPES
from tests.kernels.tolerance import assert_as_good

from arriero_kernels.paged_attention import paged_attention
from arriero_kernels.tuning import Tuning

MIXED = [(1, 1), (5, 5), (1, 33), (0, 7), (7, 39), (1, 16), (3, 19)]
"""A lone first token, a prefill, decodes, a sequence that has no query, chunks after what is already cached."""


def tuned(m: int, n: int) -> Tuning:
    """Tiles of m rows and n keys, whatever the batch."""
    table = Tuning.of(torch.device("cpu"))
    for setting in ("decode", "chunk", "prefill", "float32"):
        table = table.using(f"paged_attention_{setting}", BLOCK_M=m, BLOCK_N=n, num_warps=4, num_stages=2)
    return table


def run(batch: Batch, window: int | None = None, causal: bool = True, tuning: Tuning | None = None) -> None:
    """Launch, and compare outputs and log-sum-exps; padding must stay as it is."""
    out = torch.full(batch.queries.shape, 7.0, dtype=batch.queries.dtype, device=batch.queries.device)
    lse = torch.full(batch.queries.shape[:2], 7.0, device=batch.queries.device)
    returned = paged_attention(
        batch.queries,
        batch.keys,
        batch.values,
        batch.tables,
        batch.starts,
        batch.lengths,
        scale=batch.scale,
        window=window,
        causal=causal,
        key_scales=batch.key_scales,
        value_scales=batch.value_scales,
        out=out,
        log_sum_exp=lse,
        tuning=tuning,
    )
    assert returned is out
    exact, exact_lse, torchs = batch.expected(window, causal)
    assert_as_good(out[: batch.tokens], exact, torchs)
    assert_lse(lse[: batch.tokens], exact_lse)
    assert (out[batch.tokens :] == 7).all()
    assert (lse[batch.tokens :] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_batches(device: torch.device, dtype: torch.dtype) -> None:
    run(Batch(device, MIXED, heads=8, kv_heads=2, dtype=dtype, padding=3), tuning=tuned(16, 16))


@pytest.mark.parametrize("group", [1, 3, 8])
def test_groups(device: torch.device, group: int) -> None:
    """Of which 3 does not divide a tile."""
    run(Batch(device, [(9, 20), (1, 4), (0, 3), (2, 2)], heads=2 * group, kv_heads=2), tuning=tuned(16, 16))


@pytest.mark.parametrize("d", [2, 16, 40, 64])
def test_head_sizes(device: torch.device, d: int) -> None:
    run(Batch(device, [(3, 35), (1, 17)], d=d, dtype=torch.bfloat16))


@pytest.mark.parametrize("d", [80, 96, 112, 128, 256])
def test_large_heads(device: torch.device, d: int) -> None:
    run(Batch(device, [(2, 18)], heads=2, d=d, dtype=torch.bfloat16))


@pytest.mark.parametrize("slots", [16, 32, 64, 128])
@pytest.mark.parametrize("n", [16, 64])
def test_a_tile_of_several_blocks_and_a_block_of_several_tiles(device: torch.device, slots: int, n: int) -> None:
    lengths = [slots - 1, slots, slots + 1, 2 * slots]
    run(Batch(device, [(2, length) for length in lengths], slots=slots), tuning=tuned(16, n))


def test_blocks_of_any_size(device: torch.device) -> None:
    run(Batch(device, [(3, 35), (1, 12)], slots=6), tuning=tuned(16, 16))


@pytest.mark.parametrize("window", [1, 5, 16, 33, 40, 1000])
def test_windows(device: torch.device, window: int) -> None:
    run(Batch(device, [(34, 40), (1, 33), (2, 2)], heads=2), window, tuning=tuned(16, 16))


def test_what_no_window_reaches_is_not_read(device: torch.device) -> None:
    batch = Batch(device, [(1, 70)], kv_heads=2)
    batch.keys[batch.tables[0, :2].long()] = float("nan")
    expected = batch.expected(6)[0]
    batch.tables[0, :4] = 2**30
    out = paged_attention(
        batch.queries,
        batch.keys,
        batch.values,
        batch.tables,
        batch.starts,
        batch.lengths,
        scale=batch.scale,
        window=6,
        tuning=tuned(16, 16),
    )
    assert_as_good(out, expected, expected.float())


@pytest.mark.parametrize("m", [16, 32])
def test_every_query_sees_all_keys(device: torch.device, m: int) -> None:
    run(Batch(device, [(3, 34), (1, 16), (6, 9)]), causal=False, tuning=tuned(m, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float8_cache(device: torch.device, dtype: torch.dtype) -> None:
    run(Batch(device, MIXED[:5], heads=8, kv_heads=2, d=20, dtype=dtype, kv_dtype=FLOAT8), tuning=tuned(16, 32))


def test_more_sequences_than_are_searched_together(device: torch.device) -> None:
    sequences = [(1, 2), (2, 3)] + [(0, 0)] * 256 + [(1, 1), (3, 4)]
    batch = Batch(device, sequences, heads=2)
    out = paged_attention(
        batch.queries, batch.keys, batch.values, batch.tables, batch.starts, batch.lengths, scale=batch.scale
    )
    exact, _, torchs = batch.expected()
    assert_as_good(out, exact, torchs)


@pytest.mark.parametrize("size", [16, 100])
def test_settings_of_the_shipped_tables(device: torch.device, size: int) -> None:
    """A prefill in large tiles or, where those are few, in small ones; a batch of decodes in the smallest."""
    run(Batch(device, [(size, size + 9)], d=64, dtype=torch.bfloat16))
    run(Batch(device, [(1, size)] * 2, d=64, dtype=torch.bfloat16))


def test_large_scores_do_not_overflow(device: torch.device) -> None:
    batch = Batch(device, [(4, 37)], dtype=torch.bfloat16)
    batch.keys *= 300
    run(batch, tuning=tuned(16, 16))


def test_a_query_of_a_sequence_without_keys(device: torch.device) -> None:
    """As a graph's padding has them: harmless, and zeros."""
    batch = Batch(device, [(1, 5), (1, 0), (2, 0)])
    run(batch, tuning=tuned(16, 16))
    run(batch, causal=False, tuning=tuned(16, 16))


def test_nothing_to_do(device: torch.device) -> None:
    batch = Batch(device, [(0, 3)])
    arguments = (batch.keys, batch.values, batch.tables, batch.starts, batch.lengths)
    assert paged_attention(batch.queries, *arguments, scale=1.0).shape == (0, 4, 16)


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    b = Batch(device, [(2, 3)], heads=4, kv_heads=2)
    rest = (b.tables, b.starts, b.lengths)
    one = torch.ones(2, device=device)

    def refused(message: str, *arguments: torch.Tensor, **keywords: object) -> None:
        with pytest.raises(ValueError, match=message):
            paged_attention(*arguments, **{"scale": 1.0, **keywords})  # type: ignore[arg-type]

    refused("together or not at all", b.queries, b.keys, b.values, *rest, key_scales=one)
    refused("a window is given", b.queries, b.keys, b.values, *rest, window=3, causal=False)
    refused("window is 0", b.queries, b.keys, b.values, *rest, window=0)
    refused("scale is -1.0", b.queries, b.keys, b.values, *rest, scale=-1.0)
    refused("queries has 3 heads of size 16, expected a whole", b.queries[:, :3], b.keys, b.values, *rest)
    refused("lie apart", b.queries.transpose(1, 2).contiguous().transpose(1, 2), b.keys, b.values, *rest)
    refused(r"keys has shape \[2, 2, 16\]", b.queries, b.keys[:, :, 0], b.values, *rest)
    refused("keys is bfloat16, expected float32 or float8", b.queries, b.keys.bfloat16(), b.values, *rest)
    refused("values is bfloat16, expected float32", b.queries, b.keys, b.values.bfloat16(), *rest)
    refused(r"query_starts has shape \[1\]", b.queries, b.keys, b.values, b.tables, b.starts[:1], b.lengths)
    refused("lengths is int64", b.queries, b.keys, b.values, b.tables, b.starts, b.lengths.long())
    refused("block_tables is torch.int64", b.queries, b.keys, b.values, b.tables.long(), b.starts, b.lengths)
    refused(r"out has shape \[1, 4, 16\]", b.queries, b.keys, b.values, *rest, out=b.queries[:1].contiguous())
