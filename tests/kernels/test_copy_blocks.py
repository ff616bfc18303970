"""Copies of KV blocks."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.tensors import drawn

from arriero_kernels.copy_blocks import copy_blocks
from arriero_kernels.tuning import Tuning

CACHES = [(1, 9, 16), (4, 6, 2, 4, 6), (2, 5, 3, 7, 5)]
"""Tensors, blocks, then a block's shape; the last has an odd number of elements."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32], ids=str)
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", CACHES, ids=str)
def test_within_a_cache(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, index: torch.dtype) -> None:
    cache = drawn(*shape, dtype=dtype, device=device)
    expected = cache.float()
    pairs = [(0, 3), (0, 4), (2, 1), (-1, 0)]
    for source, target in pairs:
        if source >= 0:
            expected[:, target] = expected[:, source]
    copy_blocks(cache, cache, torch.tensor(pairs, dtype=index, device=device))
    assert torch.equal(cache.float(), expected)


def test_between_caches_of_different_sizes(device: torch.device) -> None:
    source = drawn(3, 4, 2, 8, dtype=torch.bfloat16, device=device)
    target = drawn(3, 9, 2, 8, dtype=torch.bfloat16, device=device, seed=1)
    expected = target.clone()
    expected[:, [8, 0]] = source[:, [3, 1]]
    tuning = Tuning.of(device).using("copy_blocks", BLOCK=4, num_warps=1)
    copy_blocks(source, target, torch.tensor([[3, 8], [1, 0]], device=device), tuning=tuning)
    assert torch.equal(target, expected)


def test_nothing_to_copy(device: torch.device) -> None:
    cache = drawn(2, 3, 4, dtype=torch.float32, device=device)
    before = cache.clone()
    copy_blocks(cache, cache, torch.empty(0, 2, dtype=torch.int64, device=device))
    copy_blocks(cache[:0], cache[:0], torch.tensor([[0, 1]], device=device))
    assert torch.equal(cache, before)


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    cache = torch.zeros(2, 3, 4, 8, device=device)
    pairs = torch.tensor([[0, 1]], device=device)
    with pytest.raises(ValueError, match=r"target has shape \[2, 3, 4, 7\], expected \[2, 3, 4, 8\]"):
        copy_blocks(cache, torch.zeros(2, 3, 4, 7, device=device), pairs)
    with pytest.raises(ValueError, match="target is float64, expected float32"):
        copy_blocks(cache, cache.double(), pairs)
    with pytest.raises(ValueError, match=r"pairs_N2 has shape \[1, 1\], expected \[1, 2\]"):
        copy_blocks(cache, cache, pairs[:, :1].contiguous())
    with pytest.raises(ValueError, match="source is not contiguous"):
        copy_blocks(cache[:, :2], cache[:, :2], pairs)
    with pytest.raises(ValueError, match=r"source has shape \[2, 3\], expected \[layers, blocks, ...\]"):
        copy_blocks(cache[:, :, 0, 0].contiguous(), cache, pairs)
