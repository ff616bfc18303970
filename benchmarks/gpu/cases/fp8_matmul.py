from __future__ import annotations

import torch
from benchmarks.gpu.candidates import product
from benchmarks.gpu.case import Case, Outputs, Work, bytes_of
from benchmarks.gpu.sizes import LLAMA_8B, LLAMA_70B_TP8

from arriero_kernels.fp8_matmul import fp8_matmul
from arriero_kernels.tuning import Tuning

FLOAT8 = torch.float8_e4m3fn
BLOCK = 128


def case(tokens: int, outputs: int, inputs: int, grouped: bool = False, timed: bool = True) -> Case:
    """Twins: torch._scaled_mm; of block scales, the product of what they restore, in bfloat16."""

    def make(device: torch.device, tuning: Tuning | None) -> Work:
        x = torch.randn(tokens, inputs, device=device).to(FLOAT8)
        weight = torch.randn(outputs, inputs, device=device).to(FLOAT8)
        steps = inputs // BLOCK
        x_scales = torch.rand(tokens, steps, device=device) if grouped else torch.rand(tokens, device=device)
        weight_scales = (
            torch.rand(-(-outputs // BLOCK), steps, device=device) if grouped else torch.rand(outputs, device=device)
        )

        def call() -> Outputs:
            return fp8_matmul(x, weight, x_scales, weight_scales, tuning=tuning)

        if grouped:
            x_wide = (x.float() * x_scales.repeat_interleave(BLOCK, 1)).bfloat16()
            scales = weight_scales.repeat_interleave(BLOCK, 0)[:outputs].repeat_interleave(BLOCK, 1)
            weight_wide = (weight.float() * scales).bfloat16()

        def twin() -> Outputs:
            if grouped:
                return x_wide @ weight_wide.T
            return torch._scaled_mm(
                x,
                weight.T,
                scale_a=x_scales[:, None],
                scale_b=weight_scales[None, :],
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )

        moved = bytes_of(x, weight, x_scales, weight_scales) + 2 * tokens * outputs
        return Work(call, twin, moved, 2 * tokens * outputs * inputs, "float8")

    kind = "per block" if grouped else "per row"
    return Case("fp8_matmul", f"T={tokens} N={outputs} K={inputs} {kind}", make, timed)


CASES = [
    *(case(tokens, *LLAMA_8B[name]) for name in ("gate_up", "down") for tokens in (1, 16, 64, 256, 2048, 8192)),
    *(case(tokens, *LLAMA_8B[name]) for name in ("qkv", "o") for tokens in (1, 64, 2048)),
    *(case(tokens, *LLAMA_70B_TP8[name]) for name in ("qkv", "o", "gate_up", "down") for tokens in (1, 64)),
    *(case(tokens, *LLAMA_8B[name], grouped=True) for name in ("gate_up", "down") for tokens in (1, 64, 2048)),
    *(
        case(tokens, *LLAMA_70B_TP8[name], grouped=grouped, timed=False)
        for grouped in (False, True)
        for name in ("qkv", "gate_up")
        for tokens in (8, 32, 48, 256, 512)
    ),
]

_FEW = {"HALVES": [1], "SWAP": [1], "num_warps": [4]}
_MANY = {"BLOCK_T": [128], "BLOCK_K": [128], "SWAP": [0], "num_warps": [8]}

CANDIDATES = {
    "fp8_matmul": [
        *product(BLOCK_T=[16, 32, 64], BLOCK_N=[64], BLOCK_K=[128, 256], PROGRAMS=[1, 2], num_stages=[4, 6], **_FEW),
        *product(BLOCK_N=[128], HALVES=[1], PROGRAMS=[1], SPLITS=[1, 4], num_stages=[4, 5], **_MANY),
        *product(BLOCK_N=[256], HALVES=[2], PROGRAMS=[1], SPLITS=[1], GROUP_T=[4, 8, 16], num_stages=[3, 4], **_MANY),
    ],
    "fp8_matmul_grouped": [
        *product(BLOCK_T=[16, 32, 64], BLOCK_N=[64], BLOCK_K=[128], PROGRAMS=[1, 2], num_stages=[6, 8], **_FEW),
        *product(BLOCK_N=[64, 128], HALVES=[1], PROGRAMS=[1], GROUP_T=[4, 8, 16], num_stages=[4, 5], **_MANY),
    ],
}
