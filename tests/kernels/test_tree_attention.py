"""Attention among the tokens of a tree, and merges."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.attended import Batch, assert_lse, attention
from tests.kernels.tensors import DTYPES, drawn
from tests.kernels.tolerance import assert_as_good

from arriero_kernels.decode_attention import decode_attention
from arriero_kernels.paged_attention import paged_attention
from arriero_kernels.tree_attention import merge_attention, tree_attention
from arriero_kernels.tuning import Tuning


def tree(*parents: int | None) -> torch.Tensor:
    """bool [N, N]: each token sees itself, its parent, and whatever that sees."""
    seen = torch.eye(len(parents), dtype=torch.bool)
    for token, parent in enumerate(parents):
        if parent is not None:
            seen[token] |= seen[parent]
    return seen


TREE = tree(None, 0, 0, 1, 1, 2, 5, 0, 7)
CHAIN = tree(None, *range(8))


def bits(mask: torch.Tensor) -> torch.Tensor:
    """int64 [..., N], bit j of word i."""
    return (mask.long() << torch.arange(mask.shape[-1], device=mask.device)).sum(-1)


def tuned(m: int, d: int) -> Tuning:
    """Tiles of m rows and d columns."""
    table = Tuning.of(torch.device("cpu"))
    for setting in ("tree_attention", "tree_attention_float32"):
        table = table.using(setting, BLOCK_M=m, BLOCK_D=d, num_warps=4, num_stages=2)
    return table


def views(
    device: torch.device, rows: int, heads: int, kv_heads: int, d: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values as columns of one tensor."""
    qkv = drawn(rows, (heads + 2 * kv_heads) * d, dtype=dtype, device=device).unflatten(1, (-1, d))
    return qkv.split([heads, kv_heads, kv_heads], 1)


def check(
    device: torch.device,
    trees: torch.Tensor,
    *,
    heads: int = 4,
    kv_heads: int = 1,
    d: int = 16,
    dtype: torch.dtype = torch.float32,
    tuning: Tuning | None = None,
) -> None:
    """Of one mask a sequence [S, N, N], given as booleans and as bits."""
    trees = trees.to(device)
    count, n, _ = trees.shape
    q, k, v = views(device, count * n, heads, kv_heads, d, dtype)
    expected = [
        attention(*(x[s * n : (s + 1) * n] if x is q else x[s * n : (s + 1) * n].transpose(0, 1) for x in (q, k, v)),
                  trees[s], d**-0.5)
        for s in range(count)
    ]  # fmt: skip
    exact, exact_lse, torchs = map(torch.cat, zip(*expected, strict=True))
    for ancestors in (trees, bits(trees)):
        out, lse = tree_attention(q, k, v, ancestors, scale=d**-0.5, tuning=tuning)
        assert_as_good(out, exact, torchs)
        assert_lse(lse, exact_lse)


@pytest.mark.parametrize(("group", "dtype"), [(1, torch.float32), *((4, dtype) for dtype in DTYPES), (8, DTYPES[0])])
def test_each_sequence_has_its_tree(device: torch.device, group: int, dtype: torch.dtype) -> None:
    trees = torch.stack([TREE, CHAIN])
    check(device, trees, heads=2 * group, kv_heads=2, dtype=dtype, tuning=tuned(16, 16))


