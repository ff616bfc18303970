"""One rank's part of one epoch: where its step plans come from, who runs them, where the results go."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from arriero_plan.launch import Launch
from arriero_worker.engine.engine import Engine
from arriero_worker.engine.step import StepPlan
from arriero_worker.group.comm import GroupAborted
from arriero_worker.group.member import Truth
from arriero_worker.group.memory import PodMemory
from arriero_worker.group.plans import PlanSender, open_plans
from arriero_worker.stage import LoadedStage

log = logging.getLogger("arriero.session")

_NAP = 0.1  # seconds between the leader's looks at the epoch while no plan comes


class Session:
    """All ranks of the epoch have met once the constructor returns; `run` works until the epoch ends, then `close`.

    On the leader of several stages, or of a device, a second thread collects results, so that the engine hears of a
    step's tokens while the leader's own stage is busy with the next.
    """

    failure: Exception | None = None
    """What a step failed with, where it was not `run` that found out."""

    def __init__(
        self,
        launch: Launch,
        rank: int,
        epoch: int,
        store: Any,
        memory: PodMemory,
        truth: Truth,
        stage: LoadedStage,
        engine: Engine | None,
    ) -> None:
        """`engine` on the leader, None elsewhere. Raises GroupAborted when the epoch ends before all have met."""
        self._epoch, self._memory, self._truth, self._engine = epoch, memory, truth, engine
        # Subscribed before the ranks meet, so that the leader's first plan finds every reader.
        self._source = open_plans(launch, rank, memory, epoch) if rank else None
        self._sender = PlanSender(launch, memory, epoch)
        self._dispatched: queue.SimpleQueue[StepPlan] = queue.SimpleQueue()
        world = launch.layout.world
        if world > 1:  # written before the ranks meet, so that nobody waits for it after that
            store.set(_blocks_key(epoch, rank), str(stage.kv_blocks))
        self._data = stage.connect(epoch, store, memory)
        self._kv_blocks = stage.kv_blocks
        if world > 1 and engine is not None:
            self._kv_blocks = min(int(store.get(_blocks_key(epoch, other))) for other in range(world))
        leader = engine is not None
        self._runner = stage.runner(self._data, leader=leader, alive=lambda: memory.aborted_epoch < epoch)
        self._collects = leader and stage.collects

    def dispatch(self, plan: StepPlan) -> None:
        """From the engine's loop: hand a plan to every rank, this one last."""
        self._sender.send(plan)
        self._dispatched.put(plan)

    def run(self) -> None:
        """Raises what ended the epoch: GroupAborted, or what a step failed with."""
        if self._engine is not None:
            if self._collects:
                threading.Thread(target=self._collect, name=f"results-{self._epoch}", daemon=True).start()
            self._engine.attach(self, self._epoch, self._kv_blocks)
        plans: Iterable[StepPlan] = self._own_plans() if self._source is None else self._source
        for plan in plans:
            result = self._runner.execute(plan)
            self._truth.step = plan.step
            if result is not None and self._engine is not None:
                self._engine.put(self._epoch, result)

    def close(self) -> None:
        self._runner.close(f"epoch {self._epoch} ended")
        if self._data is not None:
            self._data.close()
        if self._source is not None:
            self._source.close()

    def _own_plans(self) -> Iterator[StepPlan]:
        while self._memory.aborted_epoch < self._epoch:
            try:
                yield self._dispatched.get(timeout=_NAP)
            except queue.Empty:
                pass
        raise GroupAborted(f"epoch {self._epoch} ended")

    def _collect(self) -> None:
        assert self._engine is not None
        try:
            while True:
                self._engine.put(self._epoch, self._runner.collect())
        except GroupAborted:
            # The ranks of later stages are gone, or the epoch is over: the thread that runs the steps must not wait on.
            self._memory.abort_epoch(self._epoch)
        except Exception as error:
            # What a step failed with on a device comes to light here, where its result is waited for.
            if self._memory.aborted_epoch < self._epoch:
                log.exception("a step of epoch %d failed", self._epoch)
            self.failure = error
            self._memory.abort_epoch(self._epoch)


def _blocks_key(epoch: int, rank: int) -> str:
    return f"epoch/{epoch}/kv_blocks/{rank}"
