from __future__ import annotations

import torch
from benchmarks.gpu.candidates import product
from benchmarks.gpu.case import Case, Outputs, Work

from arriero_kernels.copy_blocks import copy_blocks
from arriero_kernels.tuning import Tuning


def case(copies: int, layers: int, block: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16) -> Case:
    def make(device: torch.device, tuning: Tuning | None) -> Work:
        blocks = 2 * copies
        drawn = torch.randn(2 * layers, blocks, *block, device=device, dtype=torch.bfloat16)
        cache, theirs = drawn.to(dtype), drawn.to(dtype, copy=True)
        order = torch.randperm(blocks, device=device).view(copies, 2)

        def call() -> Outputs:
            copy_blocks(cache, cache, order, tuning=tuning)
            return cache

        def twin() -> Outputs:
            theirs.view(torch.uint8)[:, order[:, 1]] = theirs.view(torch.uint8)[:, order[:, 0]]
            return theirs

        one = 2 * layers * block[0] * block[1] * block[2] * dtype.itemsize
        return Work(call, twin, copies * (16 + 2 * one))

    kv_heads, slots, d = block
    return Case("copy_blocks", f"N={copies} L={2 * layers} K={kv_heads} S={slots} D={d} {str(dtype)[6:]}", make)


CASES = [
    case(1, 32, (8, 16, 128)),
    case(64, 32, (8, 16, 128)),
    case(64, 32, (8, 64, 128), torch.float8_e4m3fn),
]

CANDIDATES = {"copy_blocks": product(BLOCK=[512, 1024, 2048, 4096, 8192], num_warps=[2, 4, 8])}