@pytest.mark.parametrize("n", [1, 16, 17, 64])
def test_sizes(device: torch.device, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    random = torch.rand(1, n, n, generator=generator) < 0.3
    check(device, random | torch.eye(n, dtype=torch.bool), heads=2, tuning=tuned(64, 16))


@pytest.mark.parametrize("d", [2, 40, 80, 128, 256])
def test_head_sizes(device: torch.device, d: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        check(device, TREE[None], heads=2, d=d, dtype=dtype)  # in tiles of the shipped tables


def test_a_token_that_sees_none(device: torch.device) -> None:
    mask = TREE.clone()
    mask[3] = False
    mask[0] = False
    check(device, mask[None], tuning=tuned(16, 16))


def test_the_last_bit_of_a_word(device: torch.device) -> None:
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, :, 63] = True
    check(device, mask, heads=1, tuning=tuned(64, 16))


def test_one_tree_for_all(device: torch.device) -> None:
    q, k, v = views(device, 18, 2, 1, 16, torch.float32)
    expected = tree_attention(q, k, v, torch.stack([TREE, TREE]).to(device), scale=0.3)
    for ancestors in (TREE.to(device), bits(TREE).to(device)):
        found = tree_attention(q, k, v, ancestors, scale=0.3)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("launch", ["paged", "decode"])
def test_a_tree_after_its_prefix(device: torch.device, launch: str) -> None:
    """Which is attention to all of both; a sequence whose prefix is empty is among them."""
    n, lengths = len(TREE), [37, 0, 16]
    batch = Batch(device, [(n, length) for length in lengths], heads=4, kv_heads=2)
    cached = (batch.keys, batch.values, batch.tables)
    lse = torch.empty(n * len(lengths), 4, device=device)
    keywords = {"scale": batch.scale, "causal": False, "log_sum_exp": lse}
    if launch == "paged":
        prefix = paged_attention(batch.queries, *cached, batch.starts, batch.lengths, **keywords)  # type: ignore[arg-type]
    else:
        prefix = decode_attention(batch.queries, *cached, batch.lengths, tokens=n, **keywords)  # type: ignore[arg-type]
    new = batch.qkv.unflatten(1, (-1, 16))
    k, v = new[:, 4:6], new[:, 6:8]
    suffix = tree_attention(batch.queries, k, v, TREE.to(device), scale=batch.scale)
    merged, merged_lse = merge_attention(prefix, lse, *suffix, out=prefix, log_sum_exp=lse)
    assert merged is prefix
    assert merged_lse is lse
    for s, length in enumerate(lengths):
        own = slice(s * n, (s + 1) * n)
        keys = torch.cat([batch.read(batch.keys, None, s), k[own].transpose(0, 1)], 1)
        values = torch.cat([batch.read(batch.values, None, s), v[own].transpose(0, 1)], 1)
        mask = torch.cat([torch.ones(n, length, dtype=torch.bool), TREE], 1).to(device)
        exact, exact_lse, torchs = attention(batch.queries[own], keys, values, mask, batch.scale)
        assert_as_good(merged[own], exact, torchs)
        assert_lse(merged_lse[own], exact_lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [20, 64])
def test_merges(device: torch.device, d: int, dtype: torch.dtype) -> None:
    """Rows of which one part, the other, or both are empty, whatever their outputs hold; and very unequal ones."""
    a, b = (drawn(7, 3, d, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    lse_a, lse_b = (3 * drawn(7, 3, dtype=torch.float32, device=device, seed=seed) for seed in (3, 4))
    lse_a[0], a[0] = float("-inf"), float("nan")
    lse_b[1], b[1] = float("-inf"), float("nan")
    lse_a[2] = lse_b[2] = float("-inf")
    lse_a[3], lse_b[4] = 1000.0, -1000.0
    out, lse = merge_attention(a, lse_a, b, lse_b)
    exact_lse = torch.logaddexp(lse_a.double(), lse_b.double())
    shares = [(x.double() - exact_lse).exp().nan_to_num(0.0)[..., None] for x in (lse_a, lse_b)]
    exact = sum(share * x.double().nan_to_num(0.0) for share, x in zip(shares, (a, b), strict=True))
    assert isinstance(exact, torch.Tensor)
    assert_as_good(out, exact, exact.to(dtype))
    assert_lse(lse, exact_lse)


def test_nothing_to_do(device: torch.device) -> None:
    q, k, v = views(device, 0, 2, 1, 16, torch.float32)
    out, lse = tree_attention(q, k, v, TREE.to(device), scale=1.0)
    assert (out.shape, lse.shape) == ((0, 2, 16), (0, 2))
    assert merge_attention(out, lse, out, lse)[0].shape == (0, 2, 16)


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    q, k, v = views(device, 18, 2, 1, 16, torch.float32)
    mask = TREE.to(device)

    def refused(message: str, *arguments: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=message):
            tree_attention(*arguments, scale=1.0)  # type: ignore[call-arg]

    refused("ancestors is torch.int32", q, k, v, mask.int())
    refused("ancestors are of 5 tokens, expected 1 to 64 that divide the 18 rows", q, k, v, mask[:5, :5])
    refused("ancestors are of 65 tokens", q, k, v, torch.ones(65, 65, dtype=torch.bool, device=device))
    refused(r"ancestors has shape \[3, 9, 9\], expected \[2, 9, 9\]", q, k, v, torch.stack([mask] * 3))
    refused("keys is torch.bfloat16", q, k.bfloat16(), v, mask)
    refused(r"values is torch.float32 \[9, 1, 16\]", q, k, v[:9], mask)
    refused(
        "queries has 2 heads of size 16, expected a whole multiple of the 4 KV heads", q, q.repeat(1, 2, 1), v, mask
    )
    lse = torch.zeros(18, 2, device=device)
    with pytest.raises(ValueError, match="out_a is not contiguous"):
        merge_attention(q, lse, q, lse)
    own = q.contiguous()
    with pytest.raises(ValueError, match=r"lse_b has shape \[9, 2\]"):
        merge_attention(own, lse, own, lse[:9])
    with pytest.raises(ValueError, match="out_b is bfloat16"):
        merge_attention(own, lse, own.bfloat16(), lse)
