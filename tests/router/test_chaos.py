"""What clients of the router see while the replicas behind it die, and what the router keeps of it afterwards.

`pytest tests/router/test_chaos.py --campaign 60` is the long form: 50 kills, an outage of 20 s, half an hour of load.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack

import grpc
import pytest
from tests.router import mocks
from tests.router.chaos import Fleet, kill_rounds, our_router, total_outage
from tests.router.load import ask, post, read
from tests.router.mocks import MockReplica
from tests.router.router_process import Backend, RouterProcess
from tests.worker.replica import free_ports

from arriero.inference.v1 import inference_pb2, inference_pb2_grpc

SOAK_SECONDS = 30.0
BRIEF_SOAK_SECONDS = 12.0
CLIENTS = 16


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet() as running:
        yield running


@pytest.mark.timeout(3600)
async def test_no_stream_breaks_when_replicas_are_killed(fleet: Fleet, campaign: int, seed: int) -> None:
    """3 rounds (50 as a campaign) of kill -9 of a whole replica at a random moment under 16 clients."""
    port, rpc = free_ports(2)
    with our_router(fleet, port, rpc) as router:
        outcome = await kill_rounds(
            fleet, port, rounds=50 if campaign > 1 else 3, seed=seed, clients=CLIENTS, say=print
        )
        replays = router.metrics()["arriero_router_replays_total"]
    print(f"{replays:g} replays")
    assert outcome.sound, "\n".join([outcome.summary(), *outcome.problems])
    assert not outcome.problems, outcome.problems
    assert outcome.requests > 50 * outcome.kills / 3
    assert outcome.pauses, "no stream was open at any kill"
    assert replays >= outcome.kills, "the kills hit hardly anything"


async def test_requests_wait_while_no_replica_is_up(fleet: Fleet, campaign: int, seed: int) -> None:
    """Both replicas are down for 3 s (20 s as a campaign) under load: all is answered after their return, once."""
    port, rpc = free_ports(2)
    with our_router(fleet, port, rpc, hold={"timeoutSeconds": 120}):
        outage = await total_outage(fleet, port, seconds=20.0 if campaign > 1 else 3.0, seed=seed)
    print(f"{outage.outcome.summary()}; answered after the return, s: {sorted(outage.waits)}")
    assert outage.outcome.sound, "\n".join([outage.outcome.summary(), *outage.outcome.problems])
    assert outage.answered == outage.outcome.requests, "requests were lost or duplicated on their way"


class Soak:
    """Mixed load on mocks, each answer checked: whole, cut off by the client, broken by the replica, refused, gRPC."""

    def __init__(self, port: int, rpc: int, rng: random.Random) -> None:
        self.port, self.rpc, self.rng = port, rpc, rng
        self.done = dict.fromkeys(("whole", "stream", "replayed", "left", "refused", "rpc"), 0)

    async def client(self, until: float) -> None:
        kinds = list(self.done)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.rpc}") as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            while time.monotonic() < until:
                kind = self.rng.choice(kinds)
                await (self.call(stub) if kind == "rpc" else self.ask(kind))
                self.done[kind] += 1

    def words(self) -> str:
        return " ".join(f"{self.rng.randrange(2**32):x}" for _ in range(200))

    async def ask(self, kind: str) -> None:
        tokens = self.rng.randint(1, 40)
        orders = f"mock pace={self.rng.choice((0, 500, 2000))}"
        if kind == "replayed":
            orders += f" break={self.rng.randrange(tokens)} at={self.rng.choice('ab')}"
        body = {
            "model": "unknown" if kind == "refused" else mocks.MODEL,
            "messages": [{"role": "user", "content": self.words()}],
            "max_tokens": tokens,
            "user": orders,
        }
        if kind in ("stream", "replayed", "left"):
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        request = post("/v1/chat/completions", body)
        if kind == "left":
            await self.leave(request)
            return
        answer = await ask(self.port, request, timeout=30)
        if kind == "refused":
            assert answer.status == 404, (answer.status, answer.body)
            return
        reading = read(answer, "stream" in body)
        assert not reading.faults, (body["user"], reading.faults)
        assert reading.text == mocks.text_of(tokens)
        assert reading.tokens == (mocks.PROMPT_TOKENS, tokens)

    async def leave(self, request: bytes) -> None:
        """Begin a request, and go away at a random moment of it."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request[: self.rng.choice((len(request), len(request), len(request) // 2))])
        await asyncio.sleep(self.rng.uniform(0, 0.02))
        writer.transport.abort()

    async def call(self, stub: inference_pb2_grpc.InferenceStub) -> None:
        tokens = self.rng.randint(1, 40)
        request = inference_pb2.GenerateRequest(model=mocks.MODEL, text=self.words())
        request.sampling.max_tokens = tokens
        text = ""
        async for piece in stub.Generate(request, timeout=30):
            assert not piece.token_ids
            text += piece.text
        assert text == mocks.text_of(tokens)


@pytest.mark.timeout(3600)
async def test_memory_and_counters_stay_where_they_were(campaign: int, seed: int) -> None:
    """Mixed load, briefly (half a minute times the campaign): memory is flat, nothing stays in flight or held."""
    ports = free_ports(8)
    backends = [Backend("a", *ports[:3]), Backend("b", *ports[3:6])]
    models = [
        {
            "name": mocks.MODEL,
            "prefix": {"maxMarks": 4096},
            "endpoints": {
                "static": [
                    {"name": b.name, "host": "127.0.0.1"}
                    | {"httpPort": b.http_port, "grpcPort": b.grpc_port, "controlPort": b.control_port}
                    for b in backends
                ]
            },
        }
    ]
    with ExitStack() as stack:
        for backend in backends:
            stack.enter_context(MockReplica(*backend))
        router: RouterProcess = stack.enter_context(
            RouterProcess.ours(mocks.MODEL, backends, ports[6], ports[7], models=models)
        )
        soak = Soak(ports[6], ports[7], random.Random(seed))
        seconds = SOAK_SECONDS * campaign if campaign > 1 else BRIEF_SOAK_SECONDS
        until = time.monotonic() + seconds
        clients = [asyncio.create_task(soak.client(until)) for _ in range(CLIENTS)]
        resident: list[int] = []
        while not all(client.done() for client in clients):
            resident.append(router.resident_bytes())
            await asyncio.wait(clients, timeout=seconds / 200)
        for client in clients:
            client.result()
        quarter = len(resident) // 4
        early, late = statistics.median(resident[quarter : 2 * quarter]), statistics.median(resident[-quarter:])
        print(f"{json.dumps(soak.done)}; resident {early / 2**20:.1f} MiB, later {late / 2**20:.1f} MiB")
        assert min(soak.done.values()) > 10 * campaign, soak.done
        assert late < 1.03 * early + 2 * 2**20, f"resident memory grew from {early} to {late} bytes"
        await _until_idle(router)


async def _until_idle(router: RouterProcess) -> None:
    """Returns when the gauges of what is in flight and held are zero. Raises AssertionError after 10 s."""
    limit = time.monotonic() + 10
    while True:
        metrics = await asyncio.to_thread(router.metrics)
        gauges = {
            name: value
            for name, value in metrics.items()
            if name
            in ("arriero_router_replica_in_flight", "arriero_router_replica_pending_bytes", "arriero_router_held")
        }
        assert len(gauges) == 3, sorted(metrics)
        if not any(gauges.values()):
            return
        assert time.monotonic() < limit, gauges
        await asyncio.sleep(0.1)
