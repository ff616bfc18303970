"""The engine's loop on the leader: take requests, schedule, dispatch, commit, answer. One thread, for the leader's
life.

Steps run elsewhere (a `Session`, one per epoch). The loop schedules step n + 1 while step n runs; it never waits for
a step with work left to plan. Between epochs it goes on taking requests; those that were running wait to be
recomputed from their tokens.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from arriero_worker.engine.messages import (
    Abort,
    Drain,
    EngineStatus,
    FromEngine,
    Model,
    Outputs,
    Phase,
    PrefixNews,
    RankStatus,
    Submit,
    ToEngine,
)
from arriero_worker.engine.rate import Rate
from arriero_worker.engine.scheduler import Scheduler
from arriero_worker.engine.step import StepPlan, StepResult

log = logging.getLogger("arriero.engine")

_STATUS_EVERY = 0.25


class Session(Protocol):
    """Runs the steps of one epoch, in order; results come back through `Engine.put`."""

    def dispatch(self, plan: StepPlan) -> None: ...


class _Attach:
    def __init__(self, session: Session, epoch: int, kv_blocks: int | None) -> None:
        self.session, self.epoch, self.kv_blocks = session, epoch, kv_blocks


class _Detach:
    def __init__(self) -> None:
        self.done = threading.Event()


class _Result:
    def __init__(self, epoch: int, result: StepResult) -> None:
        self.epoch, self.result = epoch, result


class _SetDraining:
    def __init__(self, draining: bool) -> None:
        self.draining = draining


class _FacesCame: ...


class _FacesGone: ...


_Event = ToEngine | _Attach | _Detach | _Result | _SetDraining | _FacesCame | _FacesGone


class Engine:
    """`publish` writes the numbers others look at: running, waiting, blocks, used, recoveries, draining."""

    def __init__(self, scheduler: Scheduler, model: Model, publish: Callable[[EngineStatus], None]) -> None:
        self._scheduler, self._model, self._publish = scheduler, model, publish
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._send: Callable[[FromEngine], None] = lambda message: None
        self._session: Session | None = None
        self._epoch = 0
        self._recoveries = 0
        self._steps = 0
        self._rate = Rate()
        self._phase: Phase = "Joining"
        self._told = 0.0
        self._live: set[int] = set()
        self.run = time.time_ns()
        """Names this life of the engine and its prefix cache."""
        self.ranks: list[RankStatus] = []
        """Each rank's truth as last heard; replaced as a whole, by another thread."""

    def start(self, send: Callable[[FromEngine], None]) -> None:
        self._send = send
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    # Called from other threads

    def receive(self, message: ToEngine) -> None:
        self._events.put(message)

    def faces_came(self) -> None:
        self._events.put(_FacesCame())

    def faces_gone(self) -> None:
        self._events.put(_FacesGone())

    def set_draining(self, draining: bool) -> None:
        self._events.put(_SetDraining(draining))

    def attach(self, session: Session, epoch: int, kv_blocks: int | None = None) -> None:
        """`kv_blocks`: how many all ranks have; None: as many as the scheduler's settings say."""
        self._events.put(_Attach(session, epoch, kv_blocks))

    def detach(self) -> None:
        """Returns when the loop has let go of the epoch: no plan is dispatched after that."""
        event = _Detach()
        self._events.put(event)
        event.done.wait()

    def put(self, epoch: int, result: StepResult) -> None:
        self._events.put(_Result(epoch, result))

    # The loop

    def _run(self) -> None:
        try:
            while True:
                self._take()
                if self._session is not None:
                    while (plan := self._scheduler.schedule()) is not None:
                        self._session.dispatch(plan)
                elif self._scheduler.has_work:
                    self._scheduler.expire()
                self._answer(self._scheduler.take_events())
                self._tell_marks()
                self._tell()
        except Exception:
            # A leader without its loop is lost: end the process, and the supervisor starts it again.
            log.exception("the engine's loop failed")
            os._exit(1)

    def _take(self) -> None:
        """Wait for something to happen, then take all that has."""
        try:
            event = self._events.get(timeout=_STATUS_EVERY)
            while True:
                self._handle(event)
                event = self._events.get_nowait()
        except queue.Empty:
            pass

    def _handle(self, event: _Event) -> None:
        match event:
            case _Result():
                if event.epoch == self._epoch and self._session is not None:
                    self._steps += 1
                    self._answer(self._scheduler.commit(event.result))
            case Submit():
                for request in event.requests:
                    refusal = self._scheduler.submit(request)
                    if refusal is None:
                        self._live.add(request.id)
                    else:
                        self._send(Outputs(self._steps, [], [], refused=[refusal]))
            case Abort():
                self._scheduler.abort(event.ids)
                self._live.difference_update(event.ids)
            case _Attach():
                if event.kv_blocks is not None:
                    self._scheduler.resize(event.kv_blocks)
                self._session, self._epoch = event.session, event.epoch
                self._enter("Serving")
            case _Detach():
                if self._session is not None:
                    self._session = None
                    self._recoveries += 1
                    self._scheduler.reset()
                    self._enter("Joining")
                event.done.set()
            case Drain():
                self._scheduler.draining = True
                self._enter(self._phase)
            case _SetDraining():
                self._scheduler.draining = event.draining
                self._enter(self._phase)
            case _FacesCame():
                self._told = 0.0
                self._scheduler.take_mark_news()
                self._send(PrefixNews(True, list(self._scheduler.marks), [], self.run))
            case _FacesGone():
                self._scheduler.abort(sorted(self._live))
                self._live.clear()

    def _answer(self, outputs: Outputs | None) -> None:
        if outputs is None:
            return
        self._live.difference_update(finish.id for finish in outputs.finished)
        self._live.difference_update(refusal.id for refusal in outputs.refused)
        self._send(outputs)

    def _tell_marks(self) -> None:
        news = self._scheduler.take_mark_news()
        if news is not None:
            self._send(PrefixNews(news.reset, news.added, news.removed, self.run))

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._told = 0.0

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told < _STATUS_EVERY:
            return
        self._told = now
        stats = self._scheduler.stats
        self._rate.tell(now, stats.generated_tokens)
        status = EngineStatus(
            phase="Draining" if self._scheduler.draining and self._phase == "Serving" else self._phase,
            epoch=self._epoch,
            model=self._model,
            running=stats.running,
            waiting=stats.waiting,
            kv_blocks=stats.kv_blocks,
            kv_blocks_used=stats.kv_blocks_used,
            prompt_tokens=stats.prompt_tokens,
            generated_tokens=stats.generated_tokens,
            cached_tokens=stats.cached_tokens,
            preemptions=stats.preemptions,
            steps=self._steps,
            recoveries=self._recoveries,
            ranks=self.ranks,
            run=self.run,
            tokens_per_second=self._rate.per_second,
        )
        self._publish(status)
        self._send(status)
