"""Compile for sm_90 what the backend launches for a Llama 3.1 8B, in every number format: no GPU is needed.

    python -m tests.worker.cuda.compile_model

Prints each fault (a spill, too much shared memory, ...) and exits 1 if there is one. Compiled kernels are cached where
`tools.kernels_table` has its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
from tools.kernels_table import CompilingDriver, Row, cache_directory

from arriero_kernels.tuning import Tuning, tables
from arriero_plan.known import known_config
from arriero_plan.model import ModelShape
from arriero_worker.group.comm import Solo
from arriero_worker.model.cuda.backend import CudaBackend
from arriero_worker.model.forward import ForwardBatch
from arriero_worker.model.llama import LlamaStage
from arriero_worker.model.quantized import BLOCK, INT4_GROUP, QuantizedWeight
from arriero_worker.model.shard import Shard

META = torch.device("meta")
FORMATS: list[tuple[Any, Any]] = [
    ("bfloat16", "bfloat16"),
    ("fp8", "fp8"),
    ("blocks", "fp8"),
    ("int8", "bfloat16"),
    ("int4", "bfloat16"),
]
BATCHES = [(2048, 1), (520, 9), (1, 1), (64, 64), (256, 256)]
"""(tokens, sequences)."""


class Shapes(CudaBackend):
    """Weights of the right shapes, without values to round."""

    def linear_of(self, n: int, k: int, kind: str) -> Any:
        if kind == "bfloat16":
            return self.pack_linear(torch.empty(n, k, dtype=torch.bfloat16, device=META), None)
        if kind == "int4":
            from arriero_kernels.int4 import SPAN, WORDS, Int4Weight
            from arriero_worker.model.cuda.linear import Int4

            groups = k // INT4_GROUP
            codes = torch.empty(n, -(-k // SPAN) * WORDS, dtype=torch.int32, device=META)
            scales = torch.empty(groups, n, dtype=torch.float16, device=META)
            zeros = torch.empty(groups, n, dtype=torch.uint8, device=META)
            return Int4(Int4Weight(codes, scales, zeros, INT4_GROUP), None)
        if kind == "int8":
            weight = QuantizedWeight(
                "int8", torch.empty(n, k, dtype=torch.int8, device=META), torch.empty(n, device=META)
            )
        else:
            codes = torch.empty(n, k, dtype=torch.float8_e4m3fn, device=META)
            blocks = kind == "blocks"
            size = (-(-n // BLOCK), -(-k // BLOCK)) if blocks else (n,)
            weight = QuantizedWeight("fp8", codes, torch.empty(size, device=META), blocks=blocks)
        return self.pack_quantized(weight, None)


def stages() -> Iterator[tuple[str, str, LlamaStage]]:
    from arriero_plan.launch import Layout, Stage
    from arriero_worker.model.backend import LayerWeights, StageWeights

    config = known_config("meta-llama/Llama-3.1-8B")
    assert config is not None
    shape = replace(ModelShape.from_config(config, "8B"), num_layers=1)
    shard = Shard.of(Layout(tensor=1, pipeline=1, stages=(Stage(first_layer=0, end_layer=1),)), 0)
    h, i, qkv = shape.hidden_size, shape.intermediate_size, shape.q_size + 2 * shape.kv_size
    for table in tables():
        for kind, kv in FORMATS:
            weights: Any = "fp8" if kind == "blocks" else kind
            backend = Shapes(torch.bfloat16, META, max_context=4096, weights=weights, kv=kv, tuning=Tuning.load(table))
            norm = torch.empty(h, dtype=torch.bfloat16, device=META)
            layer = LayerWeights(
                norm,
                backend.linear_of(qkv, h, kind),
                backend.linear_of(h, shape.q_size, kind),
                norm,
                backend.linear_of(2 * i, h, kind),
                backend.linear_of(h, i, kind),
            )
            vocabulary = backend.pack_table(torch.empty(shape.vocab_size, h, dtype=torch.bfloat16, device=META))
            yield (
                table,
                kind,
                LlamaStage(shape, shard, StageWeights([layer], vocabulary, norm, vocabulary), backend, Solo()),
            )


def batch(tokens: int, sequences: int) -> ForwardBatch:
    def ints(*size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=torch.int32, device=META)

    rows = None if tokens == sequences else ints(sequences)
    starts, lengths, tables_SP = ints(sequences + 1), ints(sequences), ints(sequences, 256)
    return ForwardBatch(ints(tokens), ints(tokens), ints(tokens), starts, lengths, tables_SP, rows)


def main() -> int:
    driver = CompilingDriver(cache_directory())
    triton.runtime.driver.set_active(driver)
    faults, kernels = [], set()
    for table, kind, stage in stages():
        kv = stage.allocate_kv(64, 16)
        for tokens, sequences in BATCHES:
            name = f"{kind}, {tokens} tokens of {sequences} sequences, {table}"
            for _, metadata, compiled in driver.launches(lambda: stage.forward(batch(tokens, sequences), kv)):  # noqa: B023
                kernels.add(metadata.hash)
                faults += Row(metadata.name, f"warps={metadata.num_warps}", name, (table,), compiled).faults()
    print(f"{len(kernels)} kernels compiled for sm_90")
    print("\n".join(sorted(set(faults))), file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
