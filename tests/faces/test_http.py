"""The HTTP server core on raw sockets: framing, limits, time-outs, pipelining, clients that go away."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from typing import Any

import pytest
import uvloop
from tests.faces.raw import parse_response, read_all

from arriero_faces.http.errors import HttpError
from arriero_faces.http.exchange import Exchange
from arriero_faces.http.server import HttpLimits, HttpServer, bind

LIMITS = HttpLimits(
    max_head=4096,
    max_headers=20,
    max_body=10_000,
    max_connections=20,
    max_pipelined=4,
    max_unanswered=25_000,
    write_buffer=4096,
    linger_seconds=0.5,
    sweep_seconds=0.05,
)
HASTY = replace(LIMITS, head_seconds=0.3, body_seconds=0.3, idle_seconds=1.0, stall_seconds=0.4)


class Server:
    """A handler with one trick per path, in a thread."""

    def __init__(self, limits: HttpLimits = LIMITS) -> None:
        self.cancelled = 0
        self.seen: list[tuple[str, str, bytes]] = []
        self.gate = threading.Event()
        self._ready = threading.Event()
        self._limits = limits
        self._thread = threading.Thread(target=lambda: uvloop.run(self._main()), daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        self.loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self.http = HttpServer(self._handle, self._limits)
        listener = bind("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        await self.http.start(listener)
        self._ready.set()
        await self._over.wait()
        await self.http.stop()

    def _handle(self, exchange: Exchange) -> Coroutine[Any, Any, None] | None:
        return self._at_once(exchange) if exchange.path.startswith("/callback") else self._as_coroutine(exchange)

    def _at_once(self, exchange: Exchange) -> None:
        """Answers without a coroutine: now, later, or never."""
        self.seen.append((exchange.method, exchange.path, exchange.body))

        def gone() -> None:
            self.cancelled += 1

        def later() -> None:
            exchange.respond(200, b"later")
            exchange.done()

        exchange.on_gone = gone
        match exchange.path.removeprefix("/callback"):
            case "/later":
                self.loop.call_later(0.01, later)
            case "/never":
                pass
            case "/forgotten":
                exchange.done()
            case "/broken":
                raise KeyError("a bug")
            case "/broken-late":
                exchange.start(200, "text/plain")
                exchange.write(b"half")
                exchange.done(KeyError("a bug"))
            case "/teapot":
                raise HttpError(429, "later", retry_after=1.2)
            case "/refused":
                exchange.done(HttpError(429, "later", retry_after=1.2))
            case _:
                exchange.respond(200, exchange.body or b"ok")
                exchange.done()

    async def _as_coroutine(self, exchange: Exchange) -> None:
        self.seen.append((exchange.method, exchange.path, exchange.body))
        try:
            await self._answer(exchange)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _answer(self, exchange: Exchange) -> None:
        match exchange.path:
            case "/slow":
                await self._opened()
                exchange.respond(200, b"slow")
            case "/stream":
                exchange.start(200, "text/plain")
                for part in (b"one ", b"two ", b""):
                    exchange.write(part)
                exchange.finish()
            case "/flood":
                exchange.start(200, "text/plain")
                while True:
                    exchange.write(b"x" * 65536)
                    await exchange.drain()
            case "/big":
                exchange.respond(200, b"y" * 20_000_000)
            case "/cut":
                exchange.start(200, "text/plain")
                exchange.write(b"half")
                exchange.cut()
            case "/broken":
                raise KeyError("a bug")
            case "/broken-late":
                exchange.start(200, "text/plain")
                exchange.write(b"half")
                raise KeyError("a bug")
            case "/forgotten":
                return
            case "/teapot":
                raise HttpError(429, "later", retry_after=1.2)
            case _:
                exchange.respond(200, exchange.body or exchange.query.encode() or b"ok")

    async def _opened(self) -> None:
        while not self.gate.is_set():  # noqa: ASYNC110  # the gate belongs to the test's thread
            await asyncio.sleep(0.005)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def raw(self, data: bytes) -> bytes:
        with self.connect() as connection:
            connection.sendall(data)
            return read_all(connection)

    def wait_for(self, condition: Any) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)


@pytest.fixture(scope="module")
def shared_servers() -> Iterator[list[Server]]:
    with Server() as server, Server(HASTY) as hasty:
        yield [server, hasty]


def as_new(server: Server) -> Iterator[Server]:
    server.gate.clear()
    server.cancelled = 0
    server.seen.clear()
    yield server
    server.gate.set()
    server.wait_for(lambda: server.http.connections == 0)
    assert server.http.unanswered == 0, "every byte held was given back"


@pytest.fixture
def server(shared_servers: list[Server]) -> Iterator[Server]:
    yield from as_new(shared_servers[0])


@pytest.fixture
def hasty(shared_servers: list[Server]) -> Iterator[Server]:
    """A server with short time limits."""
    yield from as_new(shared_servers[1])


def head(line: str, *headers: str) -> bytes:
    return "\r\n".join([line, "Host: x", *headers, "", ""]).encode("latin-1")


CLOSE = "Connection: close"


def test_one_request(server: Server) -> None:
    response = parse_response(server.raw(head("GET /hello?a=b HTTP/1.1", CLOSE)))
    assert (response.status, response.body) == (200, b"a=b")
    assert response.headers["connection"] == "close"
    assert "date" in response.headers


@pytest.mark.parametrize("target", ["http://x/hello?a=b", "HTTPS://x:8443/hello?a=b", "/hello?a=b"])
def test_a_target_may_be_absolute(server: Server, target: str) -> None:
    assert parse_response(server.raw(head(f"GET {target} HTTP/1.1", CLOSE))).body == b"a=b"
    assert server.seen[-1][:2] == ("GET", "/hello")


def test_the_head_may_come_byte_by_byte(server: Server) -> None:
    with server.connect() as connection:
        for byte in head("POST /a HTTP/1.1", CLOSE, "Content-Length: 3") + b"abc":
            connection.sendall(bytes([byte]))
        assert parse_response(read_all(connection)).body == b"abc"


def test_keep_alive_and_pipelining_answer_in_order(server: Server) -> None:
    requests = [head(f"POST /{i} HTTP/1.1", f"Content-Length: {len(str(i))}") + str(i).encode() for i in range(50)]
    data = server.raw(b"".join(requests) + head("GET /last HTTP/1.1", CLOSE))
    bodies = [part.partition(b"\r\n\r\n")[2] for part in data.split(b"HTTP/1.1 200 OK\r\n")[1:]]
    assert bodies == [str(i).encode() for i in range(50)] + [b"ok"]


def test_a_slow_answer_holds_back_those_behind_it(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(head("GET /slow HTTP/1.1") + head("GET /fast HTTP/1.1", CLOSE))
        server.wait_for(lambda: server.seen)
        assert [path for _, path, _ in server.seen] == ["/slow"]
        server.gate.set()
        data = read_all(connection)
    assert data.index(b"slow") < data.index(b"ok")


def test_chunked_bodies_with_extensions_and_trailers(server: Server) -> None:
    body = b"3;ext=1\r\nabc\r\n2\r\nde\r\n0\r\nTrailer: x\r\n\r\n"
    data = server.raw(head("POST /a HTTP/1.1", "Transfer-Encoding: chunked", CLOSE) + body)
    assert parse_response(data).body == b"abcde"


def test_http_1_0(server: Server) -> None:
    data = server.raw(b"GET /stream HTTP/1.0\r\n\r\n")
    assert data.endswith(b"\r\n\r\none two ")
    assert b"chunked" not in data
    data = server.raw(b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /b HTTP/1.0\r\n\r\n")
    assert data.count(b"200 OK") == 2
    assert data.count(b"connection: keep-alive") == 1


def test_streams_are_chunked_and_head_has_no_body(server: Server) -> None:
    data = server.raw(head("GET /stream HTTP/1.1", CLOSE))
    assert data.endswith(b"\r\n\r\n4\r\none \r\n4\r\ntwo \r\n0\r\n\r\n")
    data = server.raw(head("HEAD /stream HTTP/1.1") + head("HEAD /a HTTP/1.1", CLOSE))
    assert data.count(b"HTTP/1.1 200 OK") == 2
    assert b"content-length: 2\r\n" in data
    assert data.endswith(b"\r\n\r\n")


def test_expect_continue(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(head("POST /a HTTP/1.1", "Expect: 100-continue", "Content-Length: 3", CLOSE))
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"abc")
        assert parse_response(read_all(connection)).body == b"abc"
    with server.connect() as connection:  # behind an answer that is not out yet, it waits for its turn
        connection.sendall(head("GET /slow HTTP/1.1"))
        connection.sendall(head("POST /a HTTP/1.1", "Expect: 100-continue", "Content-Length: 3", CLOSE))
        server.wait_for(lambda: server.seen[-1][1] == "/slow")
        server.gate.set()
        first = connection.recv(1000)
        while b"100 Continue" not in first:
            first += connection.recv(1000)
        assert first.index(b"slow") < first.index(b"100 Continue")
        connection.sendall(b"abc")
        assert read_all(connection).endswith(b"abc")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"hello\r\n\r\n", 400),
        (b"FOO / HTTP/1.1\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET / HTTP/3.7\r\n\r\n", 400),
        (b"GET / HTTP/0.9\r\n\r\n", 505),
        (b"GET /\r\n\r\n", 505),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (head("GET / HTTP/1.1", "Host: y"), 400),
        (head("GET / HTTP/1.1", "Bad Header: x"), 400),
        (head("GET / HTTP/1.1", "A: b\r\n folded"), 400),
        (head("GET / HTTP/1.1", "A: \x00"), 400),
        (b"GET / HTTP/1.1\nHost: x\n\n", 400),
        (head("POST / HTTP/1.1", "Content-Length: 3", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
        (head("POST / HTTP/1.1", "Transfer-Encoding: chunked", "Content-Length: 3") + b"0\r\n\r\n", 400),
        (head("POST / HTTP/1.1", "Content-Length: 3", "Content-Length: 4") + b"abcd", 400),
        (head("POST / HTTP/1.1", "Content-Length: 3, 3") + b"abc", 400),
        (head("POST / HTTP/1.1", "Content-Length: -1"), 400),
        (head("POST / HTTP/1.1", "Content-Length: +1") + b"a", 400),
        (head("POST / HTTP/1.1", "Content-Length: 99999999999999999999999"), 400),
        (head("POST / HTTP/1.1", "Content-Length: 18446744073709551615"), 413),
        (head("POST / HTTP/1.1", "Content-Length: 10001"), 413),
        (head("POST / HTTP/1.1", "Content-Length: 10001", "Expect: 100-continue"), 413),
        (head("POST / HTTP/1.1", "Transfer-Encoding: chunked") + b"ffffffff\r\n" + b"x" * 20_000, 413),
        (head("POST / HTTP/1.1", "Transfer-Encoding: chunked") + b"zz\r\n", 400),
        (head("POST / HTTP/1.1", "Transfer-Encoding: chunked") + b"1\r\nabc\r\n", 400),
        (head("POST / HTTP/1.1", "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n", 501),
        (head("POST / HTTP/1.1", "Transfer-Encoding: gzip"), 501),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (head("POST / HTTP/1.1", "Content-Encoding: gzip", "Content-Length: 1") + b"x", 415),
        (head("POST / HTTP/1.1", "Expect: a-miracle", "Content-Length: 1") + b"x", 417),
        (head("CONNECT a:80 HTTP/1.1"), 405),
        (head("POST / HTTP/1.1", "Upgrade: h2c", "Connection: Upgrade", "Content-Length: 1") + b"x", 400),
        (head("GET / HTTP/1.1", *[f"H{i}: x" for i in range(20)]), 431),
        (head("GET / HTTP/1.1", "A: " + "x" * 5000), 431),
        (b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\n\r\n", 431),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_not_acceptable_is_refused_and_the_connection_closed(server: Server, data: bytes, status: int) -> None:
    response = parse_response(server.raw(data))
    assert response.status == status
    assert response.headers["connection"] == "close"
    assert response.json()["error"]["message"]
    assert server.seen == []


def test_a_refusal_waits_for_the_answers_before_it(server: Server) -> None:
    data = server.raw(head("GET /a HTTP/1.1") + head("GET /b HTTP/1.1") + b"garbage\r\n\r\n")
    assert data.count(b"HTTP/1.1 200 OK") == 2
    assert data.count(b"HTTP/1.1 400 Bad Request") == 1
    assert data.rindex(b"200 OK") < data.index(b"400 Bad Request")


def test_what_follows_a_closing_request_is_ignored(server: Server) -> None:
    data = server.raw(head("GET /a HTTP/1.1", CLOSE) + head("GET /b HTTP/1.1") + b"garbage")
    assert data.count(b"HTTP/1.1") == 1


def test_requests_that_ask_to_upgrade_are_answered_as_they_are(server: Server) -> None:
    upgrade = head("GET /a HTTP/1.1", "Upgrade: h2c", "Connection: Upgrade")
    data = server.raw(upgrade * 300 + head("GET /b HTTP/1.1", CLOSE))
    assert data.count(b"HTTP/1.1 200 OK") == 301


def test_answers_do_not_pile_up_for_a_client_that_pipelines_and_does_not_read(hasty: Server) -> None:
    with hasty.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head("GET /big HTTP/1.1") * 500)
        hasty.wait_for(lambda: hasty.seen)
        hasty.wait_for(lambda: hasty.http.connections == 0)
    assert len(hasty.seen) == 1, "the next is not begun while the client leaves the last one lying"


@pytest.mark.parametrize(
    "data",
    [
        b"GET /" + b"x" * 200,
        b"GET / HTTP/1.1\r\nHost: x\r\nA: ",
        head("POST / HTTP/1.1", "Content-Length: 100") + b"only this",
        head("POST / HTTP/1.1", "Transfer-Encoding: chunked") + b"5\r\nab",
    ],
)
def test_requests_that_never_end_are_given_up(hasty: Server, data: bytes) -> None:
    began = time.monotonic()
    assert parse_response(hasty.raw(data)).status == 408
    assert 0.2 < time.monotonic() - began < 5


def test_a_slow_loris_gets_no_more_time_by_dripping(hasty: Server) -> None:
    with hasty.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        began = time.monotonic()
        try:
            while time.monotonic() - began < 5:
                connection.sendall(b"A: b\r\n")
                time.sleep(0.03)
        except OSError:
            pass
        assert time.monotonic() - began < 4


def test_idle_connections_are_closed_silently(hasty: Server) -> None:
    with hasty.connect() as connection:
        assert read_all(connection) == b""
    with hasty.connect() as connection:
        connection.sendall(head("GET /a HTTP/1.1"))
        assert read_all(connection).count(b"HTTP/1.1") == 1


def test_endless_heads_and_framing_are_bounded(server: Server) -> None:
    with server.connect() as connection:
        try:
            connection.sendall(b"GET / HTTP/1.1\r\nA: ")
            for _ in range(100):
                connection.sendall(b"x" * 1000)
        except OSError:
            pass
        assert b" 431 " in read_all(connection)
    with server.connect() as connection:
        try:
            connection.sendall(head("POST / HTTP/1.1", "Transfer-Encoding: chunked") + b"1;")
            for _ in range(100):
                connection.sendall(b"x" * 4000)
        except OSError:
            pass
        assert b" 400 " in read_all(connection)


def test_a_client_that_goes_away_cancels_its_request(server: Server) -> None:
    for _ in range(3):
        with server.connect() as connection:
            connection.sendall(head("GET /slow HTTP/1.1") + head("GET /never HTTP/1.1"))
            server.wait_for(lambda: server.seen)
    server.wait_for(lambda: server.cancelled == 3)
    assert all(path == "/slow" for _, path, _ in server.seen)


def test_a_client_that_does_not_read_is_cut_off(hasty: Server) -> None:
    with hasty.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head("GET /flood HTTP/1.1"))
        hasty.wait_for(lambda: hasty.cancelled == 1)
    with hasty.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head("GET /big HTTP/1.1"))
        hasty.wait_for(lambda: hasty.seen[-1][1] == "/big")
        hasty.wait_for(lambda: hasty.http.connections == 0)


def test_a_big_answer_arrives_whole_on_a_closing_connection(server: Server) -> None:
    assert len(parse_response(server.raw(head("GET /big HTTP/1.1", CLOSE))).body) == 20_000_000


def test_cut_answers_are_seen_as_cut(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    for path in ("/cut", "/broken-late"):
        assert parse_response(server.raw(head(f"GET {path} HTTP/1.1"))).body == b"half<cut>"
    for path in ("/broken", "/forgotten"):
        response = parse_response(server.raw(head(f"GET {path} HTTP/1.1", CLOSE)))
        assert (response.status, response.json()["error"]["type"]) == (500, "server_error")
        assert "bug" not in response.body.decode(), "what went wrong inside stays inside"
    assert sum("failed on GET" in record.message for record in caplog.records) == 3


def test_a_handler_without_a_coroutine_answers_in_order(server: Server) -> None:
    paths = ["/callback/a", "/callback/later", "/b", "/callback/teapot", "/callback/refused", "/callback/later"]
    requests = [head(f"POST {path} HTTP/1.1", f"Content-Length: {len(path)}") + path.encode() for path in paths * 40]
    data = server.raw(b"".join(requests) + head("GET /callback/last HTTP/1.1", CLOSE))
    bodies = [part.partition(b"\r\n\r\n")[2] for part in data.split(b"HTTP/1.1 ")[1:]]
    expected = [b"/callback/a", b"later", b"/b", None, None, b"later"] * 40 + [b"ok"]
    assert len(bodies) == len(expected)
    assert all(want in (None, got) for got, want in zip(bodies, expected, strict=True))
    assert data.count(b"429 Too Many Requests") == 80


def test_a_handler_without_a_coroutine_that_fails(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    assert parse_response(server.raw(head("GET /callback/broken-late HTTP/1.1"))).body == b"half<cut>"
    for path in ("/callback/broken", "/callback/forgotten"):
        assert parse_response(server.raw(head(f"GET {path} HTTP/1.1", CLOSE))).status == 500
    assert sum("failed on GET" in record.message for record in caplog.records) == 3


def test_a_handler_without_a_coroutine_hears_that_its_client_is_gone(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(head("GET /callback/never HTTP/1.1") + head("GET /callback/a HTTP/1.1"))
        server.wait_for(lambda: server.seen)
    server.wait_for(lambda: server.cancelled == 1)
    assert [path for _, path, _ in server.seen] == ["/callback/never"]


def test_errors_of_the_handler_keep_the_connection(server: Server) -> None:
    data = server.raw(head("GET /teapot HTTP/1.1") + head("GET /a HTTP/1.1", CLOSE))
    assert b"HTTP/1.1 429 Too Many Requests" in data
    assert b"retry-after: 2\r\n" in data
    assert data.endswith(b"ok")


def test_bodies_share_one_budget(server: Server) -> None:
    part = head("POST /slow HTTP/1.1", "Content-Length: 9000") + b"z" * 9000
    with server.connect() as one, server.connect() as two, server.connect() as three:
        one.sendall(part)
        two.sendall(part)
        server.wait_for(lambda: len(server.seen) == 2)
        three.sendall(part)
        assert parse_response(read_all(three)).status == 503
        server.gate.set()
        assert one.recv(1000).startswith(b"HTTP/1.1 200")
        assert two.recv(1000).startswith(b"HTTP/1.1 200")


def test_too_many_connections(server: Server) -> None:
    crowd = [server.connect() for _ in range(20)]
    server.wait_for(lambda: server.http.connections == 20)
    assert b" 503 " in server.raw(b"")
    for connection in crowd:
        connection.close()


def test_a_drain_lets_running_requests_end_and_closes_idle_connections() -> None:
    with Server() as server, server.connect() as idle, server.connect() as busy:
        idle.sendall(head("GET /a HTTP/1.1"))
        assert idle.recv(1000).endswith(b"ok")
        busy.sendall(head("GET /slow HTTP/1.1") + head("GET /b HTTP/1.1"))
        server.wait_for(lambda: len(server.seen) == 2)
        server.loop.call_soon_threadsafe(server.http.drain)
        assert read_all(idle) == b""
        server.gate.set()
        data = read_all(busy)
        assert b"connection: close" in data
        assert data.count(b"HTTP/1.1 200 OK") == 1
