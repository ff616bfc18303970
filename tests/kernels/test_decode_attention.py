"""Attention of decodes, the keys of a sequence divided among programs."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.attended import FLOAT8, Batch, assert_lse
from tests.kernels.tensors import DTYPES
from tests.kernels.tolerance import assert_as_good

from arriero_kernels.decode_attention import decode_attention, decode_workspace_size
from arriero_kernels.tuning import Tuning

LENGTHS = [1, 37, 70]


def tuned(held: int, m: int = 16, n: int = 16) -> Tuning:
    """For a device that holds so many programs at once: with S sequences and K KV heads, held / S / K parts."""
    table = Tuning("a small device", held, Tuning.of(torch.device("cpu")).ops)
    for setting in ("decode_attention", "decode_attention_wide", "decode_attention_float32"):
        table = table.using(setting, BLOCK_M=m, BLOCK_N=n, PROGRAMS=1, num_warps=4, num_stages=2)
    return table.using("decode_attention_merge", BLOCK_P=2, num_warps=1)


def run(
    batch: Batch,
    tuning: Tuning | None = None,
    tokens: int = 1,
    window: int | None = None,
    causal: bool = True,
    workspace: torch.Tensor | None = None,
) -> None:
    """Launch, and compare outputs and log-sum-exps."""
    lse = torch.full(batch.queries.shape[:2], 7.0, device=batch.queries.device)
    out = torch.full(batch.queries.shape, 7.0, dtype=batch.queries.dtype, device=batch.queries.device)
    returned = decode_attention(
        batch.queries,
        batch.keys,
        batch.values,
        batch.tables,
        batch.lengths,
        scale=batch.scale,
        window=window,
        tokens=tokens,
        causal=causal,
        key_scales=batch.key_scales,
        value_scales=batch.value_scales,
        out=out,
        log_sum_exp=lse,
        workspace=workspace,
        tuning=tuning,
    )
    assert returned is out
    exact, exact_lse, torchs = batch.expected(window, causal)
    assert_as_good(out, exact, torchs)
    assert_lse(lse, exact_lse)


def decodes(device: torch.device, lengths: list[int] = LENGTHS, tokens: int = 1, **keywords: object) -> Batch:
    return Batch(device, [(tokens, length) for length in lengths], **{"heads": 2, **keywords})  # type: ignore[arg-type]


@pytest.mark.parametrize("held", [0, 9, 30])
def test_parts(device: torch.device, held: int) -> None:
    """One, some, and more than there are tiles of keys."""
    run(decodes(device), tuned(held))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    run(decodes(device, [37, 20], heads=8, kv_heads=2, dtype=dtype), tuned(8))


@pytest.mark.parametrize("group", [1, 3, 8, 20])
def test_groups(device: torch.device, group: int) -> None:
    """The last of which one tile does not hold."""
    run(decodes(device, [37], heads=2 * group, kv_heads=2), tuned(8))


@pytest.mark.parametrize("d", [2, 40, 80, 256])
def test_head_sizes(device: torch.device, d: int) -> None:
    run(decodes(device, [35], d=d, dtype=torch.bfloat16), tuned(2))


@pytest.mark.parametrize("slots", [16, 32, 64, 128])
def test_edges_of_blocks(device: torch.device, slots: int) -> None:
    run(decodes(device, [slots - 1, slots, slots + 1], slots=slots), tuned(6, n=32))


@pytest.mark.parametrize("window", [1, 16, 30, 100])
def test_windows(device: torch.device, window: int) -> None:
    run(decodes(device, [33, 70]), tuned(6), window=window)


def test_float8_cache(device: torch.device) -> None:
    run(decodes(device, [37], heads=8, kv_heads=2, dtype=torch.bfloat16, kv_dtype=FLOAT8), tuned(4, n=32))


@pytest.mark.parametrize("held", [0, 9])
def test_a_sequence_without_keys(device: torch.device, held: int) -> None:
    """As a graph's padding has it: zeros, and -inf as their log-sum-exp."""
    run(decodes(device, [0, 21, 0], dtype=torch.bfloat16), tuned(held))


@pytest.mark.parametrize("m", [16, 64])
@pytest.mark.parametrize("causal", [True, False])
def test_several_tokens_of_each_sequence(device: torch.device, causal: bool, m: int) -> None:
    run(decodes(device, [9, 40], tokens=9), tuned(8, m=m), tokens=9, causal=causal)


def test_a_window_over_several_tokens(device: torch.device) -> None:
    """Whose rows see nothing of some parts."""
    run(decodes(device, [70], tokens=19), tuned(9), tokens=19, window=3)


@pytest.mark.parametrize("tokens", [1, 9])
def test_settings_of_the_shipped_tables(device: torch.device, tokens: int) -> None:
    run(decodes(device, [70, 150], tokens, d=64, dtype=torch.bfloat16), tokens=tokens)


def test_a_workspace_of_the_size_told_suffices(device: torch.device) -> None:
    table = tuned(16)
    shape = {"dtype": torch.float32, "device": device, "tuning": table}
    size = decode_workspace_size(3, 2, 1, 16, **shape)  # type: ignore[arg-type]
    workspace = torch.full((size,), float("nan"), device=device)
    for lengths in (LENGTHS, [20, 30], [250]):
        run(decodes(device, lengths), table, workspace=workspace)
    with pytest.raises(ValueError, match=f"workspace has {2 * 16 * 17 - 1} elements, expected at least {2 * 16 * 17}"):
        run(decodes(device, [250]), table, workspace=workspace[: 2 * 16 * 17 - 1])
    assert decode_workspace_size(4096, 2, 1, 16, **shape) >= size  # type: ignore[arg-type]
    assert decode_workspace_size(3, 2, 1, 16, tokens=8, **shape) > size  # type: ignore[arg-type]


def test_no_sequence(device: torch.device) -> None:
    b = decodes(device, [3])
    assert decode_attention(b.queries[:0], b.keys, b.values, b.tables[:0], b.lengths[:0], scale=1.0).shape[0] == 0


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    b = decodes(device, [3, 4], kv_heads=2)

    def refused(message: str, queries: torch.Tensor, **keywords: object) -> None:
        with pytest.raises(ValueError, match=message):
            decode_attention(queries, b.keys, b.values, b.tables, b.lengths, **{"scale": 1.0, **keywords})  # type: ignore[arg-type]

    refused("queries has 1 rows, expected those of 2 sequences of 1 tokens each", b.queries[:1])
    refused("queries has 2 rows, expected those of 2 sequences of 3 tokens each", b.queries, tokens=3)
    refused("queries has 2 rows, expected those of 2 sequences of 0 tokens each", b.queries, tokens=0)
    refused("a window is given", b.queries, window=3, causal=False)
    refused("queries is torch.int32", b.queries.int())
    refused("log_sum_exp is bfloat16", b.queries, log_sum_exp=torch.zeros(2, 2, dtype=torch.bfloat16, device=device))
