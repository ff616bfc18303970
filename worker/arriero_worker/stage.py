"""What a rank keeps for its life, through all epochs: the model's shape, its slice of the weights, its KV memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from arriero_plan.launch import Launch
from arriero_plan.model import ModelShape
from arriero_worker.engine.step import StepPlan, StepResult
from arriero_worker.group.comm import Solo
from arriero_worker.group.data import GroupData
from arriero_worker.group.member import resident_bytes
from arriero_worker.group.memory import PodMemory
from arriero_worker.model.backend import KvCache, StageWeights
from arriero_worker.model.cpu.backend import CpuBackend
from arriero_worker.model.llama import LlamaStage
from arriero_worker.model.loader import load_weights, read_shape, weights_digest
from arriero_worker.model.shard import Shard
from arriero_worker.runner.batch import BatchState
from arriero_worker.runner.runner import Runner

Progress = Callable[[int, int], None]
"""Called with bytes read and bytes in all."""


class StageRunner(Protocol):
    """What runs the steps of one epoch: `Runner` says how its calls are used."""

    def execute(self, plan: StepPlan) -> StepResult | None: ...

    def collect(self) -> StepResult: ...

    def close(self, reason: str) -> None: ...


class EpochData(Protocol):
    """The data plane of one epoch: a communicator that ends with it."""

    def close(self) -> None: ...


class LoadedStage(Protocol):
    @property
    def shape(self) -> ModelShape: ...

    @property
    def digest(self) -> str:
        """Names the checkpoint; the same on every rank of a group."""
        ...

    @property
    def kv_blocks(self) -> int:
        """How many this rank has memory for, at most the launch file's."""
        ...

    @property
    def collects(self) -> bool:
        """Results of the leader come by `collect`, not from `execute`."""
        ...

    def warm(self) -> None:
        """Make ready for the first request: compile, measure, allocate. Raises DeviceError."""
        ...

    def memory_bytes(self) -> int:
        """What the device, or on a CPU the process, uses now."""
        ...

    def connect(self, epoch: int, store: Any, memory: PodMemory) -> EpochData | None:
        """Meet the other ranks; None in a group of one. Raises GroupAborted when the epoch ends before all have met."""
        ...

    def runner(self, data: Any, *, leader: bool, alive: Callable[[], bool]) -> StageRunner:
        """For one epoch, over what `connect` returned. `alive`: whether the epoch still goes on."""
        ...

    def usable(self) -> bool:
        """Whether steps can still be computed after one has failed."""
        ...


@dataclass(frozen=True, slots=True)
class CpuStage:
    launch: Launch
    rank: int
    shape: ModelShape
    shard: Shard
    weights: StageWeights[Any]
    backend: CpuBackend
    kv: KvCache
    digest: str

    @classmethod
    def load(cls, launch: Launch, rank: int, progress: Progress) -> CpuStage:
        directory, settings = Path(launch.model_path), launch.engine
        shape = read_shape(directory)
        shard = Shard.of(launch.layout, rank)
        backend = CpuBackend(getattr(torch, settings.dtype), settings.threads)
        weights: StageWeights[Any] = load_weights(directory, shape, shard, backend, progress)
        kv = LlamaStage(shape, shard, weights, backend, Solo()).allocate_kv(settings.kv_blocks, settings.block_size)
        return cls(launch, rank, shape, shard, weights, backend, kv, weights_digest(directory))

    @property
    def kv_blocks(self) -> int:
        return self.kv.blocks

    @property
    def collects(self) -> bool:
        return self.launch.layout.pipeline > 1

    def warm(self) -> None:
        self.backend.warm()

    def memory_bytes(self) -> int:
        return resident_bytes()

    def connect(self, epoch: int, store: Any, memory: PodMemory) -> GroupData | None:
        if self.launch.layout.world == 1:
            return None
        return GroupData(self.launch, self.rank, epoch, store, memory)

    def runner(self, data: GroupData | None, *, leader: bool, alive: Callable[[], bool]) -> Runner:
        layout, settings = self.launch.layout, self.launch.engine
        return Runner(
            LlamaStage(self.shape, self.shard, self.weights, self.backend, data or Solo()),
            self.kv,
            BatchState(settings.max_running, settings.max_context, settings.block_size),
            data or Solo(),
            data if layout.pipeline > 1 else None,
            stage=self.shard.stage,
            pipeline=layout.pipeline,
            leader=leader,
            vocab_size=self.shape.vocab_size,
            hidden_size=self.shape.hidden_size,
            dtype=self.backend.hidden_dtype,
        )

    def usable(self) -> bool:
        return True


def load_stage(launch: Launch, rank: int, progress: Progress) -> LoadedStage:
    """Read this rank's slices. Raises CheckpointError, ModelError, ShardError, DeviceError."""
    if launch.backend == "cpu":
        return CpuStage.load(launch, rank, progress)
    # Triton and CUDA, which a cpu rank does not need.
    from arriero_worker.cuda_stage import CudaStage

    return CudaStage.load(launch, rank, progress)
