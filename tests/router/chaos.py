"""Real replicas behind a router, and what its clients see while they die: for tests/router/test_chaos.py, and for
benchmarks/router_chaos.py, which puts other routers in the same place.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.router.load import Reading, ask, post, read
from tests.router.router_process import Backend, RouterProcess, family, kill_all, kill_tree, parse_metrics
from tests.worker.replica import Replica

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny_llama" / "checkpoint"
LAYERS: int = json.loads((MODEL / "config.json").read_text())["num_hidden_layers"]
NAME = "tiny"
_ROUTES = ("/v1/completions", "/v1/chat/completions")
_WORDS = ("amber", "teal", "fox", "owl", "cup", "lamp", "Japan", "Peru", "Kenya", "Chile", "story", "capital", "timer")
_SHOWN = 10


class Fleet:
    """A context: replicas of one rank each, ready on entry; killed whole, and started again where they were."""

    def __init__(self, count: int = 2) -> None:
        engine: dict[str, Any] = {"max_context": 1024, "kv_blocks": 1024}
        self.replicas = [Replica(MODEL, layers=LAYERS, wait=False, name=NAME, **engine) for _ in range(count)]
        self._stack = ExitStack()

    def __enter__(self) -> Fleet:
        with ExitStack() as stack:
            for replica in self.replicas:
                stack.enter_context(replica)
            for replica in self.replicas:
                replica.await_ready()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for replica in self.replicas:
            for pod in replica.pods:
                if pod is not None:
                    kill_tree(pod.pid)
        self._stack.close()

    @property
    def backends(self) -> list[Backend]:
        pods = [replica.launch.pods[0] for replica in self.replicas]
        return [Backend(f"r{i}", pod.http_port, pod.grpc_port, pod.control_port) for i, pod in enumerate(pods)]

    def kill(self, index: int) -> tuple[float, float]:
        """SIGKILL for the supervisor and all ranks. Returns, by `time.perf_counter`, when the first signal went out and
        when all of them had ended.
        """
        families = [family(pod.pid) for pod in self.replicas[index].pods if pod is not None]
        began = time.perf_counter()
        for processes in families:
            kill_all(processes)
        for pod in self.replicas[index].pods:
            assert pod is not None
            pod.wait()
        return began, time.perf_counter()

    def start(self, index: int) -> None:
        for pod in range(len(self.replicas[index].pods)):
            self.replicas[index].start_pod(pod)

    def answered(self, index: int) -> float:
        """Requests for answers that the replica has answered with 200 in its present life."""
        with urllib.request.urlopen(f"{self.replicas[index].url}/metrics", timeout=10) as response:
            samples = parse_metrics(response.read().decode())
        return sum(
            value
            for name, labels, value in samples
            if name == "arriero_requests_total" and labels["route"] in _ROUTES and labels["status"] == "200"
        )


@dataclass(frozen=True)
class Case:
    """One request."""

    path: str
    body: dict[str, Any]

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def request(self) -> bytes:
        return post(self.path, self.body)


@dataclass(frozen=True)
class Expected:
    """The undisturbed answer."""

    text: str
    finish: str | None
    tokens: tuple[int, int] | None


def make_cases(rng: random.Random, count: int) -> list[Case]:
    """Greedy and seeded, chat and text, 8 to 160 tokens; three of four are streams."""
    cases = []
    for index in range(count):
        words = " ".join(rng.choice(_WORDS) for _ in range(rng.randint(4, 60)))
        body: dict[str, Any] = {"model": NAME, "max_tokens": rng.randint(8, 160), "ignore_eos": rng.random() < 0.8}
        body |= {"temperature": 0} if rng.random() < 0.5 else {"temperature": 0.9, "seed": rng.randrange(2**40)}
        if index % 4:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if rng.random() < 0.5:
            cases.append(Case("/v1/completions", {**body, "prompt": words}))
        else:
            cases.append(Case("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": words}]}))
    return cases


async def undisturbed(port: int, cases: Sequence[Case], at_once: int = 4) -> list[Expected]:
    """Each case's answer from a replica that nothing happens to. Raises AssertionError."""
    gate = asyncio.Semaphore(at_once)

    async def one(case: Case) -> Expected:
        async with gate:
            reading = read(await ask(port, case.request), case.stream)
        assert not reading.faults, (case.body, reading.faults)
        return Expected(reading.text, reading.finish, reading.tokens)

    return list(await asyncio.gather(*(one(case) for case in cases)))


