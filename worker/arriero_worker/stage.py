"""What a rank keeps for its life, through all epochs: the model's shape, its slice of the weights, its KV memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arriero_plan.launch import Launch
from arriero_plan.model import ModelShape
from arriero_worker.group.comm import Communicator, Solo
from arriero_worker.model.backend import AnyBackend, KvCache, StageWeights
from arriero_worker.model.cpu.backend import CpuBackend
from arriero_worker.model.llama import LlamaStage
from arriero_worker.model.loader import load_weights, read_shape, weights_digest
from arriero_worker.model.shard import Shard


@dataclass(frozen=True, slots=True)
class LoadedStage:
    shape: ModelShape
    shard: Shard
    weights: StageWeights[Any]
    backend: AnyBackend
    kv: KvCache
    digest: str
    """Names the checkpoint; the same on every rank of a group."""

    def model(self, comm: Communicator) -> LlamaStage:
        """The stage as part of an epoch, whose tensors travel by `comm`."""
        return LlamaStage(self.shape, self.shard, self.weights, self.backend, comm)


def load_stage(launch: Launch, rank: int, progress: Callable[[int, int], None]) -> LoadedStage:
    """Read this rank's slices and allocate its KV. Raises CheckpointError, ModelError, ShardError."""
    directory, settings = Path(launch.model_path), launch.engine
    shape = read_shape(directory)
    shard = Shard.of(launch.layout, rank)
    backend = CpuBackend(getattr(torch, settings.dtype), settings.threads)
    weights: StageWeights[Any] = load_weights(directory, shape, shard, backend, progress)
    kv = LlamaStage(shape, shard, weights, backend, Solo()).allocate_kv(settings.kv_blocks, settings.block_size)
    return LoadedStage(shape, shard, weights, backend, kv, weights_digest(directory))
