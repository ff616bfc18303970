"""Stand-ins around sources and followers: a pool that remembers, and servers that can be stopped, muted and misled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from arriero.inference.v1 import prefixes_pb2, prefixes_pb2_grpc, worker_pb2, worker_pb2_grpc
from arriero_router.core.replica import Endpoint, Report

PATIENCE = 20.0


class Told:
    """Remembers what it is told, as a pool and a prefix index would, and lets a test wait for it."""

    def __init__(self) -> None:
        self.published: list[list[Endpoint]] = []
        self.reports: dict[str, Report] = {}
        self.losses: list[tuple[str, str]] = []
        self.marks: dict[str, set[int]] = {}
        self.events: list[tuple[Any, ...]] = []
        self._changed = asyncio.Event()

    def publish(self, endpoints: list[Endpoint]) -> None:
        self.published.append(endpoints)
        self._add("endpoints", *(endpoint.name for endpoint in endpoints))

    def told(self, name: str, report: Report) -> None:
        self.reports[name] = report
        self._add("told", name, report)

    def lost(self, name: str, reason: str) -> None:
        self.reports.pop(name, None)
        self.losses.append((name, reason))
        self._add("lost", name, reason)

    def on_marks(self, name: str, reset: bool, added: Sequence[int], removed: Sequence[int]) -> None:
        held = self.marks.setdefault(name, set())
        if reset:
            held.clear()
        held.update(added)
        held.difference_update(removed)
        self._add("marks", name, reset, tuple(added), tuple(removed))

    def _add(self, *event: Any) -> None:
        self.events.append(event)
        self._changed.set()

    def ready(self, name: str) -> bool:
        return name in self.reports and self.reports[name].ready

    async def until(self, condition: Callable[[], object], patience: float = PATIENCE) -> None:
        async with asyncio.timeout(patience):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


async def until(condition: Callable[[], object]) -> None:
    """Wait for what nobody announces."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@asynccontextmanager
async def running(work: Awaitable[None]) -> AsyncIterator[asyncio.Task[None]]:
    """`work` as a task for the length of the block; it must not end by itself, and must be cancelled cleanly."""
    task = asyncio.ensure_future(work)
    try:
        yield task
        assert not task.done(), task
    finally:
        task.cancel()
        outcome = (await asyncio.gather(task, return_exceptions=True))[0]
        assert isinstance(outcome, asyncio.CancelledError), outcome


class Replica(worker_pb2_grpc.WorkerServicer, prefixes_pb2_grpc.PrefixesServicer):
    """A replica's control port (and gRPC face, on the same port): tells its status and marks when they are set. It can
    be stopped and started again on the same port, and be mute: accept calls and never answer.
    """

    def __init__(self, *, prefixes: bool = True) -> None:
        self.port = 0
        self.asked = 0
        self.watched = 0
        self.mute = False
        self.held: list[int] = []
        self._prefixes = prefixes
        self._status = worker_pb2.StatusResponse(phase=worker_pb2.PHASE_SERVING, run="1")
        self._changed = asyncio.Condition()
        self._deltas: list[prefixes_pb2.WatchResponse] = []
        self._server: grpc.aio.Server | None = None

    async def start(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        if self._prefixes:
            prefixes_pb2_grpc.add_PrefixesServicer_to_server(self, self._server)
        where = f"127.0.0.1:{self.port}"
        if credentials is None:
            self.port = self._server.add_insecure_port(where)
        else:
            self.port = self._server.add_secure_port(where, credentials)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    async def set(self, **fields: Any) -> None:
        self._status = worker_pb2.StatusResponse(**{"phase": worker_pb2.PHASE_SERVING, "run": "1", **fields})
        async with self._changed:
            self._changed.notify_all()

    async def delta(self, added: Sequence[int] = (), removed: Sequence[int] = (), reset: bool = False) -> None:
        self.held = [mark for mark in (() if reset else self.held) if mark not in removed] + list(added)
        self._deltas.append(prefixes_pb2.WatchResponse(reset=reset, added=added, removed=removed, run="1"))
        async with self._changed:
            self._changed.notify_all()

    async def Status(
        self, request: worker_pb2.StatusRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.StatusResponse]:
        self.asked += request.once
        if self.mute:
            await asyncio.Event().wait()
        while True:
            yield (last := self._status)
            if request.once:
                return
            async with self._changed:
                await self._changed.wait_for(lambda: self._status is not last)

    async def Watch(
        self, request: prefixes_pb2.WatchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[prefixes_pb2.WatchResponse]:
        self.watched += 1
        sent = len(self._deltas)
        yield prefixes_pb2.WatchResponse(reset=True, added=self.held, run="1")
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda sent=sent: len(self._deltas) > sent)
            yield self._deltas[sent]
            sent += 1


@asynccontextmanager
async def replica(**options: Any) -> AsyncIterator[Replica]:
    server = Replica(**options)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


class Wire:
    """A TCP relay in front of a port. `freeze` makes the other side as silent as a host that lost its power: nothing
    passes, nothing is closed, nobody is refused.
    """

    def __init__(self, port: int) -> None:
        self.port = 0
        self._to = port
        self._open = asyncio.Event()
        self._open.set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def freeze(self) -> None:
        self._open.clear()

    def thaw(self) -> None:
        self._open.set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._relay(reader, writer))
        self._tasks.add(task)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            await self._open.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
            writers.append(far_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer))
                group.create_task(self._pump(far_reader, writer))
        except* OSError:
            pass
        finally:
            for one in writers:
                one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            await self._open.wait()
            writer.write(data)
        raise ConnectionResetError


@asynccontextmanager
async def wire(port: int) -> AsyncIterator[Wire]:
    relay = Wire(port)
    await relay.start()
    try:
        yield relay
    finally:
        await relay.stop()
