"""Hostile clients and hostile replicas: refused or outlived, with nothing left of them.

`--campaign 20` makes the random part longer. The seed is printed.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from tests.faces.raw import events, parse_response, read_all
from tests.router.mocks import MODEL, MockReplica, text_of
from tests.router.router_process import Backend, RouterProcess
from tests.worker.front.test_hostile import ATTACKS, CHAT, TEXT, WEIGHTS, Hostile
from tests.worker.replica import free_ports

from .running import Loop, Replica, Request, Running, Script, ask, prompt, request, running, send, talk, until
from .test_http import echo

REQUESTS = 500
BODY = b'{"prompt":"x"}'
SECRET = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
"""What smuggling would slip past."""


def head(*lines: str, first: str = f"POST {TEXT} HTTP/1.1") -> bytes:
    return "\r\n".join([first, *lines, "", ""]).encode("latin-1")


CHUNK = b"10000\r\n%b\r\n" % (b"x" * 65536)
SHAPES = {
    "both lengths": head("host: x", "content-length: 4", "transfer-encoding: chunked") + b"0\r\n\r\n" + SECRET,
    "both lengths, swapped": head("host: x", "transfer-encoding: chunked", "content-length: 4") + b"0\r\n\r\n" + SECRET,
    "two lengths": head("host: x", "content-length: 2", "content-length: 60") + b"{}" + SECRET,
    "two equal lengths": head("host: x", "content-length: 2", "content-length: 2") + b"{}",
    "a list of lengths": head("host: x", "content-length: 2, 2") + b"{}",
    "a signed length": head("host: x", "content-length: +2") + b"{}",
    "a negative length": head("host: x", "content-length: -2") + b"{}",
    "a hexadecimal length": head("host: x", "content-length: 0x2") + b"{}",
    "a length beyond 64 bits": head("host: x", f"content-length: {2**64 + 2}") + b"{}",
    "chunked twice": head("host: x", "transfer-encoding: chunked, chunked") + b"0\r\n\r\n",
    "chunked not last": head("host: x", "transfer-encoding: chunked, identity") + b"0\r\n\r\n",
    "two encodings": head("host: x", "transfer-encoding: identity", "transfer-encoding: chunked") + b"0\r\n\r\n",
    "an encoding nobody knows": head("host: x", "transfer-encoding: xchunked") + b"0\r\n\r\n",
    "an encoding with a tab": head("host: x", "transfer-encoding:\x0bchunked") + b"0\r\n\r\n",
    "a chunk size that is none": head("host: x", "transfer-encoding: chunked") + b"zz\r\n" + SECRET,
    "a negative chunk size": head("host: x", "transfer-encoding: chunked") + b"-1\r\n" + SECRET,
    "a chunk size beyond 64 bits": head("host: x", "transfer-encoding: chunked") + b"1" + b"0" * 17 + b"\r\n",
    "a chunk longer than its size": head("host: x", "transfer-encoding: chunked") + b"2\r\n{}xx\r\n0\r\n\r\n",
    "a folded header": head("host: x", "a: b", " content-length: 2") + b"{}",
    "a space before the colon": head("host: x", "content-length : 2") + b"{}",
    "a space in a name": head("host: x", "content length: 2") + b"{}",
    "a header without colon": head("host: x", "content-length") + b"{}",
    "an empty name": head("host: x", ": 2") + b"{}",
    "a NUL in a value": head("host: x", "a: b\0c", "content-length: 2") + b"{}",
    "a bare CR in a value": head("host: x", "a: b\rcontent-length: 60", "content-length: 2") + b"{}",
    "bare line feeds": b"POST /v1/completions HTTP/1.1\nhost: x\ncontent-length: 2\n\n{}",
    "no host": head("content-length: 2") + b"{}",
    "two hosts": head("host: x", "host: y", "content-length: 2") + b"{}",
    "no version": b"POST /v1/completions\r\nhost: x\r\n\r\n",
    "HTTP/0.9": head("host: x", first="GET /v1/models HTTP/0.9"),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 30,
    "HTTP/3.7": head("host: x", first="GET /v1/models HTTP/3.7"),
    "a method nobody knows": head("host: x", first="SMUGGLE /v1/models HTTP/1.1"),
    "a space in the target": head("host: x", first="GET /v1/ models HTTP/1.1"),
    "a tunnel": head("host: x", first="CONNECT example.org:443 HTTP/1.1"),
    "a page that is not ours": head("host: x", "connection: close", first="GET http://example.org/index HTTP/1.1"),
    "another protocol": head("host: x", "connection: close", first="GET ftp://example.org/v1/models HTTP/1.1"),
    "a path upwards": head("host: x", "connection: close", first="GET /v1/models/../../health/live HTTP/1.1"),
    "a star": head("host: x", "connection: close", first="GET * HTTP/1.1"),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
    "many headers": head("host: x", *[f"h{i}: {i}" for i in range(200)], "content-length: 2") + b"{}",
    "a large header": head("host: x", "a: " + "b" * 200_000, "content-length: 2") + b"{}",
    "a large target": head("host: x", first="GET /" + "a" * 200_000 + " HTTP/1.1"),
    "a body said to be too large": head("host: x", "content-length: 999999999") + b"{}",
    "a body that becomes too large": head("host: x", "transfer-encoding: chunked") + CHUNK * 40,
    "an upgrade with a body": head("host: x", "upgrade: websocket", "connection: upgrade", "content-length: 2") + b"{}",
    "a compressed body": head("host: x", "content-encoding: gzip", "content-length: 2") + b"{}",
    "an expectation": head("host: x", "expect: 200-ok", "content-length: 2") + b"{}",
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(loop: Loop) -> Iterator[tuple[Running, Replica]]:
    with running(loop, echo, limits={"maxBodyBytes": 2**20}) as (router, (replica,)):
        yield router, replica


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_that_must_be_refused(plain: tuple[Running, Replica], shape: str) -> None:
    router, replica = plain
    replica.requests.clear()
    with send(router.port, SHAPES[shape]) as client:
        answer = parse_response(read_all(client))
    assert 400 <= answer.status < 500 or answer.status in (501, 505), (answer.status, answer.body[:200])
    assert set(json.loads(answer.body)["error"]) == {"message", "type", "param", "code"}
    assert not replica.requests, "no replica saw any of it"
    assert ask(router.port, TEXT, BODY).status == 200
    router.idle()
    assert router.loop.call(lambda: router.router.http.unanswered) == 0


@pytest.mark.parametrize("name", ["x\r\ny", "x-a\0", "x a", "x(", "x\xe9"])
def test_a_name_that_is_no_token_is_refused(plain: tuple[Running, Replica], name: str) -> None:
    router, replica = plain
    replica.requests.clear()
    with send(router.port, head("host: x", f"{name}: 1", "content-length: 2") + b"{}") as client:
        assert parse_response(read_all(client)).status == 400
    assert not replica.requests


def test_those_who_drip_are_cut_off(loop: Loop) -> None:
    limits = {"headSeconds": 0.4, "bodySeconds": 0.4, "idleSeconds": 0.4, "maxConnections": 64}
    starts = [b"", b"P", head("host: x", "content-length: 10")[:-2], head("host: x", "content-length: 10") + b"{"]
    with running(loop, echo, limits=limits) as (router, (replica,)):
        clients = [send(router.port, starts[index % 4]) for index in range(40)]
        over = time.monotonic() + 20
        open_ones = clients
        while open_ones:
            assert time.monotonic() < over
            left = []
            for client in open_ones:
                try:
                    client.send(b"a")
                    left.append(client)
                except OSError:
                    client.close()
            open_ones = left
            time.sleep(0.05)
        assert ask(router.port, TEXT, BODY).status == 200
        assert len(replica.requests) == 1
        until(lambda: router.loop.call(lambda: router.router.http.connections) == 0, "none is left")


def test_more_connections_than_allowed_are_refused(loop: Loop) -> None:
    with running(loop, echo, limits={"maxConnections": 5}) as (router, _):
        idle = [send(router.port, b"") for _ in range(5)]
        until(lambda: router.loop.call(lambda: router.router.http.connections) == 5, "five are open")
        answer = parse_response(talk(router.port, request(TEXT, BODY)))
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "overloaded")
        for client in idle:
            client.close()
        until(lambda: router.loop.call(lambda: router.router.http.connections) == 0, "none is left")
        assert ask(router.port, TEXT, BODY).status == 200


def test_bodies_of_all_clients_together_are_bounded(loop: Loop) -> None:
    with running(loop, echo, limits={"maxHeldBytes": 2**20, "bodySeconds": 20}) as (router, (replica,)):
        start = head("host: x", f"content-length: {2**20 - 1}")
        clients = [send(router.port, start + b" " * 300_000) for _ in range(3)]
        until(lambda: router.loop.call(lambda: router.router.http.unanswered) >= 900_000, "three bodies are held")
        answer = parse_response(talk(router.port, start + b" " * 300_000))
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "overloaded")
        for client in clients:
            client.close()
        until(lambda: router.loop.call(lambda: router.router.http.unanswered) == 0, "nothing is held")
        assert not replica.requests


# -- replicas


def says(data: bytes, then: bytes = b"") -> Script:
    """Answers with these bytes, then repeats `then` for as long as anybody listens, or hangs up."""

    async def script(replica: Replica, asked: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        while then:
            writer.write(then)
            await writer.drain()
        raise ConnectionError

    return script


START = b"HTTP/1.1 200 OK\r\n"
SSE = START + b"content-type: text/event-stream\r\nx-arriero-resume: 1\r\ntransfer-encoding: chunked\r\n\r\n"
BAD_REPLICAS = {
    "no HTTP": says(b"hello\r\n\r\n"),
    "nothing": says(b""),
    "a header in a header": says(START + b"x: a\rset-cookie: evil=1\r\ncontent-length: 2\r\n\r\n{}"),
    "a NUL": says(START + b"x: a\0b\r\ncontent-length: 2\r\n\r\n{}"),
    "a head without end": says(START, b"x: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n" * 100),
    "a header without end": says(START + b"x: ", b"y" * 10_000),
    "only 1xx": says(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "another protocol": says(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n"),
    "both lengths": says(START + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    "two lengths": says(START + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{} "),
    "a bad chunk": says(START + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n"),
    "a chunk without end": says(START + b"transfer-encoding: chunked\r\n\r\n5\r\n{}"),
    "a body that is too short": says(START + b"content-length: 20\r\n\r\n{}"),
    "no length": says(START + b"\r\n{}"),
    "a trailer without end": says(START + b"transfer-encoding: chunked\r\n\r\n0\r\nx: ", b"y" * 10_000),
    "chunk headers without end": says(START + b"transfer-encoding: chunked\r\n\r\n1;", b"y" * 10_000),
    "events without comments": says(SSE + b"ffffffff\r\ndata: ", b"y" * 100_000),
    "a comment that is none": says(SSE + b"20\r\n: arriero {\"tokens\":[\"x\"]}\n\n   \r\n"),
    "a comment without end": says(SSE + b"ffffffff\r\n: arriero {", b"y" * 100_000),
    "a huge error": says(b"HTTP/1.1 500 No\r\ncontent-length: 999999999\r\n\r\n", b"y" * 100_000),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_REPLICAS)
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_bad_replica_says_reaches_nobody(
    loop: Loop, kind: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arriero_router.front.relay.MAX_EVENT", 2**20)
    monkeypatch.setattr("arriero_router.front.relay.MAX_ANSWER", 2**20)
    bad = BAD_REPLICAS[kind]
    with running(loop, bad, replay={"attempts": 1}, ejection={"failures": 0}, hold={"timeoutSeconds": 5}) as (
        router,
        _,
    ):
        answer = ask(router.port, TEXT, prompt(stream=stream))
        assert answer.status == 502, (answer.status, answer.body[:200])
        assert json.loads(answer.body)["error"]["code"] == "replica_failed"
        assert set(answer.headers) <= {"date", "content-type", "content-length", "connection", "x-request-id"}
        assert ask(router.port, "/v1/models").status == 200
        router.idle()


def test_a_second_answer_is_nobodys(loop: Loop) -> None:
    """A replica that answers more often than asked cannot answer another client's request."""
    one = START + b"content-length: 4\r\n\r\n%b"

    async def twice(replica: Replica, asked: Request, writer: asyncio.StreamWriter) -> None:
        own = json.loads(asked.body)["user"].removeprefix("mock ").encode()
        writer.write(one % own + one % b"evil")
        await writer.drain()

    with running(loop, twice, replay={"attempts": 0}) as (router, _):
        for index in range(20):
            assert ask(router.port, TEXT, prompt(orders=f"{index:04}")).body == b"%04d" % index


