from __future__ import annotations

import torch
from benchmarks.gpu.case import Case, Outputs, Work, plain
from benchmarks.gpu.sequences import SLOTS, Cached, sdpa

from arriero_kernels.decode_attention import decode_attention
from arriero_kernels.tuning import Tuning

FLOAT8 = torch.float8_e4m3fn


def case(
    sequences: int,
    length: int,
    heads: int,
    kv_heads: int,
    d: int = 128,
    kv_dtype: torch.dtype = torch.bfloat16,
    slots: int = SLOTS,
    tokens: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    timed: bool = True,
) -> Case:
    def make(device: torch.device, tuning: Tuning | None) -> Work:
        cached = Cached([length] * sequences, kv_heads, d, kv_dtype, device, slots)
        qkv = torch.randn(sequences * tokens, (heads + 2 * kv_heads) * d, device=device, dtype=dtype)
        queries = qkv[:, : heads * d].unflatten(1, (heads, d))
        limits = torch.full((sequences,), length, device=device, dtype=torch.int32)
        keys, values = cached.contiguous(0, sequences)

        def call() -> Outputs:
            return decode_attention(
                queries,
                *cached.caches,
                cached.tables,
                limits,
                scale=d**-0.5,
                tokens=tokens,
                key_scales=cached.scales,
                value_scales=cached.scales,
                tuning=tuning,
            )

        def twin() -> Outputs:
            return sdpa(queries.unflatten(0, (sequences, tokens)), keys, values, d**-0.5).flatten(0, 1)

        rows = sequences * tokens * heads
        return Work(call, twin, cached.bytes() + 2 * rows * d * dtype.itemsize, 4 * rows * d * length)

    name = f"S={sequences} of {length}, A={heads} K={kv_heads} D={d} Z={slots} {plain(kv_dtype)}"
    if tokens > 1:
        name += f", {tokens} tokens each"
    if dtype != torch.bfloat16:
        name += f" for {plain(dtype)}"
    return Case("decode_attention", name, make, timed)


LLAMA_8B = (32, 8)
LLAMA_70B_EIGHTH = (8, 1)
"""Query heads and KV heads; of a 70B in eight parts, those of one."""

CASES = [
    *(case(s, length, *LLAMA_8B) for s, length in ((1, 1024), (1, 8192), (1, 32768), (16, 4096), (64, 4096))),
    case(64, 32768, *LLAMA_8B),
    case(256, 1024, *LLAMA_8B),
    case(256, 4096, *LLAMA_8B),
    case(1, 32768, *LLAMA_70B_EIGHTH),
    case(64, 4096, *LLAMA_70B_EIGHTH),
    *(case(s, length, *LLAMA_8B, kv_dtype=FLOAT8) for s, length in ((1, 32768), (64, 4096), (256, 4096))),
    case(64, 4096, *LLAMA_8B, slots=16),
    case(1, 32768, *LLAMA_8B, tokens=8),
    case(16, 4096, *LLAMA_8B, tokens=8, kv_dtype=FLOAT8, timed=False),
    case(16, 4096, 32, 8, 64, timed=False),
    case(16, 4096, 32, 8, 80, timed=False),
    case(16, 4096, 16, 8, 256, timed=False),
    case(16, 4096, 16, 8, 256, tokens=16, timed=False),
    case(16, 4096, *LLAMA_8B, dtype=torch.float32, kv_dtype=torch.float32, timed=False),
    case(16, 4096, 16, 8, 256, dtype=torch.float32, kv_dtype=torch.float32, timed=False),
]
