from __future__ import annotations

import torch
import torch.nn.functional as functional
from benchmarks.gpu.candidates import product
from benchmarks.gpu.case import Case, Outputs, Work, bytes_of, plain
from benchmarks.gpu.twins import quantize, scale_bytes

from arriero_kernels.quantization import Scaling
from arriero_kernels.swiglu import silu_mul, silu_mul_quantized
from arriero_kernels.tuning import Tuning

GROUP = 128


def case(
    tokens: int,
    size: int,
    scaling: Scaling = Scaling.NONE,
    dtype: torch.dtype = torch.float8_e4m3fn,
    timed: bool = True,
) -> Case:
    def make(device: torch.device, tuning: Tuning | None) -> Work:
        gate_up = torch.randn(tokens, 2 * size, device=device, dtype=torch.bfloat16)
        scale = torch.full((1,), 0.01, device=device) if scaling is Scaling.TENSOR else None

        def call() -> Outputs:
            if scaling is Scaling.NONE:
                return silu_mul(gate_up, tuning=tuning)
            return silu_mul_quantized(gate_up, dtype=dtype, scaling=scaling, scale=scale, group=GROUP, tuning=tuning)

        def twin() -> Outputs:
            gate, up = gate_up.chunk(2, -1)
            y = functional.silu(gate) * up
            return y if scaling is Scaling.NONE else quantize(y, dtype, scaling, scale, GROUP)

        out = tokens * size * (2 if scaling is Scaling.NONE else 1)
        return Work(call, twin, bytes_of(gate_up) + out + scale_bytes(scaling, tokens, size, GROUP))

    result = "bf16" if scaling is Scaling.NONE else f"{plain(dtype)} per {scaling.name.lower()}"
    return Case("swiglu", f"T={tokens} I={size} to {result}", make, timed)


CASES = [
    *(case(tokens, 14336) for tokens in (1, 64, 8192)),
    *(case(tokens, 14336, Scaling.TOKEN) for tokens in (64, 8192)),
    case(8192, 14336, Scaling.GROUP),
    case(8192, 28672, Scaling.TOKEN),
    case(8192, 14336, Scaling.TENSOR, timed=False),
    case(64, 14336, Scaling.TOKEN, torch.int8, timed=False),
    case(64, 28672, Scaling.GROUP, timed=False),
    *(case(64, size, Scaling.TOKEN, timed=False) for size in (1792, 3584, 8192)),
]

CANDIDATES = {
    "silu_mul": product(BLOCK=[512, 1024, 2048, 4096], num_warps=[1, 2, 4, 8]),
    "silu_mul_quantized": product(num_warps=[4, 8, 16, 32]),
}
