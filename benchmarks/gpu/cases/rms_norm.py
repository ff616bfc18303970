from __future__ import annotations

import torch
import torch.nn.functional as functional
from benchmarks.gpu.candidates import product
from benchmarks.gpu.case import Case, Outputs, Work, bytes_of, plain
from benchmarks.gpu.twins import quantize, scale_bytes

from arriero_kernels.quantization import Scaling
from arriero_kernels.rms_norm import add_rms_norm, add_rms_norm_quantized
from arriero_kernels.tuning import Tuning

EPS = 1e-5
GROUP = 128


def case(
    tokens: int,
    hidden: int,
    scaling: Scaling = Scaling.NONE,
    dtype: torch.dtype = torch.float8_e4m3fn,
    with_delta: bool = True,
    timed: bool = True,
) -> Case:
    def make(device: torch.device, tuning: Tuning | None) -> Work:
        residual, delta, theirs = (torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16) for _ in range(3))
        given = delta if with_delta else None
        weight = torch.randn(hidden, device=device, dtype=torch.bfloat16)
        scale = torch.full((1,), 0.01, device=device) if scaling is Scaling.TENSOR else None
        theirs.copy_(residual)

        def call() -> Outputs:
            if scaling is Scaling.NONE:
                return add_rms_norm(residual, given, weight, EPS, tuning=tuning)
            return add_rms_norm_quantized(
                residual, given, weight, EPS, dtype=dtype, scaling=scaling, scale=scale, group=GROUP, tuning=tuning
            )

        def twin() -> Outputs:
            if given is not None:
                theirs.add_(given)
            y = functional.rms_norm(theirs, (hidden,), weight, EPS)
            return y if scaling is Scaling.NONE else quantize(y, dtype, scaling, scale, GROUP)

        moved = bytes_of(residual, residual, delta) if with_delta else bytes_of(residual)
        out = tokens * hidden * (2 if scaling is Scaling.NONE else 1)
        return Work(call, twin, moved + bytes_of(weight) + out + scale_bytes(scaling, tokens, hidden, GROUP))

    result = "bf16" if scaling is Scaling.NONE else f"{plain(dtype)} per {scaling.name.lower()}"
    return Case("rms_norm", f"T={tokens} H={hidden}{'' if with_delta else ' alone'} to {result}", make, timed)


CASES = [
    *(case(tokens, hidden) for hidden in (4096, 8192) for tokens in (1, 64, 8192)),
    *(case(tokens, 8192, scaling) for scaling in (Scaling.TOKEN, Scaling.GROUP) for tokens in (64, 8192)),
    case(8192, 8192, Scaling.TENSOR),
    case(8192, 4096, Scaling.TOKEN),
    case(8192, 8192, Scaling.TOKEN, torch.int8),
    *(case(64, hidden, timed=False) for hidden in (2048, 3072, 16384)),
    case(64, 16384, Scaling.TOKEN, timed=False),
    case(64, 16384, Scaling.GROUP, timed=False),
    case(64, 8192, with_delta=False, timed=False),
]

CANDIDATES = {"rms_norm": product(num_warps=[1, 2, 4, 8, 16, 32])}
