"""Decode and prefill speed of one rank's stage on the cpu backend: no scheduler, sampler or server.

    python benchmarks/cpu_model.py                       # 1.1 B parameters, bfloat16, all cores
    python benchmarks/cpu_model.py --shape tiny          # what Python and the kernels' calls cost
    python benchmarks/cpu_model.py --batches 1 8 --seconds 10 --json

Weights are random. Each line is the fastest step of `--seconds` of steps, and the median. Read bandwidth is measured in
the same run, from huge pages by the same threads; a decode step's fraction of it counts every weight read once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from arriero_plan.model import ModelShape
from arriero_worker.group.comm import Solo
from arriero_worker.model.cpu.backend import CpuBackend
from arriero_worker.model.cpu.memory import huge_empty
from arriero_worker.model.forward import ForwardBatch
from arriero_worker.model.llama import LlamaStage
from arriero_worker.model.loader import random_weights
from arriero_worker.model.shard import Shard

BLOCK = 16
SHAPES = {
    "1b": {"hidden": 2048, "layers": 22, "heads": 32, "kv_heads": 4, "intermediate": 5632, "vocab": 32000},
    "tiny": {"hidden": 256, "layers": 4, "heads": 8, "kv_heads": 4, "intermediate": 768, "vocab": 4096},
}


@dataclass(frozen=True)
class Line:
    what: str
    best_ms: float
    median_ms: float
    tokens_per_second: float
    bandwidth_fraction: float | None


def model_shape(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int) -> ModelShape:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
    }
    return ModelShape.from_config(config, "benchmark")


def fastest(step: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Best and median seconds of a call, over at least three and at least `seconds`."""
    step()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times), statistics.median(times)


def read_bandwidth(seconds: float) -> float:
    """Bytes per second of a sum over 512 MiB of huge pages."""
    area = huge_empty((128 << 20,), torch.float32).fill_(1.0)
    best, _ = fastest(area.sum, seconds)
    return area.numel() * 4 / best


def make_batch(sequences: int, new: int, past: int) -> ForwardBatch:
    """`sequences` with `past` tokens of context each bring `new` ones; logits of each one's last."""
    blocks = -(-(past + new) // BLOCK)
    tables = torch.arange(sequences * blocks, dtype=torch.int32).view(sequences, blocks)
    positions = torch.arange(past, past + new)
    slots = tables[:, positions // BLOCK].to(torch.int64) * BLOCK + positions % BLOCK
    return ForwardBatch(
        tokens_T=torch.arange(sequences * new) % 1000,
        positions_T=positions.repeat(sequences),
        slots_T=slots.flatten(),
        query_starts_B1=torch.arange(0, sequences * new + 1, new, dtype=torch.int32),
        context_lengths_B=torch.full((sequences,), past + new, dtype=torch.int32),
        block_tables_BP=tables,
        logits_rows_R=torch.arange(new - 1, sequences * new, new),
    )


def weight_bytes(stage: LlamaStage, head: bool = True) -> int:
    weights = stage.weights
    linears = [w for layer in weights.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return sum(stage.backend.linear_bytes(w) for w in [*linears, *([weights.head] if head else [])])


def run(arguments: argparse.Namespace) -> list[Line]:
    threads, context = arguments.threads, arguments.context
    bandwidth = read_bandwidth(min(arguments.seconds, 2.0))
    shape = model_shape(**SHAPES[arguments.shape])
    backend = CpuBackend(getattr(torch, arguments.dtype), threads)
    backend.warm()
    shard = Shard(0, 1, 0, 1, 0, shape.num_layers)
    stage = LlamaStage(shape, shard, random_weights(shape, shard, backend), backend, Solo())
    prefill = arguments.prefill
    most = max([*(b * (-(-(context + 1) // BLOCK)) for b in arguments.batches), -(-prefill // BLOCK)])
    kv = stage.allocate_kv(most, BLOCK)
    size = weight_bytes(stage)
    lines = [Line("read bandwidth, GB/s", 0.0, 0.0, bandwidth / 1e9, 1.0)]
    for sequences in arguments.batches:
        batch = make_batch(sequences, 1, context)
        best, median = fastest(lambda batch=batch: stage.forward(batch, kv), arguments.seconds)  # type: ignore[misc]
        name = f"decode, batch {sequences}, context {context}"
        lines.append(Line(name, best * 1e3, median * 1e3, sequences / best, size / best / bandwidth))
    if prefill:
        batch = make_batch(1, prefill, 0)
        best, median = fastest(lambda: stage.forward(batch, kv), arguments.seconds)
        lines.append(Line(f"prefill {prefill}", best * 1e3, median * 1e3, prefill / best, None))
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=128, help="tokens each sequence already has (default 128)")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt; 0: none (default 512)")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    lines = run(arguments)
    if arguments.json:
        print(json.dumps([asdict(line) for line in lines], indent=2))
        return
    for line in lines:
        if not line.best_ms:
            print(f"{line.what:28} {line.tokens_per_second:8.1f}")
            continue
        share = "" if line.bandwidth_fraction is None else f"  {line.bandwidth_fraction:5.0%} of read bandwidth"
        print(
            f"{line.what:28} {line.best_ms:8.2f} ms (median {line.median_ms:8.2f})"
            f"  {line.tokens_per_second:8.1f} tok/s{share}"
        )


if __name__ == "__main__":
    main()
