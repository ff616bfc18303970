from __future__ import annotations

import torch
from benchmarks.gpu.candidates import product
from benchmarks.gpu.case import Case, Outputs, Work, bytes_of
from benchmarks.gpu.sizes import LLAMA_8B, LLAMA_70B_TP8

from arriero_kernels.int8_matmul import int8_matmul
from arriero_kernels.tuning import Tuning

LEAST_ROWS = 17
"""torch._int_mm takes no fewer on a GPU."""


def case(tokens: int, outputs: int, inputs: int, timed: bool = True) -> Case:
    def make(device: torch.device, tuning: Tuning | None) -> Work:
        rows = max(tokens, LEAST_ROWS)
        padded = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8, device=device)
        x = padded[:tokens]
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
        x_scales = torch.rand(tokens, device=device)
        weight_scales = torch.rand(outputs, device=device)

        def call() -> Outputs:
            return int8_matmul(x, weight, x_scales, weight_scales, tuning=tuning)

        def twin() -> Outputs:
            sums = torch._int_mm(padded, weight.T)[:tokens]
            return (sums * x_scales[:, None] * weight_scales).bfloat16()

        moved = bytes_of(x, weight, x_scales, weight_scales) + 2 * tokens * outputs
        return Work(call, twin, moved, 2 * tokens * outputs * inputs, "int8")

    return Case("int8_matmul", f"T={tokens} N={outputs} K={inputs}", make, timed)


CASES = [
    *(case(tokens, *LLAMA_8B[name]) for name in ("gate_up", "down") for tokens in (1, 64, 256, 2048, 8192)),
    *(case(tokens, *LLAMA_70B_TP8["qkv"]) for tokens in (1, 64)),
    *(case(tokens, *LLAMA_70B_TP8[name], timed=False) for name in ("qkv", "gate_up") for tokens in (8, 32, 48, 256)),
]

_FEW = {"HALVES": [1], "SWAP": [1], "num_warps": [4]}
_MANY = {"BLOCK_T": [128], "BLOCK_K": [128], "SWAP": [0], "num_warps": [8]}

CANDIDATES = {
    "int8_matmul": [
        *product(BLOCK_T=[16, 32, 64], BLOCK_N=[64], BLOCK_K=[128, 256], PROGRAMS=[1, 2], num_stages=[4, 6], **_FEW),
        *product(BLOCK_N=[128], HALVES=[1], PROGRAMS=[1], SPLITS=[1, 4], num_stages=[4, 5], **_MANY),
        *product(BLOCK_N=[256], HALVES=[2], PROGRAMS=[1], SPLITS=[1], GROUP_T=[4, 8, 16], num_stages=[3, 4], **_MANY),
    ]
}
