"""An engine in this process: the real loop, scheduler and runner, without sockets and without other ranks."""

from __future__ import annotations

import queue
import random
import threading
import time
from dataclasses import dataclass, field

from arriero_worker.engine.engine import Engine
from arriero_worker.engine.messages import EngineRequest, FromEngine, Model, Outputs, SamplingParams, Submit
from arriero_worker.engine.scheduler import Scheduler, SchedulerSettings
from arriero_worker.engine.step import StepPlan
from arriero_worker.group.comm import GroupAborted
from arriero_worker.runner.device.runner import DeviceRunner


class LocalSession:
    """The steps of one epoch: launched by one thread, collected by another."""

    def __init__(self, runner: DeviceRunner, engine: Engine) -> None:
        self._runner, self._engine = runner, engine
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self.error: BaseException | None = None
        self._threads = [threading.Thread(target=self._guarded, args=(work,)) for work in (self._run, self._collect)]
        for thread in self._threads:
            thread.start()
        engine.attach(self, 1)

    def dispatch(self, plan: StepPlan) -> None:
        self._plans.put(plan)

    def close(self) -> None:
        self._engine.detach()
        self._plans.put(None)
        self._threads[0].join()
        self._runner.close("the end")
        self._threads[1].join()

    def _guarded(self, work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except GroupAborted:
            pass
        except BaseException as error:
            self.error = error

    def _run(self) -> None:
        while (plan := self._plans.get()) is not None:
            self._runner.execute(plan)

    def _collect(self) -> None:
        while True:
            self._engine.put(1, self._runner.collect())


@dataclass(slots=True)
class Served:
    """What a load took."""

    requests: int
    output_tokens: int
    seconds: float
    """From the submission of all to the last token of the last."""
    first_token_seconds: float
    """Median, from the submission of all."""
    decode_seconds: float
    """Of one token after the first, median over requests."""


@dataclass(slots=True)
class _Client:
    """Notes when tokens come."""

    wanted: int
    done: threading.Event = field(default_factory=threading.Event)
    first: dict[int, float] = field(default_factory=dict)
    last: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    finished: int = 0

    def take(self, message: FromEngine) -> None:
        if not isinstance(message, Outputs):
            return
        now = time.perf_counter()
        for id_ in message.ids:
            self.first.setdefault(id_, now)
            self.last[id_] = now
            self.tokens[id_] = self.tokens.get(id_, 0) + 1
        self.refused += [refusal.message for refusal in message.refused]
        self.finished += len(message.finished) + len(message.refused)
        if self.finished >= self.wanted:
            self.done.set()


def serve(
    runner: DeviceRunner,
    settings: SchedulerSettings,
    *,
    requests: int,
    prompt_tokens: int,
    output_tokens: int,
    limit: float,
    seed: int = 0,
) -> Served:
    """Submit so many requests of random tokens at once, and wait for all. Raises TimeoutError after `limit` seconds,
    and what a step failed with.
    """
    drawn = random.Random(seed)
    vocab = settings.vocab_size
    sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0)
    asked = [
        EngineRequest(id=i, prompt=[drawn.randrange(vocab) for _ in range(prompt_tokens)], sampling=sampling)
        for i in range(requests)
    ]
    engine = Engine(Scheduler(settings, time.monotonic), Model(settings.max_context, vocab), lambda status: None)
    client = _Client(requests)
    engine.start(client.take)
    session = LocalSession(runner, engine)
    try:
        begin = time.perf_counter()
        engine.receive(Submit(asked))
        end = begin + limit
        while not client.done.wait(0.2):
            if session.error is not None:
                raise session.error
            if time.perf_counter() > end:
                raise TimeoutError(f"{client.finished} of {requests} requests had ended after {limit:g} s")
    finally:
        session.close()
    if client.refused:
        raise ValueError(f"{len(client.refused)} requests were refused: {client.refused[0]}")
    counted = [id_ for id_, tokens in client.tokens.items() if tokens > 1]
    each = sorted((client.last[id_] - client.first[id_]) / (client.tokens[id_] - 1) for id_ in counted)
    firsts = sorted(first - begin for first in client.first.values())
    return Served(
        requests,
        sum(client.tokens.values()),
        max(client.last.values()) - begin,
        firsts[len(firsts) // 2],
        each[len(each) // 2] if each else 0.0,
    )
