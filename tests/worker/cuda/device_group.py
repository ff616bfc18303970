"""The device runners of all stages of a group as threads, driven by a scheduler as the engine does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch
from tests.worker.cuda.stages import tuning_of
from tests.worker.runner_group import TIME_LIMIT, Group, Pipe, Served, pipes_of, serve

from arriero_worker.engine.messages import EngineRequest
from arriero_worker.engine.scheduler import Scheduler, SchedulerSettings
from arriero_worker.engine.step import StepPlan, StepResult
from arriero_worker.group.comm import Solo
from arriero_worker.model.cuda.backend import CudaBackend
from arriero_worker.model.llama import LlamaStage
from arriero_worker.runner.batch import BatchState
from arriero_worker.runner.device.inputs import StepInputs
from arriero_worker.runner.device.runner import DeviceRunner
from arriero_worker.runner.device.streams import streams_of


class Turns:
    """One rank launches at a time, as the interpreter knows one launch only; it lends its turn while it waits for
    another rank.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mine = threading.local()

    @contextmanager
    def taken(self) -> Iterator[None]:
        with self._lock:
            self._mine.held = True
            try:
                yield
            finally:
                self._mine.held = False

    @contextmanager
    def lent(self) -> Iterator[None]:
        held = getattr(self._mine, "held", False)
        if held:
            self._lock.release()
        try:
            yield
        finally:
            if held:
                self._lock.acquire()


class LendingCommunicator:
    def __init__(self, comm: Any, turns: Turns) -> None:
        self._comm, self._turns = comm, turns

    def send(self, x: torch.Tensor) -> None:
        self._comm.send(x)

    def recv(self, x: torch.Tensor) -> torch.Tensor:
        with self._turns.lent():
            return self._comm.recv(x)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a stage has one rank here")

    def all_gather(self, x_RV: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a stage has one rank here")


class BlockingResults:
    """DeviceResults over a pipe in memory."""

    def __init__(self, pipe: Pipe, turns: Turns) -> None:
        self._pipe, self._turns = pipe, turns
        self._lock = threading.Lock()

    def send_results(self, tensors: Sequence[torch.Tensor]) -> None:
        self._pipe.send_results(tensors)

    def expect_results(self, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        waiting = [tensors]

        def arrived() -> None:
            with self._turns.lent(), self._lock:
                if waiting:
                    self._pipe.recv_results(waiting.pop())

        return arrived


def device_runner(
    stage: LlamaStage,
    settings: SchedulerSettings,
    comm: Any = None,
    results: BlockingResults | None = None,
    index: int = 0,
    buckets: Sequence[int] = (),
) -> DeviceRunner:
    """A runner over a KV cache of its own."""
    backend = stage.backend
    assert isinstance(backend, CudaBackend)
    streams = streams_of(backend.device)
    inputs = StepInputs(
        streams,
        backend.device,
        max_running=settings.max_running,
        max_batch_tokens=settings.max_batch_tokens,
        max_context=settings.max_context,
        block_size=settings.block_size,
    )
    inputs.buckets = list(buckets)
    return DeviceRunner(
        stage,
        stage.allocate_kv(settings.kv_blocks, settings.block_size),
        BatchState(settings.max_running, settings.max_context, settings.block_size),
        comm or Solo(),
        results,
        inputs=inputs,
        streams=streams,
        device=backend.device,
        stage=index,
        pipeline=settings.pipeline,
        leader=index == 0,
        vocab_size=settings.vocab_size,
        hidden_size=stage.shape.hidden_size,
        dtype=stage.hidden_dtype,
        tuning=tuning_of(backend.device),
    )


class DeviceGroup(Group):
    """One rank for each stage; `communicators` where there are several."""

    def __init__(self, stages: Sequence[LlamaStage], settings: SchedulerSettings, buckets: Sequence[int] = ()) -> None:
        """`buckets`: what batches of decodes are padded to, as for graphs."""
        pipeline = len(stages)
        self._turns = Turns()
        results = BlockingResults(Pipe(), self._turns)
        self.runners: list[Any] = []
        for index, (stage, pipe) in enumerate(zip(stages, pipes_of(1, pipeline), strict=True)):
            comm = LendingCommunicator(pipe, self._turns)
            stage.comm = comm
            self.runners.append(
                device_runner(stage, settings, comm, results if pipeline > 1 else None, index, list(buckets))
            )
        self._begin()

    @classmethod
    def over(cls, runners: Sequence[DeviceRunner]) -> DeviceGroup:
        """Runners that are there already."""
        group = cls.__new__(cls)
        group._turns = Turns()
        group.runners = list(runners)
        group._begin()
        return group

    def _begin(self) -> None:
        self.results: SimpleQueue[StepResult | BaseException] = SimpleQueue()
        self._plans: list[SimpleQueue[StepPlan | None]] = [SimpleQueue() for _ in self.runners]
        self._threads = [threading.Thread(target=self._run, args=(rank,)) for rank in range(len(self.runners))]
        self._threads.append(threading.Thread(target=self._collect))
        for thread in self._threads:
            thread.start()

    def _run(self, rank: int) -> None:
        try:
            while (plan := self._plans[rank].get()) is not None:
                with self._turns.taken():
                    assert self.runners[rank].execute(plan) is None, "results come from `collect`"
        except BaseException as error:
            self.results.put(error)

    def serve(self, scheduler: Scheduler, requests: Sequence[EngineRequest], at_once: int) -> Served:
        return serve(self, scheduler, requests, at_once)


__all__ = ["TIME_LIMIT", "BlockingResults", "DeviceGroup"]
