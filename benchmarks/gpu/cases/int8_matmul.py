from __future__ import annotations

import torch
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
