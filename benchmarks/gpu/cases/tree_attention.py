from __future__ import annotations

import torch
from benchmarks.gpu.case import Case, Outputs, Work, bytes_of, plain

from arriero_kernels.tree_attention import merge_attention, tree_attention
from arriero_kernels.tuning import Tuning


def case(
    sequences: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    d: int = 128,
    bits: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    timed: bool = True,
) -> Case:
    def make(device: torch.device, tuning: Tuning | None) -> Work:
        rows, group = sequences * tokens, heads // kv_heads
        qkv = torch.randn(rows, heads + 2 * kv_heads, d, device=device, dtype=dtype)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
        index = torch.arange(tokens, device=device)
        # A tree of two branches below each token.
        mask = torch.eye(tokens, device=device, dtype=torch.bool)
        parent = index
        for _ in range(tokens.bit_length()):
            parent = ((parent - 1) // 2).clamp(min=0)
            mask = mask | (parent[:, None] == index[None, :])
        ancestors = (mask.long() << index).sum(1) if bits else mask

        def call() -> Outputs:
            return tree_attention(q, k, v, ancestors, scale=d**-0.5, tuning=tuning)

        def twin() -> Outputs:
            mine = q.reshape(sequences, tokens, kv_heads, group, d).float()
            keys, values = (x.reshape(sequences, tokens, kv_heads, d).float() for x in (k, v))
            scores = torch.einsum("stkgd,sukd->stkgu", mine, keys) * d**-0.5
            scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
            out = torch.einsum("stkgu,sukd->stkgd", scores.softmax(-1), values)
            return out.reshape(rows, heads, d).to(dtype), scores.logsumexp(-1).reshape(rows, heads)

        moved = bytes_of(qkv, ancestors) + rows * heads * (d * dtype.itemsize + 4)
        return Work(call, twin, moved, 4 * rows * heads * d * tokens)

    name = f"S={sequences} N={tokens} A={heads} K={kv_heads} D={d} {plain(dtype)}"
    return Case("tree_attention", name + (" bits" if bits else ""), make, timed)


def merge_case(rows: int, heads: int, d: int = 128, dtype: torch.dtype = torch.bfloat16, timed: bool = True) -> Case:
    def make(device: torch.device, tuning: Tuning | None) -> Work:
        outs = [torch.randn(rows, heads, d, device=device, dtype=dtype) for _ in range(2)]
        lses = [torch.randn(rows, heads, device=device) for _ in range(2)]

        def call() -> Outputs:
            return merge_attention(outs[0], lses[0], outs[1], lses[1], tuning=tuning)

        def twin() -> Outputs:
            lse = torch.logaddexp(*lses)
            shares = [(x - lse).exp()[..., None] for x in lses]
            return (shares[0] * outs[0] + shares[1] * outs[1]).to(dtype), lse

        return Work(call, twin, 3 * bytes_of(outs[0], lses[0]))

    return Case("tree_attention", f"merge T={rows} A={heads} D={d} {plain(dtype)}", make, timed)


CASES = [
    case(1, 8, 32, 8),
    case(16, 8, 32, 8),
    case(16, 64, 32, 8, bits=True),
    case(64, 8, 8, 1),
    case(16, 8, 32, 8, 80, timed=False),
    case(16, 8, 16, 8, 256, bits=True, timed=False),
    case(16, 8, 32, 8, dtype=torch.float32, timed=False),
    case(16, 64, 16, 8, 256, dtype=torch.float32, timed=False),
    merge_case(128, 32),
    merge_case(1024, 32),
    merge_case(128, 32, 80, timed=False),
    merge_case(128, 16, 256, torch.float32, timed=False),
]
