"""The HTTP face from outside: what is passed on, what the router says itself, and clients of all manners."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.faces.raw import dechunk, events, parse_response, read_all
from tests.router.mocks import text_of
from tests.router.router_process import parse_metrics

from .running import (
    CHAT,
    MODEL,
    TEXT,
    Loop,
    Replica,
    Request,
    ask,
    mocked,
    prompt,
    request,
    running,
    send,
    talk,
    until,
)


async def echo(replica: Replica, asked: Request, writer: asyncio.StreamWriter) -> None:
    """Tells what it was asked."""
    body = json.dumps({"line": asked.line, "headers": asked.headers, "body": asked.body.decode("latin-1")}).encode()
    writer.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/x-y\r\nx-kept: 1\r\nx-kept: 2\r\nset-cookie: a=b\r\n"
        b"connection: keep-alive\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    )


def error(answer: Any) -> dict[str, Any]:
    fields: dict[str, Any] = answer.json()["error"]
    assert set(fields) == {"message", "type", "param", "code"}
    return fields


# -- what is passed on


def test_a_request_reaches_a_replica_as_it_was(loop: Loop) -> None:
    body = b'{ "prompt" : "x" , "max_tokens":1, "unknown":[1,2 ,3], "model":"mock"}'
    with running(loop, echo) as (router, (replica,)):
        data = request(
            TEXT + "?a=b&c", body, "x-own: 1", "X-Own: 2", "accept: */*", "authorization: Bearer k", "x-api-key: k",
            "te: trailers", "keep-alive: 5", "proxy-authorization: x", "x-request-id: me", "tracestate: v=1",
        )  # fmt: skip
        answer = parse_response(talk(router.port, data))
        seen = answer.json()
        assert seen["line"] == f"POST {TEXT}?a=b&c HTTP/1.1"
        assert seen["body"].encode() == body
        assert dict(map(tuple, seen["headers"])) == {
            "x-own": "2", "accept": "*/*", "content-type": "application/json", "x-request-id": "me",
            "host": f"127.0.0.1:{replica.port}", "content-length": str(len(body)), "tracestate": "v=1",
        }  # fmt: skip
        assert [value for name, value in seen["headers"] if name == "x-own"] == ["1", "2"]
        assert answer.headers["content-type"] == "application/x-y"
        assert answer.headers["x-request-id"] == "me"
        assert answer.headers["set-cookie"] == "a=b"
        head = talk(router.port, data).partition(b"\r\n\r\n")[0]
        assert head.count(b"x-kept") == 2
        assert head.count(b"connection: ") == 1, "that is between two neighbours"


def test_what_a_client_says_to_its_neighbour_alone_stays_there(loop: Loop) -> None:
    with running(loop, echo) as (router, _):
        data = request(TEXT, b'{"prompt": "x"}', "Connection: close, X-Private", "x-private: 1", "x-public: 2")
        names = {name for name, _ in parse_response(talk(router.port, data)).json()["headers"]}
        assert "x-public" in names
        assert not names & {"x-private", "connection"}


@pytest.mark.parametrize("status", ["201 Created", "204 No Content", "302 Found", "418 Teapot"])
def test_any_status_is_passed_on(loop: Loop, status: str) -> None:
    async def says(replica: Replica, asked: Request, writer: asyncio.StreamWriter) -> None:
        length = b"" if status.startswith("204") else b"content-length: 0\r\n"
        writer.write(b"HTTP/1.1 %b\r\nlocation: /x\r\n%b\r\n" % (status.encode(), length))

    with running(loop, says) as (router, (replica,)):
        answer = ask(router.port, TEXT, prompt())
        assert (answer.status, answer.body, answer.headers["location"]) == (int(status[:3]), b"", "/x")
        assert len(replica.requests) == 1


def test_bytes_of_headers_are_passed_on_as_they_are(loop: Loop) -> None:
    async def streams(replica: Replica, asked: Request, writer: asyncio.StreamWriter) -> None:
        assert asked.header("x-name") == "\xe9"
        kind = b"text/event-stream" if b'"stream": true' in asked.body else b"text/plain"
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\nx-name: \xe9\r\ncontent-length: 0\r\n\r\n" % kind)

    with running(loop, streams) as (router, _):
        for stream in (False, True):
            assert b"x-name: \xe9\r\n" in talk(router.port, request(TEXT, prompt(stream=stream), "x-name: \xe9"))


def test_a_chunked_request_is_sent_on_with_its_length(loop: Loop) -> None:
    body = json.dumps(prompt()).encode()
    chunks = b"".join(b"%x\r\n%b\r\n" % (1, body[i : i + 1]) for i in range(len(body))) + b"0\r\n\r\n"
    head = f"POST {TEXT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    with running(loop, echo) as (router, _):
        seen = parse_response(talk(router.port, head + chunks)).json()
        assert seen["body"].encode() == body
        assert ["content-length", str(len(body))] in seen["headers"]
        assert not [value for name, value in seen["headers"] if name == "transfer-encoding"]


def test_tokenize_is_passed_on(loop: Loop) -> None:
    with running(loop, echo) as (router, _):
        seen = ask(router.port, "/tokenize", {"prompt": "x"}).json()
        assert seen["line"] == "POST /tokenize HTTP/1.1"


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_streams_and_whole_answers_of_a_mock(loop: Loop, path: str) -> None:
    body = prompt(5) | {"messages": [{"role": "user", "content": "x"}]}
    with mocked(loop) as (router, _):
        choice = ask(router.port, path, body).json()["choices"][0]
        assert (choice.get("text") or choice["message"]["content"]) == text_of(5)
        answer = ask(router.port, path, body | {"stream": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        assert "x-arriero-resume" not in answer.headers
        assert not [event for event in events(answer.body) if isinstance(event, tuple)]
        router.idle()


def test_every_request_has_an_id(loop: Loop) -> None:
    with running(loop, echo) as (router, _):
        answers = [ask(router.port, TEXT, prompt()) for _ in range(2)]
        ids = [answer.headers["x-request-id"] for answer in answers]
        assert len(set(ids)) == 2
        for answer, id in zip(answers, ids, strict=True):
            assert ["x-request-id", id] in answer.json()["headers"]


def test_a_trace_is_passed_on(loop: Loop) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with running(loop, echo) as (router, _):
        seen = ask(router.port, TEXT, prompt(), f"traceparent: {parent}", "tracestate: a=1").json()
        assert ["traceparent", parent] in seen["headers"]
        assert ["tracestate", "a=1"] in seen["headers"]


def test_connections_to_replicas_are_kept(loop: Loop) -> None:
    with running(loop, echo) as (router, (replica,)):
        for _ in range(20):
            assert ask(router.port, TEXT, prompt()).status == 200
        assert replica.accepted == 1


def test_a_connection_that_a_replica_closed_costs_the_client_nothing(loop: Loop) -> None:
    async def closes(replica: Replica, asked: Request, writer: asyncio.StreamWriter) -> None:
        await echo(replica, asked, writer)
        writer.close()  # without having said so

    with running(loop, closes, replay={"attempts": 0}) as (router, (replica,)):
        for _ in range(20):
            assert ask(router.port, TEXT, prompt()).status == 200
        assert len(replica.requests) == 20
        assert not any(router.loop.call(lambda: [r.failures for r in router.served.pool.replicas]))


# -- what the router says itself


def test_models_of_all_deployments_are_one_list(loop: Loop) -> None:
    with running(loop, echo, echo) as (router, replicas):
        static = [
            {"name": r.name, "host": "127.0.0.1", "httpPort": r.port, "grpcPort": 0, "controlPort": 0} for r in replicas
        ]
        models = [
            {"name": "big/one", "aliases": ["gpt-4"], "endpoints": {"static": static[:1]}},
            {"name": "small", "endpoints": {"static": static[1:]}},
            {"name": "none", "endpoints": {"static": []}},
        ]
        router.reload(models=models)
        until(
            lambda: [c["ready_replicas"] for c in ask(router.port, "/v1/models").json()["data"]] == [1, 1, 1, 0],
            "both are ready",
        )
        listed = ask(router.port, "/v1/models").json()
        assert listed["object"] == "list"
        assert [(c["id"], c["root"], c["object"]) for c in listed["data"]] == [
            ("big/one", "big/one", "model"), ("gpt-4", "big/one", "model"), ("small", "small", "model"),
            ("none", "none", "model"),
        ]  # fmt: skip
        assert ask(router.port, "/v1/models/big%2Fone").json()["id"] == "big/one"
        assert ask(router.port, "/v1/models/gpt-4").json()["root"] == "big/one"
        assert error(ask(router.port, "/v1/models/other"))["code"] == "model_not_found"
        for name, index in (("big/one", 0), ("gpt-4", 0), ("small", 1), (None, 0)):
            before = [len(replica.requests) for replica in replicas]
            assert ask(router.port, TEXT, prompt() | ({"model": name} if name else {})).status == 200
            before[index] += 1
            assert [len(replica.requests) for replica in replicas] == before
        text = ask(router.port, "/metrics").body.decode()
        for line in text.splitlines():
            if line.startswith("# TYPE"):
                assert text.count(line + "\n") == 1, "each family stands once"
        held = {labels["model"] for name, labels, _ in parse_metrics(text) if name == "arriero_router_held"}
        assert held == {"big/one", "small", "none"}


@pytest.mark.parametrize(
    ("path", "method", "body", "status", "code"),
    [
        ("/", "GET", None, 404, "unknown_url"),
        ("/v1/embeddings", "POST", b"{}", 404, "unknown_url"),
        (TEXT, "GET", None, 405, None),
        ("/v1/models", "POST", b"{}", 405, None),
        ("/metrics", "DELETE", None, 405, None),
        (TEXT, "POST", b"{", 400, None),
        (TEXT, "POST", b"", 400, None),
        (TEXT, "POST", b"[]", 400, None),
        (TEXT, "POST", b'{"max_tokens":"x"}', 400, None),
        (TEXT, "POST", b'{"model":"other"}', 404, "model_not_found"),
        (TEXT, "POST", b"[" * 100_000, 400, None),
        (TEXT, "POST", b'{"prompt":' + b"[" * 100_000, 400, None),
    ],
)
def test_errors_have_openais_shape(
    loop: Loop, path: str, method: str, body: bytes | None, status: int, code: str | None
) -> None:
    with mocked(loop, 1) as (router, (mock,)):
        answer = ask(router.port, path, body, method=method)
        assert answer.status == status, answer.body
        fields = error(answer)
        assert fields["code"] == code
        assert fields["message"]
        if status == 405:
            assert "OPTIONS" in answer.headers["allow"]
        assert mock.stats["requests"] == 0


def test_a_wrong_field_is_named(loop: Loop) -> None:
    with mocked(loop, 1) as (router, _):
        assert error(ask(router.port, TEXT, {"max_tokens": "x"}))["param"] == "max_tokens"
        assert error(ask(router.port, CHAT, {"stream": 1}))["param"] == "stream"


def test_head_and_options(loop: Loop) -> None:
    with mocked(loop, 1) as (router, _):
        head = ask(router.port, "/v1/models", method="HEAD")
        whole = ask(router.port, "/v1/models")
        assert (head.status, head.body) == (200, b"")
        assert head.headers["content-length"] == str(len(whole.body))
        options = ask(router.port, TEXT, method="OPTIONS")
        assert (options.status, options.headers["allow"]) == (204, "POST, OPTIONS")


def test_health(loop: Loop) -> None:
    with mocked(loop, 2) as (router, _):
        assert ask(router.port, "/health/live").json() == {"status": "live"}
        ready = ask(router.port, "/health/ready")
        assert (ready.status, ready.json()["ready_replicas"]) == (200, {MODEL: 2})
        assert ask(router.port, "/health").json() == ready.json(), "the name that other routers ask by"
        router.loop.call(lambda: setattr(router.router, "draining", True))
        draining = ask(router.port, "/health/ready")
        assert (draining.status, error(draining)["code"]) == (503, "not_ready")
        router.loop.call(lambda: setattr(router.router, "draining", False))


def test_metrics_tell_what_happened(loop: Loop) -> None:
    with mocked(loop, 1) as (router, _):
        for _ in range(3):
            ask(router.port, TEXT, prompt(2))
        ask(router.port, TEXT, prompt(2, stream=True))
        ask(router.port, TEXT, b"{")
        metric = router.metric
        assert metric("arriero_router_requests_total", face="http", model=MODEL, status="200") == 4
        assert metric("arriero_router_requests_total", status="400") == 1
        assert metric("arriero_router_picks_total", replica="a") == 4
        assert metric("arriero_router_replica_ready", replica="a") == 1
        assert metric("arriero_router_replica_in_flight") == metric("arriero_router_held") == 0
        assert metric("arriero_router_added_latency_seconds_count", model=MODEL) == 4
        assert metric("arriero_router_time_to_first_token_seconds_count", model=MODEL) == 4


def test_the_access_log_has_a_line_for_each_request(loop: Loop, tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    with mocked(loop, 1, accessLog={"path": str(path)}) as (router, _):
        ask(router.port, TEXT, prompt(3, stream=True), "x-request-id: one")
        ask(router.port, TEXT, prompt(4), "x-request-id: two")
        ask(router.port, TEXT, prompt(4, "break=1"), "x-request-id: three")
        with send(router.port, request(TEXT, prompt(1000, "pace=1000", stream=True), "x-request-id: four")) as client:
            client.recv(100)
        router.idle()
    lines = {line["request_id"]: line for line in map(json.loads, path.read_text().splitlines())}
    assert set(lines) == {"one", "two", "three", "four"}
    one, two, three, four = (lines[name] for name in ("one", "two", "three", "four"))
    assert (one["status"], one["stream"], one["completion_tokens"], one["attempts"]) == (200, True, 3, 1)
    assert one["path"] == TEXT
    assert one["face"] == "http"
    assert one["client"] == "127.0.0.1"
    assert one["replica"] == "a"
    assert one["error"] is None
    assert 0 < one["first_seconds"] <= one["seconds"]
    assert (two["prompt_tokens"], two["completion_tokens"]) == (512, 4)
    assert (three["status"], three["attempts"]) == (502, 4)
    assert "closed" in three["error"]
    assert (four["status"], four["error"]) == (499, "the client went away")
    assert next(iter(one)) == "time"


# -- clients of all manners


def test_requests_in_one_go_are_answered_in_order(loop: Loop) -> None:
    with mocked(loop) as (router, _):
        requests = [
            request(TEXT, prompt(n, f"pace={(9 - n) * 2000}", stream=n % 2 == 0), close=n == 8) for n in range(1, 9)
        ]
        data = talk(router.port, b"".join(requests))
        for n in range(1, 9):
            head, _, rest = data.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK")
            if n % 2 == 0:
                end = rest.index(b"\r\n0\r\n\r\n") + 7
                body = dechunk(rest[:end])
                text = "".join(event["choices"][0]["text"] for event in events(body)[:-1])
            else:
                length = next(
                    int(v) for k, v in (h.split(b": ") for h in head.split(b"\r\n")[1:]) if k == b"content-length"
                )
                end = length
                text = json.loads(rest[:end])["choices"][0]["text"]
            assert text == text_of(n)
            data = rest[end:]
        assert data == b""


@pytest.mark.parametrize("vouched", [False, True])
def test_a_slow_client_slows_the_replica_not_the_memory(loop: Loop, vouched: bool) -> None:
    """50 MB for a client that does not read: what the router holds of it is bounded, and all of it arrives at last."""
    size, count = 50_000, 1000
    written = 0

    async def pours(replica: Replica, asked: Request, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        resume = b"x-arriero-resume: 1\r\n" if vouched else b""
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n%btransfer-encoding: chunked\r\n\r\n" % resume
        )
        for index in range(count):
            data = b"data: %06d" % index + b"x" * size + b"\n\n"
            if vouched:
                data += b': arriero {"tokens":[%d]}\n\n' % index
            if index == count - 1:
                data += b"data: [DONE]\n\n"
            writer.write(b"%x\r\n%b\r\n" % (len(data), data))
            await writer.drain()
            written += 1
        writer.write(b"0\r\n\r\n")

    with running(loop, pours, limits={"takeSeconds": 60}) as (router, _):
        before = psutil.Process().memory_info().rss
        with send(router.port, request(TEXT, prompt(stream=True))) as client:
            until(lambda: written > 0, "it pours")
            last = -1

            def stopped() -> bool:
                nonlocal last
                now, last = last, written
                return now == written

            until(stopped, "the replica is stopped")
            for _ in range(20):
                until(stopped, "it stays stopped")
            assert written < count / 2
            assert psutil.Process().memory_info().rss - before < 30 * 2**20
            raw = read_all(client)
        assert re.findall(rb"data: ([0-9]{6}|\[DONE\])", raw) == [
            *[b"%06d" % index for index in range(count)],
            b"[DONE]",
        ]
        assert raw.count(b"x") > size * count
        assert raw.endswith(b"\r\n0\r\n\r\n")
        router.idle()


def test_a_client_that_takes_nothing_is_cut_off(loop: Loop) -> None:
    async def pours(replica: Replica, asked: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"2710\r\n%b\r\n" % (b"x" * 10_000))
            await writer.drain()

    with (
        running(loop, pours, limits={"takeSeconds": 0.3}) as (router, (replica,)),
        send(router.port, request(TEXT, prompt(stream=True))),
    ):
        until(lambda: replica.connections == 1, "it pours")
        router.idle()
        until(lambda: replica.connections == 0, "the replica knows")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_goes_away_takes_its_request_along(loop: Loop, stream: bool, reset: bool) -> None:
    with mocked(loop) as (router, mocks):
        clients = [send(router.port, request(TEXT, prompt(10_000, "pace=5000000", stream=stream))) for _ in range(6)]
        until(lambda: sum(mock.running for mock in mocks) == 6, "all run")
        assert router.metric("arriero_router_replica_in_flight") == 6
        for client in clients:
            if reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
        until(lambda: sum(mock.running for mock in mocks) == 0, "the replicas know")
        router.idle()
        assert sum(mock.stats["left"] for mock in mocks) == 6
        assert router.metric("arriero_router_requests_total", status="499") == 6
        assert router.metric("arriero_router_broken_attempts_total") == 0, "no replica is to blame"


def test_one_answer_behind_done_is_enough(loop: Loop) -> None:
    """The client has all of it at [DONE], whatever the replica does then."""

    async def lingers(replica: Replica, asked: Request, writer: asyncio.StreamWriter) -> None:
        data = b'data: {"choices":[{"index":0,"text":"x","finish_reason":"stop"}]}\n\n: arriero {"tokens":[1]}\n\n'
        data += b"data: [DONE]\n\n"
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-arriero-resume: 1\r\n")
        writer.write(b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(data), data))
        await asked.gone()

    with running(loop, lingers, replay={"stallSeconds": 0.5}) as (router, (replica,)):
        for _ in range(3):
            answer = ask(router.port, TEXT, prompt(stream=True))
            assert events(answer.body)[-1] == "[DONE]"
        router.idle()
        until(lambda: replica.connections == 0, "its connections are not kept for ever")
