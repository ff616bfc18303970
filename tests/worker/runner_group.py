"""The runners of all ranks of a group as threads, and a scheduler that drives them as the engine does."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

import torch
from tests.worker.stages import ThreadedCommunicator, ThreadedStage

from arriero_worker.engine.messages import EngineRequest, Outputs, TokenLogprobs
from arriero_worker.engine.scheduler import Scheduler, SchedulerSettings
from arriero_worker.engine.step import StepPlan, StepResult
from arriero_worker.group.comm import Communicator, Solo
from arriero_worker.runner.batch import BatchState
from arriero_worker.runner.runner import Runner
from arriero_worker.runner.stage_model import StageModel

TIME_LIMIT = 60.0


class Pipe:
    """A ResultChannel in memory, between one tensor rank of the last stage and the same of stage 0."""

    def __init__(self) -> None:
        self._sent: SimpleQueue[list[torch.Tensor]] = SimpleQueue()

    def send_results(self, tensors: Sequence[torch.Tensor]) -> None:
        self._sent.put([tensor.clone() for tensor in tensors])

    def recv_results(self, tensors: Sequence[torch.Tensor]) -> None:
        sent = self._sent.get(timeout=TIME_LIMIT)
        assert [(t.shape, t.dtype) for t in sent] == [(t.shape, t.dtype) for t in tensors]
        for target, source in zip(tensors, sent, strict=True):
            target.copy_(source)


class Group:
    """`ranks`: (model, kv, communicator), stage by stage. Plans go in by `dispatch`, results come out of `results`."""

    def __init__(
        self,
        ranks: Sequence[tuple[StageModel, Any, Communicator]],
        settings: SchedulerSettings,
        *,
        tensor: int,
        hidden_size: int,
    ) -> None:
        pipeline = settings.pipeline
        pipes = [Pipe() for _ in range(tensor)]
        self.runners = [
            Runner(
                model,
                kv,
                BatchState(settings.max_running, settings.max_context, settings.block_size),
                comm,
                pipes[rank % tensor] if pipeline > 1 else None,
                stage=rank // tensor,
                pipeline=pipeline,
                leader=rank == 0,
                vocab_size=settings.vocab_size,
                hidden_size=hidden_size,
                dtype=torch.float32,
            )
            for rank, (model, kv, comm) in enumerate(ranks)
        ]
        self.results: SimpleQueue[StepResult | BaseException] = SimpleQueue()
        self._plans: list[SimpleQueue[StepPlan | None]] = [SimpleQueue() for _ in ranks]
        self._threads = [threading.Thread(target=self._run, args=(rank,)) for rank in range(len(ranks))]
        if pipeline > 1:
            self._threads.append(threading.Thread(target=self._collect))
        for thread in self._threads:
            thread.start()

    def dispatch(self, plan: StepPlan) -> None:
        for plans in self._plans:
            plans.put(plan)

    def close(self) -> None:
        for plans in self._plans:
            plans.put(None)
        for thread in self._threads[: len(self.runners)]:
            thread.join(TIME_LIMIT)
        self.runners[0].close("the end")
        for thread in self._threads:
            thread.join(TIME_LIMIT)
            assert not thread.is_alive()

    def _run(self, rank: int) -> None:
        try:
            while (plan := self._plans[rank].get()) is not None:
                result = self.runners[rank].execute(plan)
                assert result is None or rank == 0
                if result is not None:
                    self.results.put(result)
        except BaseException as error:
            self.results.put(error)

    def _collect(self) -> None:
        try:
            while True:
                self.results.put(self.runners[0].collect())
        except BaseException as error:
            if str(error) != "the end":
                self.results.put(error)


def pipes_of(tensor: int, pipeline: int) -> list[Communicator]:
    """The communicators of a group's ranks."""
    if tensor * pipeline == 1:
        return [Solo()]
    stages = [ThreadedStage(tensor) for _ in range(pipeline)]
    queues: list[list[SimpleQueue[torch.Tensor]]] = [
        [SimpleQueue() for _ in range(tensor)] for _ in range(pipeline + 1)
    ]
    return [
        ThreadedCommunicator(stages[stage], i, queues[stage][i], queues[stage + 1][i])
        for stage in range(pipeline)
        for i in range(tensor)
    ]


class Served:
    """What clients were told."""

    def __init__(self, requests: Sequence[EngineRequest]) -> None:
        self.tokens: dict[int, list[int]] = {request.id: [] for request in requests}
        self.reasons: dict[int, str] = {}
        self.logprobs: dict[int, list[TokenLogprobs]] = {request.id: [] for request in requests}
        self.prompt_logprobs: dict[int, list[TokenLogprobs]] = {request.id: [] for request in requests}

    def take(self, outputs: Outputs | None) -> None:
        if outputs is None:
            return
        assert not outputs.refused, outputs.refused
        for id_, token in zip(outputs.ids, outputs.tokens, strict=True):
            self.tokens[id_].append(token)
        for id_, logprobs in outputs.logprobs:
            self.logprobs[id_].append(logprobs)
        for id_, positions in outputs.prompt_logprobs:
            self.prompt_logprobs[id_] += positions
        for finish in outputs.finished:
            self.reasons[finish.id] = finish.reason


def serve(group: Group, scheduler: Scheduler, requests: Sequence[EngineRequest], at_once: int = 10**9) -> Served:
    """Run all requests to their ends, `at_once` of them submitted at first, then one with each step."""
    served, waiting, flying = Served(requests), list(requests), 0
    while waiting or not scheduler.idle:
        for request in [waiting.pop(0) for _ in range(min(at_once, len(waiting)))]:
            assert scheduler.submit(request) is None
        at_once = 1
        while (plan := scheduler.schedule()) is not None:
            flying += 1
            group.dispatch(plan)
        served.take(scheduler.take_events())
        if flying:
            result = group.results.get(timeout=TIME_LIMIT)
            if isinstance(result, BaseException):
                raise result
            flying -= 1
            served.take(scheduler.commit(result))
    return served
