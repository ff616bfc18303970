"""The streams of Worker.Status, against a real server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from tests.operator.test_store import pod

from arriero.inference.v1 import worker_pb2, worker_pb2_grpc
from arriero_operator import names
from arriero_operator.observe import Pod
from arriero_operator.runtime.statuses import Statuses


class Engine(worker_pb2_grpc.WorkerServicer):
    """Says how it is once it may."""

    def __init__(self) -> None:
        self.asked, self.may = asyncio.Event(), asyncio.Event()

    async def Status(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.StatusResponse]:
        self.asked.set()
        await self.may.wait()
        yield worker_pb2.StatusResponse(phase=worker_pb2.PHASE_SERVING, epoch=7)
        await asyncio.Event().wait()


async def test_first_words_are_waited_for_but_not_forever() -> None:
    engine, server = Engine(), grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(engine, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    raw = pod("llama-0-0", 5, **{names.DEPLOYMENT: "llama", names.GROUP: "llama-0"})
    raw["status"] |= {"podIP": "127.0.0.1", "phase": "Running"}
    seen = Pod.of(raw)
    statuses = Statuses(lambda key: None, port)
    try:
        async with asyncio.timeout(30):
            await statuses.first_words(30.0)  # of nobody
            statuses.follow(("space", "llama-0-0"), seen)
            await engine.asked.wait()
            begun = time.monotonic()
            await statuses.first_words(0.2)
            assert time.monotonic() - begun >= 0.2
            assert not statuses.reports([seen])
            waiting = asyncio.create_task(statuses.first_words(30.0))
            engine.may.set()
            await waiting
        assert statuses.reports([seen])["llama-0-0"].epoch == 7
    finally:
        await statuses.close()
        await server.stop(None)


async def test_who_cannot_be_asked_is_not_waited_for() -> None:
    raw = pod("llama-0-0", 5, **{names.DEPLOYMENT: "llama", names.GROUP: "llama-0"})
    raw["status"] |= {"podIP": "127.0.0.1", "phase": "Running"}
    statuses = Statuses(lambda key: None, 1)  # nobody listens there
    try:
        statuses.follow(("space", "llama-0-0"), Pod.of(raw))
        async with asyncio.timeout(20):
            await statuses.first_words(60.0)
            statuses.follow(("space", "llama-0-0"), None)
            await statuses.first_words(60.0)
    finally:
        await statuses.close()
