from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from benchmarks.gpu.case import Case, Outputs, Work, plain
from benchmarks.gpu.sequences import SLOTS, Cached, sdpa

from arriero_kernels.paged_attention import paged_attention
from arriero_kernels.tuning import Tuning

Part = tuple[int, int, int]
"""So many sequences, of so many query tokens, of so many keys each."""


def case(
    parts: Sequence[Part],
    heads: int,
    kv_heads: int,
    d: int = 128,
    kv_dtype: torch.dtype = torch.bfloat16,
    slots: int = SLOTS,
    window: int | None = None,
    timed: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    queries_of = [n for count, n, _ in parts for _ in range(count)]
    lengths = [length for count, _, length in parts for _ in range(count)]
    tokens = sum(queries_of)

    def make(device: torch.device, tuning: Tuning | None) -> Work:
        cached = Cached(lengths, kv_heads, d, kv_dtype, device, slots)
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * d, device=device, dtype=dtype)
        queries = qkv[:, : heads * d].unflatten(1, (heads, d))
        starts = torch.tensor([0, *queries_of], device=device).cumsum(0).int()
        limits = torch.tensor(lengths, device=device, dtype=torch.int32)
        bounds = [0]
        for count, _, _ in parts:
            bounds.append(bounds[-1] + count)
        copies = [cached.contiguous(first, last) for first, last in pairwise(bounds)]

        def call() -> Outputs:
            return paged_attention(
                queries,
                *cached.caches,
                cached.tables,
                starts,
                limits,
                scale=d**-0.5,
                window=window,
                key_scales=cached.scales,
                value_scales=cached.scales,
                tuning=tuning,
            )

        def twin() -> Outputs:
            rows = queries.split([count * n for count, n, _ in parts])
            return torch.cat(
                [
                    sdpa(own.unflatten(0, (count, n)), *pair, d**-0.5, window).flatten(0, 1)
                    for own, (count, n, _), pair in zip(rows, parts, copies, strict=True)
                ]
            )

        flops = 4 * heads * d * sum(map(_seen, queries_of, lengths))
        return Work(call, twin, cached.bytes() + 2 * tokens * heads * d * dtype.itemsize, flops)

    def _seen(n: int, length: int) -> int:
        """Pairs of a query and a key that it sees."""
        return sum(min(length - n + i + 1, window or length) for i in range(n))

    mixture = " + ".join(f"{count}x{n} of {length}" for count, n, length in parts)
    name = f"{mixture}, A={heads} K={kv_heads} D={d} Z={slots} {plain(kv_dtype)}"
    if dtype != torch.bfloat16:
        name += f" for {plain(dtype)}"
    return Case("paged_attention", name + (f" window {window}" if window else ""), make, timed)


FLOAT8 = torch.float8_e4m3fn
LLAMA_8B = (32, 8)
LLAMA_70B_EIGHTH = (8, 1)
"""Query heads and KV heads; of a 70B in eight parts, those of one."""

CASES = [
    case([(1, 8192, 8192)], *LLAMA_8B),
    case([(1, 8192, 8192)], *LLAMA_8B, kv_dtype=FLOAT8),
    case([(1, 8192, 8192)], *LLAMA_70B_EIGHTH),
    case([(1, 8192, 8192)], *LLAMA_8B, slots=16),
    case([(1, 8192, 8192)], *LLAMA_8B, window=1024),
    case([(16, 1024, 1024)], *LLAMA_8B),
    case([(1, 512, 8192)], *LLAMA_70B_EIGHTH),
    case([(63, 1, 4096), (1, 2048, 2048)], *LLAMA_8B),
    case([(63, 1, 4096), (1, 2048, 2048)], *LLAMA_8B, kv_dtype=FLOAT8),
    case([(256, 1, 4096)], *LLAMA_8B),
    case([(1, 512, 512)], *LLAMA_8B, kv_dtype=FLOAT8, timed=False),
    case([(1, 512, 512)], *LLAMA_8B, slots=16, timed=False),
    case([(64, 1, 1024)], *LLAMA_8B, kv_dtype=FLOAT8, timed=False),
    case([(64, 1, 1024)], *LLAMA_8B, slots=16, timed=False),
    *(
        case([part], heads, 8, d, timed=False)
        for heads, d, parts in (
            (32, 64, [(1, 8192, 8192), (64, 1, 1024)]),
            (32, 80, [(1, 8192, 8192), (1, 512, 512)]),
            (16, 256, [(1, 8192, 8192), (1, 512, 512), (64, 1, 1024)]),
        )
        for part in parts
    ),
    case([(1, 8192, 8192)], *LLAMA_8B, dtype=torch.float32, kv_dtype=torch.float32, timed=False),
    case([(1, 8192, 8192)], 16, 8, 256, dtype=torch.float32, kv_dtype=torch.float32, timed=False),
]
