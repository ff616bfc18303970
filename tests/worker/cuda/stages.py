"""One checkpoint on two backends: cpu, which is proved against transformers, and cuda."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tests.worker.stages import even_layout

from arriero_kernels.tuning import Tuning
from arriero_worker.group.comm import Solo
from arriero_worker.model.backend import AnyBackend, KvCache
from arriero_worker.model.cpu.backend import CpuBackend
from arriero_worker.model.cuda.backend import CudaBackend
from arriero_worker.model.forward import ForwardBatch
from arriero_worker.model.llama import LlamaStage
from arriero_worker.model.loader import load_weights, read_shape
from arriero_worker.model.shard import Shard

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 131,
}
"""A Llama that the interpreter runs in milliseconds."""

CONTEXT = 160


def stage_of(
    path: Path, backend: AnyBackend, comm: Any = None, rank: int = 0, tensor: int = 1, pipeline: int = 1
) -> LlamaStage:
    shape = read_shape(path)
    shard = Shard.of(even_layout(shape.num_layers, tensor, pipeline), rank)
    return LlamaStage(shape, shard, load_weights(path, shape, shard, backend), backend, comm or Solo())


def tuning_of(device: torch.device) -> Tuning:
    """The device's own, but in the interpreter, whose time goes with the number of programs."""
    tuning = Tuning.of(device)
    if device.type == "cuda":
        return tuning
    tuning = tuning.using("rope_and_store", BLOCK_T=32, num_warps=4)
    return tuning.using("sample", SPLITS=1, BLOCK=256, num_warps=4)


def cuda_stage(path: Path, device: torch.device, dtype: torch.dtype = torch.float32, **options: Any) -> LlamaStage:
    return cuda_stages(path, device, 1, dtype, **options)[0]


def cuda_stages(
    path: Path, device: torch.device, pipeline: int, dtype: torch.dtype = torch.float32, **options: Any
) -> list[LlamaStage]:
    """Every stage of a pipeline, all on one device."""
    tuning = tuning_of(device)
    return [
        stage_of(
            path,
            CudaBackend(dtype, device, max_context=CONTEXT, tuning=tuning, **options),
            rank=rank,
            pipeline=pipeline,
        )
        for rank in range(pipeline)
    ]


def cpu_stage(path: Path, dtype: torch.dtype = torch.float32) -> LlamaStage:
    return stage_of(path, CpuBackend(dtype, 1))


def moved(batch: ForwardBatch, device: torch.device) -> ForwardBatch:
    """As the device takes it: int32 throughout."""
    names = (
        "tokens_T",
        "positions_T",
        "slots_T",
        "query_starts_B1",
        "context_lengths_B",
        "block_tables_BP",
        "logits_rows_R",
    )
    return replace(batch, **{name: getattr(batch, name).to(device, torch.int32) for name in names})


def forward(stage: LlamaStage, batch: ForwardBatch, kv: KvCache) -> torch.Tensor:
    """The logits, on the host."""
    if isinstance(stage.backend, CudaBackend):
        batch = moved(batch, stage.backend.device)
    return stage.forward(batch, kv).cpu().clone()
