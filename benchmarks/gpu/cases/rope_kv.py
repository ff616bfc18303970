from __future__ import annotations

import torch
from benchmarks.gpu.candidates import product
from benchmarks.gpu.case import Case, Outputs, Work, bytes_of, plain

from arriero_kernels.rope_kv import rope_and_store, rope_table
from arriero_kernels.tuning import Tuning

POSITIONS = 8192
SLOTS = 16


def case(
    tokens: int,
    heads: int,
    kv_heads: int,
    d: int = 128,
    kv_dtype: torch.dtype = torch.bfloat16,
    timed: bool = True,
) -> Case:
    def make(device: torch.device, tuning: Tuning | None) -> Work:
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * d, device=device, dtype=torch.bfloat16)
        theirs = qkv.clone()
        table = rope_table(torch.rand(d // 2, device=device), POSITIONS)
        positions = torch.randint(0, POSITIONS, (tokens,), device=device)
        blocks = -(-tokens // SLOTS)
        slots = torch.randperm(blocks * SLOTS, device=device)[:tokens]
        caches = [torch.zeros(blocks, kv_heads, SLOTS, d, device=device, dtype=kv_dtype) for _ in range(4)]
        scales = None if kv_dtype == torch.bfloat16 else torch.full((kv_heads,), 0.02, device=device)

        def call() -> Outputs:
            rope_and_store(
                qkv,
                table,
                positions,
                slots,
                caches[0],
                caches[1],
                key_scales_K=scales,
                value_scales_K=scales,
                tuning=tuning,
            )
            return caches[0], caches[1]

        def twin() -> Outputs:
            q, k, v = theirs.unflatten(1, (-1, d)).split([heads, kv_heads, kv_heads], 1)
            cos, sin = (part.repeat(1, 2)[:, None].to(qkv.dtype) for part in table[positions].chunk(2, -1))

            def turned(x: torch.Tensor) -> torch.Tensor:
                low, high = x.chunk(2, -1)
                return x * cos + torch.cat([-high, low], -1) * sin

            q.copy_(turned(q))
            for cache, x in ((caches[2], turned(k)), (caches[3], v)):
                stored = x if scales is None else (x / scales[:, None]).clamp(-448, 448)
                cache[slots // SLOTS, :, slots % SLOTS] = stored.to(kv_dtype)
            return caches[2], caches[3]

        query = tokens * heads * d * 2
        kv = 2 * tokens * kv_heads * d * (2 + kv_dtype.itemsize)
        return Work(call, twin, 2 * query + kv + bytes_of(positions, slots) + tokens * d * 4)

    return Case("rope_kv", f"T={tokens} A={heads} K={kv_heads} D={d} to {plain(kv_dtype)}", make, timed)


CASES = [
    *(case(tokens, 32, 8) for tokens in (1, 64, 8192)),
    *(case(tokens, 64, 8, kv_dtype=torch.float8_e4m3fn) for tokens in (64, 8192)),
    case(64, 8, 1, timed=False),
    case(8192, 16, 2, kv_dtype=torch.float8_e4m3fn, timed=False),
    case(64, 32, 8, 64, timed=False),
]

CANDIDATES = {"rope_and_store": product(BLOCK_T=[1, 2, 4, 8, 16], num_warps=[1, 2, 4, 8])}