def test_an_id_that_would_be_a_header_is_not_sent_on(loop: Loop) -> None:
    piece = b'data: {"choices":[{"index":0,"text":"x","finish_reason":null}]}\n\n'
    comment = b': arriero {"tokens":[1],"id":"a\\r\\nx-evil: 1"}\n\n'
    data = b"%x\r\n%b\r\n" % (len(piece + comment), piece + comment)
    with running(loop, says(SSE + data), replay={"attempts": 2}, ejection={"failures": 0}) as (router, (replica,)):
        assert ask(router.port, TEXT, prompt(stream=True)).status == 502
        assert replica.requests
        assert not any(asked.header("x-evil") for asked in replica.requests)


# -- a random campaign


@pytest.fixture(scope="module")
def router() -> Iterator[RouterProcess]:
    ports = free_ports(5)
    backends = [Backend("a", ports[0], ports[1]), Backend("b", ports[2], 0)]
    with (
        MockReplica("a", ports[0], ports[1]),
        MockReplica("b", ports[2]),
        RouterProcess.ours(MODEL, backends, ports[3], ports[4], limits={"headSeconds": 2}) as process,
    ):
        yield process


def outcome(port: int, rng: random.Random) -> str:
    """What came of one attack."""
    attack = rng.choices(ATTACKS, WEIGHTS)[0]
    data, _ = attack(Hostile(rng))
    manner = rng.random()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        try:
            if manner < 0.1:
                client.sendall(data[: rng.randrange(len(data))])
                if rng.random() < 0.5:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return "left"
            if manner < 0.2:
                cut = rng.randrange(len(data))
                client.sendall(data[:cut])
                data = data[cut:]
            client.sendall(data)
        except ConnectionError:
            pass  # refused while still talking
        client.settimeout(0.2)
        try:
            answer = client.recv(65536)
        except TimeoutError:
            return "waits for more"
        except ConnectionError:
            return "closed"
        client.settimeout(30)
        if b"connection: close" in answer:
            answer += read_all(client)
    if not answer:
        return "closed"
    response = parse_response(answer)
    assert response.status < 500 or response.status in (501, 505), (attack.__name__, response.status, data[:300])
    if response.status >= 400 and data[:4] != b"HEAD":
        assert b'"error":{"message":' in answer or b"no such page" in answer, answer[:500]
    return str(response.status)


