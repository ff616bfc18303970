from __future__ import annotations

import torch
from benchmarks.gpu import twins
from benchmarks.gpu.candidates import product
from benchmarks.gpu.case import Case, Outputs, Work, bytes_of, plain

from arriero_kernels.quantization import Scaling
from arriero_kernels.quantize import quantize
from arriero_kernels.tuning import Tuning

GROUP = 128


def case(
    tokens: int, columns: int, scaling: Scaling, dtype: torch.dtype = torch.float8_e4m3fn, timed: bool = True
) -> Case:
    def make(device: torch.device, tuning: Tuning | None) -> Work:
        x = torch.randn(tokens, columns, device=device, dtype=torch.bfloat16)
        scale = torch.full((1,), 0.01, device=device) if scaling is Scaling.TENSOR else None

        def call() -> Outputs:
            return quantize(x, dtype=dtype, scaling=scaling, scale=scale, group=GROUP, tuning=tuning)

        def twin() -> Outputs:
            return twins.quantize(x, dtype, scaling, scale, GROUP)

        moved = bytes_of(x) + tokens * columns + twins.scale_bytes(scaling, tokens, columns, GROUP)
        return Work(call, twin, moved)

    return Case("quantize", f"T={tokens} N={columns} to {plain(dtype)} per {scaling.name.lower()}", make, timed)


CASES = [
    *(case(tokens, 4096, Scaling.TOKEN) for tokens in (64, 8192)),
    case(8192, 8192, Scaling.TOKEN),
    case(8192, 8192, Scaling.GROUP),
    case(8192, 8192, Scaling.TENSOR),
    case(8192, 8192, Scaling.TOKEN, torch.int8),
    *(case(64, columns, Scaling.TOKEN, timed=False) for columns in (1024, 2048, 16384)),
]

CANDIDATES = {"quantize": product(num_warps=[1, 2, 4, 8, 16, 32])}
