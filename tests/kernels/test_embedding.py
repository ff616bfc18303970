"""Rows of a table."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.tensors import DTYPES, drawn

from arriero_kernels.embedding import embedding
from arriero_kernels.tuning import Tuning

TOKENS = [0, 12, 13, 39, 40, 5, 25, 25, 127_999]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(("first", "rows", "hidden"), [(0, 40, 21), (13, 27, 64), (0, 1, 1), (100, 0, 8)])
def test_embedding(
    device: torch.device, first: int, rows: int, hidden: int, dtype: torch.dtype, index: torch.dtype
) -> None:
    table = drawn(rows, hidden, dtype=dtype, device=device)
    found = embedding(torch.tensor(TOKENS, dtype=index, device=device), table, first)
    assert found.shape == (len(TOKENS), hidden)
    for token, row in zip(TOKENS, found, strict=True):
        inside = first <= token < first + rows
        assert torch.equal(row, table[token - first] if inside else torch.zeros_like(row)), token


def test_no_tokens(device: torch.device) -> None:
    table = drawn(5, 8, dtype=torch.bfloat16, device=device)
    assert embedding(torch.empty(0, dtype=torch.int64, device=device), table).shape == (0, 8)


def test_rows_longer_than_a_block(device: torch.device) -> None:
    table = drawn(7, 100, dtype=torch.bfloat16, device=device)
    rows = torch.tensor([6, 0, 3], device=device)
    tuning = Tuning.of(device).using("embedding", BLOCK=32, num_warps=1)
    out = torch.full((5, 100), 7.0, dtype=torch.bfloat16, device=device)
    assert torch.equal(embedding(rows, table, out_TH=out[1:4], tuning=tuning), table[rows])
    assert (out[[0, 4]] == 7).all()


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    table = torch.zeros(4, 8, device=device)
    with pytest.raises(ValueError, match="tokens_T is float32, expected int64 or int32"):
        embedding(torch.zeros(3, device=device), table)
    with pytest.raises(ValueError, match=r"out_TH has shape \[4, 8\], expected \[3, 8\]"):
        embedding(torch.zeros(3, dtype=torch.int64, device=device), table, out_TH=table)