@dataclass
class Outcome:
    """What the clients saw."""

    requests: int = 0
    streams: int = 0
    failed: int = 0
    """Without an answer of status 200."""
    cut: int = 0
    """Begun, and not brought to an end; an error event counts as such."""
    wrong: int = 0
    """Whole, and another text or finish than the undisturbed one."""
    miscounted: int = 0
    """Whole and right, and its usage is another, or is told twice or never."""
    problems: list[str] = field(default_factory=list)
    kills: int = 0
    pauses: list[float] = field(default_factory=list)
    """Of each stream that was open at a kill and went on: the longest time without text that overlaps it. About half of
    them were on the other replica, and saw nothing of it.
    """
    returns: list[float] = field(default_factory=list)
    """Seconds from a restarted replica's readiness until it has answered a request."""

    def count(self, case: Case, expected: Expected, reading: Reading) -> None:
        self.requests += 1
        self.streams += case.stream
        problem = ""
        if reading.cut:
            self.cut += 1
            problem = f"cut: {reading.faults}"
        elif reading.faults:
            self.failed += 1
            problem = f"failed: {reading.faults}"
        elif (reading.text, reading.finish) != (expected.text, expected.finish):
            self.wrong += 1
            problem = f"wrong: {reading.text!r} ({reading.finish}), expected {expected.text!r} ({expected.finish})"
        elif reading.tokens != expected.tokens:
            self.miscounted += 1
            problem = f"miscounted: {reading.usages}, expected {expected.tokens}"
        if problem and len(self.problems) < _SHOWN:
            self.problems.append(f"{case.path} {json.dumps(case.body)[:300]}: {problem}")

    @property
    def sound(self) -> bool:
        return not (self.failed or self.cut or self.wrong or self.miscounted)

    def summary(self) -> str:
        def seconds(values: list[float]) -> str:
            return f"median {statistics.median(values):.3f} s, worst {max(values):.3f} s" if values else "none"

        ordered = sorted(self.pauses)
        late = f"{len(ordered)}, a tenth above {ordered[len(ordered) * 9 // 10]:.3f} s, " if ordered else ""
        return (
            f"{self.kills} kills, {self.requests} requests ({self.streams} streams): {self.failed} failed, {self.cut} "
            f"cut, {self.wrong} wrong, {self.miscounted} miscounted; pauses of open streams: {late}"
            f"{seconds(ordered)}; restarted replica ready to first answer: {seconds(self.returns)}"
        )


class Load:
    """So many clients, each with one request at a time, drawn from the cases, until told to stop."""

    def __init__(
        self, port: int, cases: Sequence[Case], expected: Sequence[Expected], outcome: Outcome, seed: int, clients: int
    ) -> None:
        self.port, self.cases, self.expected, self.outcome = port, cases, expected, outcome
        self.rng = random.Random(seed)
        self.clients = clients
        self.tracks: list[list[float]] = []
        """Of each sound stream: when it began and when its texts came."""
        self.stopping = False
        self.finished = 0

    async def __aenter__(self) -> Load:
        self.tasks = [asyncio.create_task(self._client()) for _ in range(self.clients)]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stopping = True
        if kind is not None:
            for task in self.tasks:
                task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=kind is not None)

    async def _client(self) -> None:
        while not self.stopping:
            index = self.rng.randrange(len(self.cases))
            case = self.cases[index]
            answer = await ask(self.port, case.request)
            reading = read(answer, case.stream)
            self.outcome.count(case, self.expected[index], reading)
            self.finished += 1
            if reading.faults:
                await asyncio.sleep(0.2)  # a router that fails at once is not asked a thousand times a second
            elif case.stream:
                self.tracks.append([answer.began, *reading.times])

    def note_pauses(self, began: float, ended: float) -> None:
        """Of the streams that ended since the last call, around a kill in this time."""
        for times in self.tracks:
            if times[0] < began < times[-1]:
                self.outcome.pauses.append(
                    max(after - before for before, after in pairwise(times) if after > began and before < ended)
                )
        self.tracks.clear()

    async def some_finish(self, count: int) -> None:
        """Returns when so many more requests have ended."""
        wanted = self.finished + count
        while self.finished < wanted:
            for task in self.tasks:
                if task.done():
                    task.result()
            await asyncio.sleep(0.01)


