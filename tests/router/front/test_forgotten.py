"""No request is forgotten: whatever coincides in one turn of the loop, a client that stays gets an answer.

Clients come, stay and go, replicas answer, break off and refuse, in an order that the seed decides (`weather`).
"""

from __future__ import annotations

import asyncio
import json
import random
import time

import pytest
from tests.router import mocks
from tests.router.load import ask, post, read
from tests.router.router_process import Backend, config
from tests.router.weather import Mischief, Weather
from tests.worker.replica import free_ports

from arriero_router.config import parse_config
from arriero_router.router import Router

from .running import TEXT, Loop, Replica, Request, prompt, running
from .running import ask as request_to

SECONDS = 5.0
CLIENTS = 24
PATIENCE = 15.0
"""Seconds after which a client calls itself forgotten: far more than any wait that the configuration allows."""


class Crowd:
    """Clients of one router, and what they complain of."""

    def __init__(self, loop: Weather, port: int) -> None:
        self.loop, self.port, self.rng = loop, port, loop.rng
        self.answered = self.refused = self.left = 0
        self.faults: list[str] = []

    async def client(self, until: float) -> None:
        while time.monotonic() < until:
            await (self.leave() if self.rng.random() < 0.5 else self.stay())

    def request(self) -> tuple[bytes, int, bool, str]:
        rng = self.rng
        tokens, stream = rng.randint(1, 12), rng.random() < 0.6
        orders = f"mock pace={rng.choice((0, 0, 0, 100))}"
        if rng.random() < 0.01:
            orders += f" break={rng.randrange(tokens)} at={rng.choice('ab')}"
        body = {"model": mocks.MODEL, "prompt": "x", "max_tokens": tokens, "user": orders, "stream": stream}
        return post("/v1/completions", body), tokens, stream, orders

    async def stay(self) -> None:
        request, tokens, stream, orders = self.request()
        answer = await ask(self.port, request, PATIENCE)
        if answer.status in (502, 503) and answer.whole:
            self.refused += 1  # every attempt met a fault: an answer, too
            return
        faults = read(answer, stream and answer.status == 200).faults if stream else []
        if stream and any("an error event" in fault for fault in faults):
            self.refused += 1
            return
        if not stream and (answer.status != 200 or not answer.whole):
            faults = [f"status {answer.status}: {answer.error or answer.body[:200]!r}"]
        text = read(answer, stream).text if not faults else ""
        if not faults and text != mocks.text_of(tokens):
            faults = [f"a wrong text: {text!r}"]
        self.faults += [f"{orders}, stream {stream}: {fault}" for fault in faults]
        self.answered += 1

    async def leave(self) -> None:
        request, *_ = self.request()
        transport, _ = await self.loop.create_connection(asyncio.Protocol, "127.0.0.1", self.port)
        transport.write(request[: self.rng.choice((len(request), len(request), len(request) // 2))])
        for _ in range(self.rng.randint(0, 60)):
            await asyncio.sleep(0)
        transport.abort()
        self.left += 1


async def _run(loop: Weather, seconds: float) -> Crowd:
    http, *ports = free_ports(3)
    for name, port in zip("ab", ports, strict=True):
        mock = mocks.Mock(name)
        loop.serve(port, lambda mock=mock: mocks.HttpFace(mock))  # type: ignore[misc]
    loop.mischief.ports.update(ports)
    backends = [Backend(name, port) for name, port in zip("ab", ports, strict=True)]
    options = {"hold": {"timeoutSeconds": 5}, "replay": {"attempts": 20}, "health": {"intervalSeconds": 0.05}}
    router = Router(parse_config(config(mocks.MODEL, backends, http, **options), "test"))
    await router.start()
    crowd = Crowd(loop, http)
    try:
        until = time.monotonic() + seconds
        await asyncio.gather(*(crowd.client(until) for _ in range(CLIENTS)))
        limit = time.monotonic() + PATIENCE
        served = router.served[0]
        while served.open or served.dispatcher.held or any(r.in_flight or r.pending for r in served.pool.replicas):
            assert time.monotonic() < limit, json.dumps([served.open, served.dispatcher.held])
            await asyncio.sleep(0.01)
    finally:
        await router.stop()
    return crowd


@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_that_takes_a_request_and_never_answers_is_left(loop: Loop, stream: bool) -> None:
    async def answer(replica: Replica, request: Request, writer: asyncio.StreamWriter) -> None:
        asked.append(replica.name)
        if len(asked) == 1:
            await request.gone()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    asked: list[str] = []
    with running(loop, answer, answer, limits={"answerSeconds": 0.2}) as (router, _):
        assert request_to(router.port, TEXT, prompt(2, stream=stream)).status == 200
        assert len(set(asked)) == len(asked) == 2
        router.idle()


def test_no_request_is_forgotten(seed: int, campaign: int) -> None:
    loop = Weather(random.Random(seed), Mischief(refused=0.01, stillborn=0.01, reset=0.0002))
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        crowd = runner.run(_run(loop, SECONDS * campaign))
    print(f"{crowd.answered} answered, {crowd.refused} refused, {crowd.left} left")
    assert not crowd.faults, "\n".join(crowd.faults[:20])
    assert crowd.answered > 100 * campaign
    assert crowd.left > 100 * campaign
