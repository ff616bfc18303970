"""Copies of whole KV blocks, in all layers at once: within a cache, or between two.

Legend: L tensors of the cache (keys and values of each layer), N copies. Tuned by a block's bytes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from arriero_kernels.checks import INDICES, expect
from arriero_kernels.tuning import Tuning


@triton.jit
def _copy_blocks_kernel(source, target, pairs, words, source_layer, target_layer, BLOCK: tl.constexpr):
    pair, layer = tl.program_id(0), tl.program_id(2).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    from_block = tl.load(pairs + 2 * pair).to(tl.int64)
    to_block = tl.load(pairs + 2 * pair + 1).to(tl.int64)
    mask = word < tl.where(from_block >= 0, words, 0)
    values = tl.load(source + layer * source_layer + from_block * words + word, mask=mask)
    tl.store(target + layer * target_layer + to_block * words + word, values, mask=mask)


def copy_blocks(
    source: torch.Tensor, target: torch.Tensor, pairs_N2: torch.Tensor, *, tuning: Tuning | None = None
) -> None:
    """target[:, pairs[i, 1]] = source[:, pairs[i, 0]] for every i whose pairs[i, 0] is not negative.

    source, target: [L, blocks, ...] of one dtype and, but for the number of blocks, one shape; contiguous. They may be
    the same tensor; then a block that is written must not be read or written by another pair.
    pairs_N2: int64 or int32 [N, 2], contiguous, block ids inside the tensors: they are not checked.

    Raises ValueError for other shapes, dtypes, devices or strides.
    """
    if source.dim() < 3:
        raise ValueError(f"source has shape {list(source.shape)}, expected [layers, blocks, ...]")
    expect("source", source, tuple(source.shape), (source.dtype,), source.device)
    block = tuple(source.shape[2:])
    expect("target", target, (source.shape[0], target.shape[1], *block), (source.dtype,), source.device)
    n = pairs_N2.shape[0]
    expect("pairs_N2", pairs_N2, (n, 2), INDICES, source.device)
    layers, block_bytes = source.shape[0], math.prod(block) * source.element_size()
    if n == 0 or layers == 0 or block_bytes == 0:
        return
    word = torch.int32 if block_bytes % 4 == 0 else torch.uint8
    words = block_bytes // word.itemsize
    parameters = (tuning or Tuning.of(source.device)).choose("copy_blocks", block_bytes)
    _copy_blocks_kernel[(n, triton.cdiv(words, parameters["BLOCK"]), layers)](
        _words(source, word),
        _words(target, word),
        pairs_N2,
        words,
        source.shape[1] * words,
        target.shape[1] * words,
        **parameters,
    )


def _words(x: torch.Tensor, word: torch.dtype) -> torch.Tensor:
    return x.view(-1).view(torch.uint8).view(word)
