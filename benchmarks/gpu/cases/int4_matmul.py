from __future__ import annotations

import torch
from benchmarks.gpu.candidates import product
from benchmarks.gpu.case import Case, Outputs, Work, bytes_of, plain
from benchmarks.gpu.sizes import LLAMA_8B, LLAMA_70B_TP8

from arriero_kernels.int4 import SPAN, WORDS, ZERO, Int4Weight
from arriero_kernels.int4_matmul import int4_matmul
from arriero_kernels.tuning import Tuning


def restored(weight: Int4Weight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] without packing, K a multiple of SPAN."""
    shifts = torch.arange(4, device=weight.codes.device)[:, None, None] * 4
    shifts = shifts + torch.tensor([0, 16], device=weight.codes.device)
    codes = weight.codes.view(weight.codes.shape[0], -1, 1, WORDS, 1) >> shifts & 15
    scales = weight.scales.T.repeat_interleave(weight.group, 1)
    if weight.zeros is None:
        return ((codes.flatten(1) - ZERO) * scales).to(dtype)
    return ((codes.flatten(1) - weight.zeros.T.repeat_interleave(weight.group, 1)) * scales).to(dtype)


def case(
    tokens: int,
    outputs: int,
    inputs: int,
    group: int = SPAN,
    zeros: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    timed: bool = True,
) -> Case:
    """Twin: the product of the restored weights, which were restored before."""

    def make(device: torch.device, tuning: Tuning | None) -> Work:
        groups = inputs // group
        x = torch.randn(tokens, inputs, device=device, dtype=dtype)
        words = torch.randint(-(1 << 31), 1 << 31, (outputs, inputs // 8), device=device, dtype=torch.int32)
        scales = torch.rand(groups, outputs, device=device, dtype=torch.float16)
        points = torch.randint(0, 16, (groups, outputs), device=device, dtype=torch.uint8) if zeros else None
        weight = Int4Weight(words, scales, points, group)
        wide = restored(weight, dtype)

        def call() -> Outputs:
            return int4_matmul(x, weight, tuning=tuning)

        def twin() -> Outputs:
            return x @ wide.T

        moved = bytes_of(x) + weight.bytes + 2 * tokens * outputs
        return Work(call, twin, moved, 2 * tokens * outputs * inputs)

    kind = "" if zeros else " symmetric"
    return Case("int4_matmul", f"T={tokens} N={outputs} K={inputs} {plain(dtype)} group {group}{kind}", make, timed)


CASES = [
    *(case(tokens, *LLAMA_8B[name]) for name in ("gate_up", "down") for tokens in (1, 16, 64, 256, 2048, 8192)),
    *(case(tokens, *LLAMA_8B[name]) for name in ("qkv", "o") for tokens in (1, 64)),
    *(case(tokens, *LLAMA_70B_TP8[name]) for name in ("qkv", "o", "gate_up", "down") for tokens in (1, 64)),
    case(1, *LLAMA_8B["gate_up"], zeros=False),
    *(case(tokens, *LLAMA_70B_TP8[name], timed=False) for name in ("qkv", "gate_up") for tokens in (32, 256)),
    *(case(tokens, *LLAMA_8B["gate_up"], zeros=False, timed=False) for tokens in (64, 2048)),
    *(case(tokens, *LLAMA_8B["gate_up"], group=group, timed=False) for group in (32, 64) for tokens in (8, 32, 2048)),
    *(case(tokens, *LLAMA_8B["gate_up"], dtype=torch.float16, timed=False) for tokens in (8, 2048)),
]

CANDIDATES = {
    "int4_matmul": [
        *product(
            BLOCK_T=[16, 32, 64], BLOCK_N=[64], PROGRAMS=[1, 2, 3], SPLITS=[1, 8], num_warps=[4], num_stages=[4, 6]
        ),
        *product(BLOCK_T=[64, 128], BLOCK_N=[128], PROGRAMS=[1], num_warps=[8], GROUP_T=[4, 8, 16], num_stages=[3, 4]),
    ]
}
