from __future__ import annotations

import torch
from benchmarks.gpu.candidates import product
from benchmarks.gpu.case import Case, Outputs, Work, bytes_of
from benchmarks.gpu.sizes import LLAMA_8B

from arriero_kernels.lora import lora_add
from arriero_kernels.tuning import Tuning


def case(tokens: int, outputs: int, inputs: int, rank: int, adapters: int, timed: bool = True) -> Case:
    """As many tokens of each adapter, one adapter's after another's. Twin: two products for each adapter."""

    def make(device: torch.device, tuning: Tuning | None) -> Work:
        dtype = torch.bfloat16
        out, theirs = (torch.zeros(tokens, outputs, device=device, dtype=dtype) for _ in range(2))
        x = torch.randn(tokens, inputs, device=device, dtype=dtype)
        a = torch.randn(adapters, rank, inputs, device=device, dtype=dtype) / inputs**0.5
        b = torch.randn(adapters, outputs, rank, device=device, dtype=dtype)
        scaling = torch.full((adapters,), 0.125, device=device)
        each = tokens // adapters
        of = (torch.arange(tokens, device=device) // each).to(torch.int32)

        def call() -> Outputs:
            return lora_add(out, x, of, a, b, scaling, tuning=tuning)

        def twin() -> Outputs:
            for adapter in range(adapters):
                rows = slice(adapter * each, (adapter + 1) * each)
                theirs[rows].add_(x[rows] @ a[adapter].T @ b[adapter].T, alpha=0.125)
            return theirs

        return Work(call, twin, bytes_of(out, out, x, of, a, b, scaling), 2 * tokens * rank * (inputs + outputs))

    assert tokens % adapters == 0
    return Case("lora", f"T={tokens} N={outputs} K={inputs} R={rank} L={adapters}", make, timed)


CASES = [
    *(case(tokens, *LLAMA_8B["gate_up"], 16, adapters) for tokens, adapters in ((1, 1), (64, 8), (64, 64), (2048, 4))),
    case(64, *LLAMA_8B["down"], 16, 8),
    case(8192, *LLAMA_8B["qkv"], 64, 2),
    *(case(tokens, *LLAMA_8B["qkv"], rank, 1, timed=False) for rank in (8, 64, 128, 256) for tokens in (64, 2048)),
]

CANDIDATES = {
    "lora_shrink": product(BLOCK_K=[64, 128, 256], SPLITS=[8, 16, 32, 64], num_warps=[4, 8], num_stages=[3, 4]),
    "lora_expand": product(BLOCK_N=[32, 64, 128], num_warps=[4, 8], num_stages=[1, 2]),
}
