"""The cpu backend's linear and attention kernels against torch's own operations, in one run.

    python benchmarks/cpu_kernels.py                     # all cores
    python benchmarks/cpu_kernels.py --threads 1 --seconds 0.5 --json

Each figure is the fastest of many calls, over copies of the weights that together exceed every cache. The fraction of
read bandwidth counts the weights (or keys and values) once, against a sum over huge pages in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as functional
from cpu_model import BLOCK, fastest, make_batch, read_bandwidth

from arriero_worker.model.backend import AttentionShape
from arriero_worker.model.cpu.backend import CpuBackend

SIZES = ((8192, 2048), (2048, 5632), (2560, 2048))
TOKENS = (1, 2, 4, 8, 16, 32, 128, 512)
CACHES = 128 << 20


@dataclass(frozen=True)
class Linear:
    n: int
    k: int
    tokens: int
    dtype: str
    ours_ms: float
    torch_ms: float
    gigaflops: float
    bandwidth_fraction: float


@dataclass(frozen=True)
class Attention:
    sequences: int
    context: int
    dtype: str
    ours_ms: float
    torch_ms: float
    """scaled_dot_product_attention over KV that lies in one piece; it has no paging to do."""
    bandwidth_fraction: float


def linears(dtype: torch.dtype, threads: int, seconds: float, bandwidth: float) -> list[Linear]:
    backend = CpuBackend(dtype, threads)
    backend.warm()
    lines = []
    for n, k in SIZES:
        weight = torch.randn(n, k).to(dtype)
        size = weight.numel() * weight.element_size()
        copies = -(-CACHES // size)
        weights = [weight.clone() for _ in range(copies)]
        packed = [backend.pack_linear(w, None) for w in weights]
        for tokens in TOKENS:
            x = torch.randn(tokens, k)
            x_torch = x.to(dtype)

            def ours(x: torch.Tensor = x, packed: list[object] = packed) -> None:
                for w in packed:
                    backend.linear(x, w, "out")

            def theirs(x: torch.Tensor = x_torch, weights: list[torch.Tensor] = weights) -> None:
                for w in weights:
                    functional.linear(x, w)

            mine, other = fastest(ours, seconds)[0] / copies, fastest(theirs, seconds)[0] / copies
            flops = 2 * tokens * n * k / mine / 1e9
            name = str(dtype).removeprefix("torch.")
            lines.append(Linear(n, k, tokens, name, mine * 1e3, other * 1e3, flops, size / mine / bandwidth))
    backend.close()
    return lines


def attentions(dtype: torch.dtype, threads: int, seconds: float, bandwidth: float) -> list[Attention]:
    heads, kv_heads, d = 32, 4, 64
    shape = AttentionShape(heads, kv_heads, d, None, torch.ones(d // 2))
    backend = CpuBackend(dtype, threads)
    backend.warm()
    lines = []
    for sequences, context in ((1, 2048), (8, 512), (32, 512), (32, 2048)):
        batch = make_batch(sequences, 1, context - 1)
        kv = backend.allocate_kv(1, sequences * -(-context // BLOCK), BLOCK, shape)
        qkv = torch.randn(sequences, (heads + 2 * kv_heads) * d)
        backend.begin(batch, shape, BLOCK)
        q = torch.randn(sequences, heads, 1, d).to(dtype)
        k, v = (torch.randn(sequences, kv_heads, context, d).to(dtype) for _ in range(2))

        def ours(qkv: torch.Tensor = qkv, kv: object = kv, batch: object = batch) -> None:
            backend.attention(qkv, kv.layers[0], batch)  # type: ignore[attr-defined,arg-type]

        def theirs(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
            functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        mine, other = fastest(ours, seconds)[0], fastest(theirs, seconds)[0]
        size = 2 * k.numel() * k.element_size()
        name = str(dtype).removeprefix("torch.")
        lines.append(Attention(sequences, context, name, mine * 1e3, other * 1e3, size / mine / bandwidth))
    backend.close()
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=1.0, help="of each figure (default 1)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    bandwidth = read_bandwidth(max(1.0, arguments.seconds))
    found: dict[str, list[Linear] | list[Attention]] = {"linear": [], "attention": []}
    for dtype in (torch.bfloat16, torch.float32):
        found["linear"] += linears(dtype, arguments.threads, arguments.seconds, bandwidth)  # type: ignore[operator]
        found["attention"] += attentions(dtype, arguments.threads, arguments.seconds, bandwidth)  # type: ignore[operator]
    if arguments.json:
        print(
            json.dumps({"read_bandwidth": bandwidth, **{k: [asdict(v) for v in x] for k, x in found.items()}}, indent=1)
        )
        return
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, {arguments.threads} threads\n")
    print("linear      N     K     M      ours     torch   faster  GFLOP/s  of bandwidth")
    for line in found["linear"]:
        assert isinstance(line, Linear)
        print(
            f"{line.dtype:8} {line.n:5} {line.k:5} {line.tokens:5} {line.ours_ms:7.2f}ms {line.torch_ms:7.2f}ms"
            f" {line.torch_ms / line.ours_ms:7.2f}x {line.gigaflops:8.1f} {line.bandwidth_fraction:9.0%}"
        )
    print("\nattention, one token of each sequence: 32 heads, 4 KV heads of 64")
    for step in found["attention"]:
        assert isinstance(step, Attention)
        print(
            f"{step.dtype:8} {step.sequences:3} x {step.context:5} {step.ours_ms:7.2f}ms {step.torch_ms:7.2f}ms"
            f" {step.torch_ms / step.ours_ms:7.2f}x {step.bandwidth_fraction:9.0%}"
        )


if __name__ == "__main__":
    main()