async def kill_rounds(
    fleet: Fleet,
    port: int,
    *,
    rounds: int,
    seed: int,
    clients: int = 16,
    patience: float = 30.0,
    say: Any = None,
) -> Outcome:
    """Under load, kill a replica at a random moment, start it again, wait until it takes part (at most `patience`
    seconds after it is ready), and again. Returns what the clients saw.
    """
    rng = random.Random(seed)
    cases = make_cases(rng, 48)
    expected = await undisturbed(fleet.backends[0].http_port, cases)
    outcome = Outcome()
    async with Load(port, cases, expected, outcome, rng.randrange(2**32), clients) as load:
        for round_ in range(rounds):
            await load.some_finish(clients // 2)
            await asyncio.sleep(rng.uniform(0, 1))
            victim = rng.randrange(len(fleet.replicas))
            dying = await asyncio.to_thread(fleet.kill, victim)
            outcome.kills += 1
            fleet.start(victim)
            await asyncio.to_thread(fleet.replicas[victim].await_ready)
            ready = time.perf_counter()
            while await asyncio.to_thread(fleet.answered, victim) == 0:
                if time.perf_counter() > ready + patience:
                    outcome.problems.append(f"round {round_}: no request reached the restarted replica in {patience} s")
                    break
                await asyncio.sleep(0.05)
            outcome.returns.append(time.perf_counter() - ready)
            load.note_pauses(*dying)  # who was open at the kill has long ended
            if say is not None:
                say(f"round {round_ + 1}: {outcome.summary()}")
    return outcome


@dataclass
class Outage:
    """What the clients saw of a time in which nothing was up."""

    outcome: Outcome
    answered: float
    """Requests that the replicas answered after their return."""
    waits: list[float]
    """Seconds from the first replica's return to each answer's end."""


async def total_outage(
    fleet: Fleet, port: int, *, seconds: float, seed: int, requests: int = 32, strict: bool = True
) -> Outage:
    """Kill all replicas, send requests over `seconds` in which there is none, start them again.

    Raises AssertionError, where `strict`, if one of them ends before.
    """
    rng = random.Random(seed)
    cases = make_cases(rng, requests)
    expected = await undisturbed(fleet.backends[0].http_port, cases)
    for index in range(len(fleet.replicas)):
        await asyncio.to_thread(fleet.kill, index)
    outcome = Outcome(kills=len(fleet.replicas))
    ended: list[float] = []

    async def one(case: Case, wanted: Expected, delay: float) -> None:
        await asyncio.sleep(delay)
        answer = await ask(port, case.request, timeout=seconds + 180)
        ended.append(answer.ended)
        outcome.count(case, wanted, read(answer, case.stream))

    delays = sorted(rng.uniform(0, seconds) for _ in cases)
    clients = [asyncio.create_task(one(*each)) for each in zip(cases, expected, delays, strict=True)]
    try:
        await asyncio.sleep(seconds)
        assert not (strict and ended), f"{len(ended)} requests ended while no replica was up: {outcome.problems}"
        for index in range(len(fleet.replicas)):
            fleet.start(index)
        await asyncio.to_thread(fleet.replicas[0].await_ready)
        back = time.perf_counter()
        await asyncio.gather(*clients)
    finally:
        for client in clients:
            client.cancel()
    for replica in fleet.replicas:
        await asyncio.to_thread(replica.await_ready)
    answered = sum([await asyncio.to_thread(fleet.answered, index) for index in range(len(fleet.replicas))])
    return Outage(outcome, answered, [at - back for at in ended])


def our_router(fleet: Fleet, http_port: int, grpc_port: int = 0, **changes: Any) -> RouterProcess:
    router: RouterProcess = RouterProcess.ours(NAME, fleet.backends, http_port, grpc_port, **changes)
    return router
