"""A router's object in a thread, replicas beside it that answer what a test says, and clients that see every byte."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvloop
from tests.faces.raw import Response, parse_response, read_all
from tests.router import mocks
from tests.router.router_process import Backend, config
from tests.worker.replica import free_ports

from arriero_router.config import Config, changes, parse_config
from arriero_router.router import Router
from arriero_router.served import Served

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MODEL = mocks.MODEL
PATIENCE = 20.0
_T = TypeVar("_T")


class Loop:
    """An event loop in a thread: what runs there is asked for with `call`, or awaited with `wait`."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: uvloop.run(self._main()), daemon=True)
        self._thread.start()
        assert self._ready.wait(PATIENCE)

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._ready.set()
        await self._over.wait()

    def wait(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE)

    def call(self, function: Callable[[], _T]) -> _T:
        async def run() -> _T:
            return function()

        return self.wait(run())

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self._over.set)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


def until(true: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Returns when it is; raises AssertionError after so many seconds."""
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, f"not within {seconds:g} s: {what}"
        time.sleep(0.005)


@dataclass
class Request:
    """What a scripted replica was asked."""

    line: str
    headers: list[tuple[str, str]]
    body: bytes
    reader: asyncio.StreamReader

    async def gone(self) -> None:
        """Returns when the router has hung up, by raising ConnectionError."""
        await self.reader.read(1)
        raise ConnectionError

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)


Script = Callable[["Replica", Request, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Replica:
    """Answers with whatever bytes its script writes. It is ready while `ready` says so."""

    name: str
    port: int
    script: Script
    ready: bool = True
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    """Open ones."""
    accepted: int = 0

    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def close(self) -> None:
        self.server.close()
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks)

    async def serve(self) -> None:
        self.server = await asyncio.start_server(self._client, "127.0.0.1", self.port)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        counted = False
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = [(k.lower(), v.strip()) for k, _, v in (line.partition(":") for line in head[1:-2])]
                request = Request(head[0], headers, b"", reader)
                request.body = await reader.readexactly(int(request.header("content-length") or 0))
                if request.line.startswith("GET /health"):
                    writer.write(
                        b"HTTP/1.1 %b\r\ncontent-length: 0\r\n\r\n"
                        % (b"200 OK" if self.ready else b"503 Service Unavailable")
                    )
                    continue
                if not counted:
                    counted = True
                    self.connections += 1
                    self.accepted += 1
                self.requests.append(request)
                await self.script(self, request, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.tasks.discard(task)
            self.connections -= counted
            writer.transport.abort()


class Running:
    """A router and its replicas. Options are fields of the configuration, as in its file."""

    def __init__(self, loop: Loop, backends: list[Backend], *, grpc: bool = False, **options: Any) -> None:
        self.loop = loop
        self.backends = backends
        self.port, self.rpc = free_ports(2)
        self.rpc *= grpc
        self.options = {"health": {"intervalSeconds": 0.05}, **options}

    def configuration(self, **options: Any) -> Config:
        return parse_config(config(MODEL, self.backends, self.port, self.rpc, **{**self.options, **options}), "test")

    def start(self) -> None:
        async def begin() -> None:
            self.router = Router(self.configuration())
            await self.router.start()

        self.loop.wait(begin())

    def stop(self) -> None:
        self.loop.wait(self.router.stop())

    def reload(self, **options: Any) -> tuple[str, ...]:
        """Take over another configuration; what it refuses to change."""
        change = changes(self.router.config, self.configuration(**options))
        self.loop.call(lambda: self.router.reload(change.config))
        return change.refused

    @property
    def served(self) -> Served:
        return self.router.served[0]

    def ready(self, count: int) -> None:
        """Returns when so many replicas are."""
        until(lambda: self.loop.call(lambda: self.served.pool.ready) == count, f"{count} replicas are ready")

    def idle(self) -> None:
        """Returns when nothing is in flight, pending or held any more."""

        def left() -> list[int]:
            return [
                number
                for served in self.router.served
                for number in [served.open, served.dispatcher.held]
                + [n for replica in served.pool.replicas for n in (replica.in_flight, replica.pending)]
            ]

        until(lambda: not any(self.loop.call(left)), "all counts are zero")

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples that bear these labels."""
        from tests.router.router_process import parse_metrics

        text = ask(self.port, "/metrics").body.decode()
        return sum(
            value for key, found, value in parse_metrics(text) if key == name and labels.items() <= found.items()
        )


@contextmanager
def running(loop: Loop, *scripts: Script, wait: bool = True, **options: Any) -> Iterator[tuple[Running, list[Replica]]]:
    """A router in front of a scripted replica for each script, `a`, `b` and so on. With `wait` all are ready."""
    ports = free_ports(len(scripts))
    replicas = [Replica("abcdefgh"[i], port, scripts[i]) for i, port in enumerate(ports)]
    for replica in replicas:
        loop.wait(replica.serve())
    router = Running(loop, [Backend(replica.name, replica.port) for replica in replicas], **options)
    router.start()
    try:
        if wait:
            router.ready(len(replicas))
        yield router, replicas
    finally:
        router.stop()
        for replica in replicas:
            loop.wait(replica.close())


@contextmanager
def mocked(loop: Loop, count: int = 2, **options: Any) -> Iterator[tuple[Running, list[mocks.Mock]]]:
    """A router in front of mock replicas `a`, `b` and so on, HTTP alone."""
    found = [mocks.Mock("abcdefgh"[i]) for i in range(count)]
    ports = free_ports(count)

    async def serve() -> list[asyncio.Server]:
        return [
            await asyncio.get_running_loop().create_server(lambda mock=mock: mocks.HttpFace(mock), "127.0.0.1", port)  # type: ignore[misc]
            for mock, port in zip(found, ports, strict=True)
        ]

    servers = loop.wait(serve())
    router = Running(loop, [Backend(mock.name, port) for mock, port in zip(found, ports, strict=True)], **options)
    router.start()
    try:
        router.ready(count)
        yield router, found
    finally:
        router.stop()
        for server in servers:
            loop.call(server.close)


def request(path: str, body: Any = None, *headers: str, method: str = "", close: bool = True) -> bytes:
    """The bytes of a request; a body that is not bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = [f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1", "host: router", *headers]
    if body is not None:
        lines += ["content-type: application/json", f"content-length: {len(data)}"]
    if close:
        lines.append("connection: close")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data


def send(port: int, data: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    client.sendall(data)
    return client


def talk(port: int, data: bytes) -> bytes:
    """All that comes back until the connection is closed."""
    with send(port, data) as client:
        return read_all(client)


def ask(port: int, path: str, body: Any = None, *headers: str, method: str = "") -> Response:
    return parse_response(talk(port, request(path, body, *headers, method=method)), method or "GET")


def prompt(tokens: int = 4, orders: str = "", **fields: Any) -> dict[str, Any]:
    """A completion of the mocks'."""
    return {"prompt": "one two", "max_tokens": tokens, "user": f"mock {orders}", **fields}
