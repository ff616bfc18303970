"""Asking replicas of other engines whether they are ready."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trustme
from tests.router.endpoints.fakes import Told, running, until

from arriero_router.core.replica import Endpoint, Report
from arriero_router.endpoints.channel import Security
from arriero_router.endpoints.probe import Probe, ProbeLimits

BRISK = ProbeLimits(interval=0.02, hurried=0.01, answer=0.5)
SLOW = ProbeLimits(interval=60, hurried=0.01, answer=5)


def plain(status: str, body: str = "", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


OK = plain("200 OK", "fine")


class Health:
    """An HTTP server whose answers are bytes; `close` ends the connection behind each."""

    def __init__(self, answers: Callable[[str], bytes]) -> None:
        self.answers = answers
        self.close = False
        self.port = 0
        self.asked: list[str] = []
        self.connections = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, context: ssl.SSLContext | None = None) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, ssl=context)
        self.port = self._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self.hang_up()

    def hang_up(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            while line := await reader.readline():
                while (await reader.readline()).strip():
                    pass
                self.asked.append(line.split()[1].decode())
                writer.write(self.answers(self.asked[-1]))
                if self.close:
                    await writer.drain()
                    break
        except OSError:
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


@asynccontextmanager
async def health(answers: Callable[[str], bytes]) -> AsyncIterator[Health]:
    server = Health(answers)
    await server.start()
    try:
        yield server
    finally:
        server.stop()


def endpoint(port: int, host: str = "127.0.0.1") -> Endpoint:
    return Endpoint(name="a", host=host, http_port=port)


async def test_ready_is_told_once_over_one_connection() -> None:
    told = Told()
    async with health(lambda path: OK) as server, running(Probe(endpoint(server.port), told, BRISK).run()):
        await until(lambda: len(server.asked) > 5)
    assert told.events == [("told", "a", Report(ready=True))]
    assert server.connections == 1
    assert set(server.asked) == {"/health/ready"}


async def test_each_change_is_told_with_its_reason() -> None:
    told = Told()
    async with health(lambda path: OK) as server, running(Probe(endpoint(server.port), told, BRISK).run()):
        await told.until(lambda: told.ready("a"))
        server.answers = lambda path: plain("503 Service Unavailable", "loading")
        await told.until(lambda: not told.ready("a"))
        assert told.reports["a"].reason == "/health/ready answers 503 Service Unavailable"
        server.answers = lambda path: OK
        await told.until(lambda: told.ready("a"))
    assert told.losses == []


@pytest.mark.parametrize("status", ["404 Not Found", "405 Method Not Allowed"])
async def test_another_engine_is_asked_at_its_own_path(status: str) -> None:
    told = Told()
    async with (
        health(lambda path: OK if path == "/health" else plain(status)) as server,
        running(Probe(endpoint(server.port), told, BRISK).run()),
    ):
        await told.until(lambda: told.ready("a"))
        await until(lambda: len(server.asked) > 4)
    assert server.asked[:3] == ["/health/ready", "/health", "/health"]


async def test_a_path_of_ones_own() -> None:
    told = Told()
    async with (
        health(lambda path: OK if path == "/up" else plain("404 Not Found")) as server,
        running(Probe(endpoint(server.port), told, BRISK, "/up").run()),
    ):
        await told.until(lambda: told.ready("a"))
    assert set(server.asked) == {"/up"}


async def test_a_server_without_either_path_is_not_ready() -> None:
    told = Told()
    async with (
        health(lambda path: plain("404 Not Found")) as server,
        running(Probe(endpoint(server.port), told, BRISK).run()),
    ):
        await told.until(lambda: told.reports)
        assert told.reports["a"] == Report(ready=False, reason="/health answers 404 Not Found")
        server.answers = lambda path: OK if path == "/health/ready" else plain("404 Not Found")
        await told.until(lambda: told.ready("a"))


async def test_a_killed_replica_is_lost_at_once_and_found_again_at_once() -> None:
    told = Told()
    async with health(lambda path: OK) as server, running(Probe(endpoint(server.port), told, SLOW).run()):
        await told.until(lambda: told.ready("a"))
        server.stop()
        await told.until(lambda: told.losses, 15)
        assert told.losses == [("a", "Connection refused")]
        await server.start()
        await told.until(lambda: told.ready("a"), 15)
    assert len(told.losses) == 1


async def test_a_connection_that_ends_is_no_loss() -> None:
    told = Told()
    async with health(lambda path: OK) as server, running(Probe(endpoint(server.port), told, BRISK).run()):
        await told.until(lambda: told.ready("a"))
        for _ in range(5):
            before = (server.connections, len(server.asked))
            server.hang_up()
            await until(lambda before=before: server.connections > before[0] and len(server.asked) > before[1] + 1)
        server.close = True
        await until(lambda: server.connections > 12)
    assert told.losses == []
    assert len(told.events) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.0 200 OK\r\n\r\nuntil the end",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n",
    ],
)
async def test_answers_of_every_framing(answer: bytes) -> None:
    told = Told()
    async with health(lambda path: answer) as server:
        server.close = b"chunked" not in answer
        async with running(Probe(endpoint(server.port), told, BRISK).run()):
            await told.until(lambda: told.ready("a"))
            await until(lambda: len(server.asked) > 3)
    assert told.losses == []


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "no answer within 0.2 s"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "no answer within 0.2 s"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "no HTTP answer: "),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n" + b"x" * (2 << 20), "more than"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", "no HTTP answer: "),
    ],
)
async def test_what_is_no_answer_is_a_loss(answer: bytes, said: str) -> None:
    told = Told()
    limits = ProbeLimits(interval=0.02, hurried=0.01, answer=0.2)
    async with health(lambda path: answer) as server, running(Probe(endpoint(server.port), told, limits).run()):
        await told.until(lambda: told.losses)
        assert said in told.losses[0][1]
        server.answers = lambda path: OK
        await told.until(lambda: told.ready("a"))


async def test_a_truncated_answer_is_a_loss() -> None:
    told = Told()
    async with health(lambda path: b"HTTP/1.1 200 OK\r\nContent-Le") as server:
        server.close = True
        async with running(Probe(endpoint(server.port), told, BRISK).run()):
            await told.until(lambda: told.losses)
    assert told.losses == [("a", "it hung up")]


async def test_over_tls() -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("replica.example").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    server = Health(lambda path: OK)
    await server.start(context)
    told, other = Told(), Told()
    good = Security(http=trusting, server_name="replica.example")
    try:
        async with (
            running(Probe(endpoint(server.port), told, BRISK, security=good).run()),
            running(Probe(endpoint(server.port), other, BRISK, security=Security(http=trusting)).run()),
        ):
            await told.until(lambda: told.ready("a"))
            await other.until(lambda: other.losses)
            assert "certificate" in other.losses[0][1].lower()
    finally:
        server.stop()
