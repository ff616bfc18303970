from __future__ import annotations

import torch
import torch.nn.functional as functional
from benchmarks.gpu.candidates import product
from benchmarks.gpu.case import Case, Outputs, Work, bytes_of, plain
from benchmarks.gpu.twins import quantize, scale_bytes

from arriero_kernels.all_reduce_rms_norm import all_reduce_add_rms_norm, all_reduce_add_rms_norm_quantized, signals
from arriero_kernels.quantization import Scaling
from arriero_kernels.tuning import Tuning

EPS = 1e-5
GROUP = 128


def case(
    world: int, tokens: int, hidden: int, scaling: Scaling = Scaling.NONE, dtype: torch.dtype = torch.float8_e4m3fn
) -> Case:
    """Timed for a world of one rank alone: on one device that is what the kernel and its barrier cost, without the way
    between devices.
    """

    def make(device: torch.device, tuning: Tuning | None) -> Work:
        partial, residual, theirs = (torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16) for _ in range(3))
        weight = torch.randn(hidden, device=device, dtype=torch.bfloat16)
        scale = torch.full((1,), 0.01, device=device) if scaling is Scaling.TENSOR else None
        pad = torch.zeros(signals(world), dtype=torch.int32, device=device)
        buffers = torch.tensor([partial.data_ptr()] * world, device=device)
        pads = torch.tensor([pad.data_ptr()] * world, device=device)
        theirs.copy_(residual)

        def call() -> Outputs:
            assert pad.device == partial.device  # both live as long as their addresses are used
            if scaling is Scaling.NONE:
                return all_reduce_add_rms_norm(buffers, pads, 0, residual, weight, EPS, tuning=tuning)
            return all_reduce_add_rms_norm_quantized(
                buffers, pads, 0, residual, weight, EPS, dtype=dtype, scaling=scaling, scale=scale, group=GROUP,
                tuning=tuning,
            )  # fmt: skip

        def twin() -> Outputs:
            theirs.add_(partial)
            y = functional.rms_norm(theirs, (hidden,), weight, EPS)
            return y if scaling is Scaling.NONE else quantize(y, dtype, scaling, scale, GROUP)

        out = tokens * hidden * (2 if scaling is Scaling.NONE else 1)
        moved = bytes_of(residual, residual, *[partial] * world, weight) + out
        return Work(call, twin, moved + scale_bytes(scaling, tokens, hidden, GROUP))

    result = "bf16" if scaling is Scaling.NONE else f"{plain(dtype)} per {scaling.name.lower()}"
    return Case("all_reduce_rms_norm", f"W={world} T={tokens} H={hidden} to {result}", make, world == 1)


CASES = [
    *(case(1, tokens, 8192) for tokens in (1, 64)),
    case(1, 64, 4096),
    *(case(world, 8, 8192) for world in (2, 4, 8)),
    case(8, 8, 8192, Scaling.TOKEN),
    case(8, 8, 8192, Scaling.GROUP),
    case(4, 8, 8192, Scaling.TENSOR),
    case(8, 8, 16384),
    case(2, 8, 4096, Scaling.TOKEN),
]

CANDIDATES = {"all_reduce_rms_norm": product(num_warps=[1, 2, 4, 8, 16, 32])}