def test_random_attacks(router: RouterProcess, seed: int, campaign: int) -> None:
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    total = REQUESTS * campaign
    baseline = 0
    for index in range(total):
        if index == min(total // 2, 2000):  # caches and allocator pools are warm by now
            baseline = router.resident_bytes()
        outcomes[outcome(router.http_port, rng)] += 1
        if index % 50 == 0:
            answer = ask(router.http_port, CHAT, prompt(3, stream=True) | {"messages": []})
            assert events(answer.body)[-1] == "[DONE]"
    print(dict(outcomes))
    assert router.process is not None
    assert router.process.poll() is None
    assert "Traceback" not in router.last_words(), router.last_words()
    grown = router.resident_bytes() - baseline
    assert grown < 24 * 2**20, f"{grown / 2**20:.1f} MiB more"
    assert sum(count for status, count in outcomes.items() if status.startswith("4")) > total / 4
    choice = ask(router.http_port, TEXT, prompt(4)).json()["choices"][0]
    assert choice["text"] == text_of(4)

    def over() -> bool:
        metrics = router.metrics()
        names = ("arriero_router_replica_in_flight", "arriero_router_replica_pending_bytes", "arriero_router_held")
        return not any(metrics[name] for name in names)

    until(over, "counts are zero")


def grpc_garbage(rng: random.Random) -> bytes:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if rng.random() < 0.7 else b""
    settings = b"\0\0\0\4\0\0\0\0\0" if rng.random() < 0.5 else b""
    return preface + settings + rng.randbytes(rng.randrange(1, 2000))


def test_bytes_that_are_no_grpc(router: RouterProcess, seed: int, campaign: int) -> None:
    import grpc

    from arriero.inference.v1 import inference_pb2 as pb
    from arriero.inference.v1 import inference_pb2_grpc

    rng = random.Random(seed)
    for _ in range(60 * campaign):
        with socket.create_connection(("127.0.0.1", router.grpc_port), timeout=30) as client:
            try:
                client.sendall(grpc_garbage(rng))
                client.settimeout(0.02)
                while client.recv(4096):
                    pass
            except (TimeoutError, ConnectionError):
                pass
    with grpc.insecure_channel(f"127.0.0.1:{router.grpc_port}") as channel:
        codes: Counter[str] = Counter()
        for _ in range(60 * campaign):
            method = rng.choice(["Generate", "Tokenize", "GetModel", "Nothing"])
            call = channel.unary_stream(f"/arriero.inference.v1.Inference/{method}")
            try:
                list(call(b"\xff" + rng.randbytes(rng.randrange(200)), timeout=20))
                codes["OK"] += 1
            except grpc.RpcError as error:
                codes[error.code().name] += 1  # type: ignore[attr-defined]
        assert set(codes) == {"INVALID_ARGUMENT", "UNIMPLEMENTED"}, codes
        wanted = pb.GenerateRequest(text="x", sampling=pb.SamplingParameters(max_tokens=3))
        pieces = inference_pb2_grpc.InferenceStub(channel).Generate(wanted, timeout=20)
        assert "".join(piece.text for piece in pieces) == text_of(3)
    assert "Traceback" not in router.last_words(), router.last_words()
