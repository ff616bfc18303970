"""A rank's stage on a GPU: loaded, measured, its graphs captured.

How much KV there is room for is measured: when the largest step has run, so that every buffer is there, and the largest
graphs have been captured once, so that their cost is known. The launch file's number is the bound.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arriero_plan.launch import Launch
from arriero_plan.memory import FRAGMENTATION, GIB, ceil_div
from arriero_plan.model import ModelShape
from arriero_worker.group.comm import Solo
from arriero_worker.group.memory import PodMemory
from arriero_worker.group.nccl import NcclData, set_environment
from arriero_worker.model.backend import DeviceError, KvCache, StageWeights
from arriero_worker.model.cuda.backend import CudaBackend
from arriero_worker.model.cuda.device import free_bytes, open_device, total_bytes, used_bytes
from arriero_worker.model.llama import LlamaStage
from arriero_worker.model.loader import load_weights, read_shape, weights_digest
from arriero_worker.model.shard import Shard
from arriero_worker.runner.batch import BatchState
from arriero_worker.runner.device.graphs import GraphedStage, buckets_up_to
from arriero_worker.runner.device.inputs import StepInputs
from arriero_worker.runner.device.runner import DeviceRunner
from arriero_worker.runner.device.streams import streams_of
from arriero_worker.runner.device.warm import Alone, warm_steps

log = logging.getLogger("arriero.cuda")


@dataclass(slots=True)
class Measured:
    """Bytes on the device, as they were found while warming."""

    weights: int = 0
    workspace: int = 0
    """Of the largest step, with what compiled kernels and libraries keep."""
    graphs: int = 0
    room_blocks: int = 0
    """KV blocks that there is room for."""
    warm_seconds: float = 0.0
    graph_seconds: float = 0.0


class CudaStage:
    """See `stage.LoadedStage`."""

    collects = True

    def __init__(
        self,
        launch: Launch,
        rank: int,
        shape: ModelShape,
        shard: Shard,
        weights: StageWeights[Any],
        backend: CudaBackend,
        digest: str,
    ) -> None:
        self.launch, self.rank, self.shape, self.shard, self.digest = launch, rank, shape, shard, digest
        self._weights, self._backend, self._device = weights, backend, backend.device
        self._streams = streams_of(backend.device)
        settings = launch.engine
        self._inputs = StepInputs(
            self._streams,
            backend.device,
            max_running=settings.max_running,
            max_batch_tokens=settings.max_batch_tokens,
            max_context=settings.max_context,
            block_size=settings.block_size,
        )
        self.measured = Measured()
        self._kv: KvCache | None = None
        self._graphed: GraphedStage | None = None

    @classmethod
    def load(cls, launch: Launch, rank: int, progress: Callable[[int, int], None]) -> CudaStage:
        """Raises CheckpointError, ModelError, ShardError, DeviceError."""
        pod = launch.pods[launch.pod_of(rank)]
        device = open_device(pod.first_device + pod.ranks.index(rank))
        set_environment()
        directory, settings = Path(launch.model_path), launch.engine
        shape = read_shape(directory)
        shard = Shard.of(launch.layout, rank)
        backend = CudaBackend(
            getattr(torch, settings.dtype),
            device,
            max_context=settings.max_context,
            weights=settings.weights,
            kv=settings.kv_dtype,
        )
        weights: StageWeights[Any] = load_weights(directory, shape, shard, backend, progress)
        return cls(launch, rank, shape, shard, weights, backend, weights_digest(directory))

    @property
    def kv(self) -> KvCache:
        assert self._kv is not None, "the stage is warm"
        return self._kv

    @property
    def kv_blocks(self) -> int:
        return self.kv.blocks

    def memory_bytes(self) -> int:
        return used_bytes(self._device)

    def usable(self) -> bool:
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:  # what a kernel did wrong stays with the process's context
            return False
        return True

    def shut(self) -> None:
        """Give the device's memory back; the stage is of no use afterwards."""
        self._graphed = self._kv = None
        self._inputs.buckets = []
        self._weights.layers.clear()
        self._weights.embedding = self._weights.head = None

    # -- warming

    def warm(self) -> None:
        begun = time.monotonic()
        self.measured.weights = torch.cuda.memory_allocated(self._device)
        loaded = free_bytes(self._device)
        alone = Alone(self.launch.layout.tensor)
        model = self._model(alone)
        block = model.allocate_kv(1, self.launch.engine.block_size)
        settings = self.launch.engine
        warm_steps(self._runner(model, block, alone, alone, leader=False), settings, self.shape.vocab_size)
        torch.cuda.synchronize(self._device)
        self._backend.workspace.seal()
        torch.cuda.empty_cache()
        ready = free_bytes(self._device)
        log.info(
            "rank %d: kernels are ready after %.1f s; a step's workspace takes %.2f GiB",
            self.rank,
            time.monotonic() - begun,
            (loaded - ready) / GIB,
        )
        self.measured.workspace = loaded - ready
        self.measured.graphs = self._graph_bytes(model, block)
        blocks = self._affordable(free_bytes(self._device) - self.measured.graphs, block.bytes)
        del block
        torch.cuda.empty_cache()
        self._kv = model.allocate_kv(blocks, self.launch.engine.block_size)
        if self.launch.layout.tensor == 1:
            # With more ranks, a graph holds calls of the epoch's communicator.
            self._graphed = self._captured(self._model(Solo()))
        self.measured.warm_seconds = time.monotonic() - begun
        log.info("rank %d: warm after %.1f s", self.rank, self.measured.warm_seconds)

    def _graph_bytes(self, model: LlamaStage, kv: KvCache) -> int:
        """Of all graphs, judged by the two largest: the first brings the pool that all share."""
        buckets = buckets_up_to(self.launch.engine.max_running)
        before = used_bytes(self._device)
        taken: list[int] = []
        probe = GraphedStage(model, self._inputs)
        probe.capture(
            buckets[-2:], kv, self._device, lambda done, total: taken.append(used_bytes(self._device) - before)
        )
        self._inputs.buckets = []
        each = taken[-1] - taken[0]
        return taken[0] + each * (len(buckets) - 1)

    def _affordable(self, free: int, block: int) -> int:
        """KV blocks that fit beside the graphs. Raises DeviceError where not one longest sequence does."""
        settings = self.launch.engine
        margin = int(FRAGMENTATION * total_bytes(self._device))
        room = (free - margin) // block
        self.measured.room_blocks = room
        need = ceil_div(settings.max_context, settings.block_size)
        log.info(
            "rank %d: graphs take about %.2f GiB; there is room for %d KV blocks, the plan has %d",
            self.rank,
            self.measured.graphs / GIB,
            room,
            settings.kv_blocks,
        )
        if room < need:
            raise DeviceError(
                f"rank {self.rank} has {free / GIB:.1f} GiB left for keys and values beside weights, workspace and "
                f"graphs, room for {max(room, 0)} blocks of {settings.block_size} tokens; one sequence of "
                f"{settings.max_context} tokens needs {need}"
            )
        return min(room, settings.kv_blocks)

    def _captured(self, model: LlamaStage) -> GraphedStage:
        begun = time.monotonic()
        graphed = GraphedStage(model, self._inputs)

        def progress(done: int, total: int) -> None:
            if done == total or done % 8 == 0:
                log.info("rank %d: %d of %d graphs, %.1f s", self.rank, done, total, time.monotonic() - begun)

        graphed.capture(buckets_up_to(self.launch.engine.max_running), self.kv, self._device, progress)
        self.measured.graph_seconds = time.monotonic() - begun
        return graphed

    # -- epochs

    def connect(self, epoch: int, store: Any, memory: PodMemory) -> NcclData | None:
        if self.launch.layout.world == 1:
            return None
        return NcclData(self.launch, self.rank, epoch, store, memory, self._device)

    def runner(self, data: NcclData | None, *, leader: bool, alive: Callable[[], bool]) -> DeviceRunner:
        torch.cuda.set_device(self._device)  # an epoch has a thread of its own
        graphed = self._graphed
        if graphed is None:
            assert data is not None
            graphed = self._captured(self._model(data))
        return self._runner(graphed, self.kv, data or Solo(), data, leader=leader, alive=alive)

    def _model(self, comm: Any) -> LlamaStage:
        return LlamaStage(self.shape, self.shard, self._weights, self._backend, comm)

    def _runner(
        self,
        model: Any,
        kv: KvCache,
        comm: Any,
        results: Any,
        *,
        leader: bool,
        alive: Callable[[], bool] = lambda: True,
    ) -> DeviceRunner:
        layout, settings = self.launch.layout, self.launch.engine
        return DeviceRunner(
            model,
            kv,
            BatchState(settings.max_running, settings.max_context, settings.block_size),
            comm,
            results if layout.pipeline > 1 else None,
            inputs=self._inputs,
            streams=self._streams,
            device=self._device,
            stage=self.shard.stage,
            pipeline=layout.pipeline,
            leader=leader,
            vocab_size=self.shape.vocab_size,
            hidden_size=self.shape.hidden_size,
            dtype=self._backend.hidden_dtype,
            alive=alive,
        )
