"""Requests whose replica breaks: the client sees one whole answer, or the error that is due."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.faces.raw import Response, events, parse_response, read_all
from tests.router.mocks import text_of

from .running import (
    CHAT,
    TEXT,
    Loop,
    Replica,
    Request,
    Script,
    ask,
    mocked,
    prompt,
    request,
    running,
    send,
    until,
)

JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


def text(answer: Response) -> str:
    """Of a stream, which must be sound: events with one id, one finish, one [DONE] at its end, no comment."""
    assert answer.status == 200, answer.body
    found = events(answer.body)
    assert found[-1] == "[DONE]", found
    pieces = [event for event in found[:-1] if event["choices"]]
    assert len({event["id"] for event in pieces}) == 1
    assert [p["choices"][0]["finish_reason"] for p in pieces if p["choices"][0]["finish_reason"]] == ["length"]
    return "".join(
        event["choices"][0].get("text") or event["choices"][0].get("delta", {}).get("content", "") for event in pieces
    )


def whole(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", "content-type: application/json", f"content-length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def error(message: str, **fields: Any) -> bytes:
    return json.dumps({"error": {"message": message, "type": "t", "param": None, "code": None, **fields}}).encode()


def answers(*outcomes: bytes | None) -> Script:
    """The n-th request gets the n-th answer, the last one for good; None: the connection is cut instead."""
    left = list(outcomes)

    async def script(replica: Replica, asked: Request, writer: asyncio.StreamWriter) -> None:
        outcome = left.pop(0) if len(left) > 1 else left[0]
        if outcome is None:
            raise ConnectionError
        writer.write(outcome)
        await writer.drain()

    return script


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("at", range(9))
def test_a_stream_goes_on_behind_any_token(loop: Loop, path: str, at: int) -> None:
    with mocked(loop) as (router, mocks):
        # Nothing can be resumed behind no token: then only one of the two breaks.
        body = prompt(8, f"break={at}{'' if at else ' at=a'}", stream=True, stream_options={"include_usage": True})
        body |= {"messages": [{"role": "user", "content": "x"}]}
        while True:
            answer = ask(router.port, path, body)
            assert text(answer) == text_of(8)
            usages = [event["usage"] for event in events(answer.body)[:-1] if event.get("usage")]
            assert [usage["completion_tokens"] for usage in usages] == [8], "usage is told once"
            if at or any(mock.stats["broken"] for mock in mocks):
                break
        broken = sum(mock.stats["broken"] for mock in mocks)
        assert broken == (at < 8)
        assert sum(mock.stats["resumed"] for mock in mocks) == (0 < at < 8)
        router.idle()
        assert router.metric("arriero_router_replays_total") == broken


def test_a_whole_answer_is_asked_for_again(loop: Loop) -> None:
    with mocked(loop) as (router, mocks):
        answer = ask(router.port, TEXT, prompt(5, "break=3 at=a")).json()
        assert answer["choices"][0]["text"] == text_of(5)
        again = ask(router.port, TEXT, prompt(5, "break=3 at=b")).json()
        assert again["choices"][0]["text"] == text_of(5)
        assert [mock.stats["broken"] for mock in mocks].count(0) < 2
        router.idle()


def test_half_an_answer_is_never_shown(loop: Loop) -> None:
    async def half(replica: Replica, asked: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(JSON + b'content-length: 100\r\n\r\n{"half": ')
        await writer.drain()
        raise ConnectionError

    with running(loop, half, answers(whole(b'{"whole":1}'))) as (router, replicas):
        while not replicas[0].requests:
            assert ask(router.port, TEXT, prompt()).json() == {"whole": 1}
        router.idle()


def test_attempts_are_bounded(loop: Loop) -> None:
    with running(loop, answers(None), replay={"attempts": 2}, ejection={"failures": 0}) as (router, (replica,)):
        answer = ask(router.port, TEXT, prompt())
        assert answer.status == 502
        assert answer.json()["error"]["code"] == "replica_failed"
        assert "3 attempts" in answer.json()["error"]["message"]
        assert len(replica.requests) == 3
        router.idle()


def test_without_replay_a_broken_request_fails_at_once(loop: Loop) -> None:
    with running(loop, answers(None), replay={"attempts": 0}) as (router, (replica,)):
        assert ask(router.port, TEXT, prompt()).status == 502
        assert len(replica.requests) == 1


@pytest.mark.parametrize("status", ["400 Bad Request", "404 Not Found", "413 Too Large", "422 Unprocessable", "501 No"])
def test_an_error_of_the_clients_own_is_passed_on_and_never_replayed(loop: Loop, status: str) -> None:
    body = error("no such thing", param="prompt")
    with running(loop, answers(whole(body, status)), answers(whole(body, status))) as (router, replicas):
        for stream in (False, True):
            answer = ask(router.port, TEXT, prompt(stream=stream))
            assert (answer.status, answer.body) == (int(status[:3]), body)
        assert sum(len(replica.requests) for replica in replicas) == 2
        assert not any(router.loop.call(lambda: [r.failures for r in router.served.pool.replicas]))


def test_an_error_of_the_replicas_goes_to_another(loop: Loop) -> None:
    bad = answers(whole(error("broken"), "500 Internal Server Error"))
    with running(loop, bad, answers(whole(b"{}")), ejection={"failures": 0}) as (router, replicas):
        while not replicas[0].requests:
            assert ask(router.port, TEXT, prompt()).status == 200


def test_an_error_that_all_replicas_give_is_passed_on(loop: Loop) -> None:
    body = error("broken")
    with running(loop, answers(whole(body, "500 Internal Server Error")), replay={"attempts": 2}) as (router, replicas):
        answer = ask(router.port, TEXT, prompt())
        assert (answer.status, answer.body) == (500, body)
        assert len(replicas[0].requests) == 3


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
def test_what_one_replica_has_no_room_for_another_takes(loop: Loop, status: str) -> None:
    full = answers(whole(error("full"), status, "retry-after: 7"))
    with running(loop, full, answers(whole(b"{}"))) as (router, replicas):
        for stream in (False, True):
            asked = len(replicas[0].requests)
            while len(replicas[0].requests) == asked:
                assert ask(router.port, TEXT, prompt(stream=stream)).status == 200
        assert router.metric("arriero_router_ejections_total") == 0, "being full is no fault"
        assert router.metric("arriero_router_broken_attempts_total", reason="refused") >= 1


def test_what_no_replica_has_room_for_waits_until_one_has(loop: Loop) -> None:
    full = whole(error("full"), "429 Too Many Requests", "retry-after: 7")
    with running(loop, answers(full, full, whole(b'{"now":1}'))) as (router, replicas):
        assert ask(router.port, TEXT, prompt()).json() == {"now": 1}
        assert len(replicas[0].requests) == 3


def test_what_no_replica_ever_has_room_for_ends_at_its_deadline(loop: Loop) -> None:
    full = answers(whole(error("full"), "429 Too Many Requests", "retry-after: 7"))
    with running(loop, full, hold={"timeoutSeconds": 0.5}) as (router, replicas):
        answer = ask(router.port, TEXT, prompt())
        assert answer.status in (429, 503)
        assert "retry-after" in answer.headers
        assert 2 <= len(replicas[0].requests) < 20
        router.idle()


def test_a_drained_replica_ends_what_it_has_and_gets_nothing_new(loop: Loop) -> None:
    with mocked(loop) as (router, mocks):
        clients = [send(router.port, request(TEXT, prompt(60, "pace=20000", stream=True))) for _ in range(4)]
        until(lambda: sum(mock.running for mock in mocks) == 4, "all streams run")
        before = [mock.stats["requests"] for mock in mocks]
        leaving = next(i for i, mock in enumerate(mocks) if mock.running)
        endpoints = [e for i, e in enumerate(router.backends) if i != leaving]
        router.loop.call(
            lambda: router.served._publish(
                [r.endpoint for r in router.served.pool.replicas if r.name == endpoints[0].name]
            )
        )
        for _ in range(5):
            assert ask(router.port, TEXT, prompt()).status == 200
        for client in clients:
            with client:
                assert text(parse_response(read_all(client))) == text_of(60)
        assert mocks[leaving].stats["requests"] == before[leaving]
        assert mocks[leaving].stats["left"] == 0, "its streams were not cut"
        router.idle()


def test_a_replica_that_ends_a_stream_with_an_error_is_left_and_another_goes_on(loop: Loop) -> None:
    """As a worker does whose engine is lost: an error event, no [DONE], and the connection is closed."""
    piece = b'data: {"id":"c","choices":[{"index":0,"text":" t%d","finish_reason":null}]}\n\n'
    comment = b': arriero {"tokens":[%d],"seed":7,"id":"c","created":5}\n\n'

    async def gone(replica: Replica, asked: Request, writer: asyncio.StreamWriter) -> None:
        last = error("the engine is gone", status=503, code="engine_gone")
        data = piece % 0 + comment % 0 + piece % 1 + comment % 1 + b"data: " + last + b"\n\n"
        writer.write(SSE + b"x-arriero-resume: 1\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(data), data))
        await writer.drain()
        raise ConnectionError

    async def heir(replica: Replica, asked: Request, writer: asyncio.StreamWriter) -> None:
        begun = asked.header("x-arriero-resume-tokens")
        if begun is None:
            await gone(replica, asked, writer)
        assert begun == "0,1"
        assert asked.header("x-arriero-resume-seed") == "7"
        assert asked.header("x-arriero-resume-id") == "c"
        assert asked.header("x-arriero-resume-created") == "5"
        end = b'data: {"id":"c","choices":[{"index":0,"text":" t2","finish_reason":"length"}]}\n\n' + comment % 2
        data = end + b"data: [DONE]\n\n"
        writer.write(SSE + b"x-arriero-resume: 1\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))

    with running(loop, heir, heir) as (router, replicas):
        assert text(ask(router.port, TEXT, prompt(stream=True))) == text_of(3)
        assert sum(len(replica.requests) for replica in replicas) == 2


@pytest.mark.parametrize(("status", "code"), [(400, "context"), (504, "timeout")])
def test_an_error_of_the_requests_own_in_a_stream_reaches_the_client(loop: Loop, status: int, code: str) -> None:
    async def fails(replica: Replica, asked: Request, writer: asyncio.StreamWriter) -> None:
        data = b'data: {"choices":[{"index":0,"text":"x","finish_reason":null}]}\n\n: arriero {"tokens":[1]}\n\n'
        data += b"data: " + error("it cannot be", status=status, code=code) + b"\n\n"
        writer.write(SSE + b"x-arriero-resume: 1\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(data), data))
        await writer.drain()
        raise ConnectionError

    with running(loop, fails, fails) as (router, replicas):
        answer = ask(router.port, TEXT, prompt(stream=True))
        assert answer.body.endswith(b"<cut>"), "no client takes it for the whole answer"
        found = events(answer.body.removesuffix(b"<cut>"))
        assert found[0]["choices"][0]["text"] == "x"
        assert found[1]["error"] | {"type": ""} == {
            "message": "it cannot be", "type": "", "param": None, "code": code, "status": status
        }  # fmt: skip
        assert len(found) == 2
        assert sum(len(replica.requests) for replica in replicas) == 1
        router.idle()


def test_a_replica_that_cannot_continue_is_not_taken_for_one_that_does(loop: Loop) -> None:
    """Another engine would begin anew: its text must not be glued behind what the client has."""
    begun = b'data: {"choices":[{"index":0,"text":" t0","finish_reason":null}]}\n\n: arriero {"tokens":[0]}\n\n'

    async def breaks(replica: Replica, asked: Request, writer: asyncio.StreamWriter) -> None:
        if asked.header("x-arriero-resume-tokens"):
            data = b'data: {"choices":[{"index":0,"text":" t0 t1","finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
            writer.write(SSE + b"content-length: %d\r\n\r\n%b" % (len(data), data))
            return
        writer.write(
            SSE + b"x-arriero-resume: 1\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(begun), begun)
        )
        await writer.drain()
        raise ConnectionError

    with running(loop, breaks, breaks, replay={"attempts": 1}) as (router, _):
        answer = ask(router.port, TEXT, prompt(stream=True))
        found = events(answer.body.removesuffix(b"<cut>"))
        assert found[0]["choices"][0]["text"] == " t0"
        assert "error" in found[1]
        assert len(found) == 2
        router.idle()


def test_a_stream_of_another_engine_is_cut_where_it_broke(loop: Loop) -> None:
    """Nobody knows its tokens, so nobody can go on; the client must see that it is not whole."""
    data = b'data: {"choices":[{"index":0,"text":"x","finish_reason":null}]}\n\n'

    async def breaks(replica: Replica, asked: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(data), data))
        await writer.drain()
        await asyncio.sleep(0.05)
        raise ConnectionError

    with running(loop, breaks, breaks) as (router, replicas):
        answer = ask(router.port, TEXT, prompt(stream=True))
        assert answer.body.endswith(b"<cut>")
        assert b"[DONE]" not in answer.body
        found = events(answer.body.removesuffix(b"<cut>"))
        assert found[0]["choices"][0]["text"] == "x"
        assert found[1]["error"]["code"] == "replica_failed"
        assert sum(len(replica.requests) for replica in replicas) == 1


def test_a_silent_replica_is_given_up(loop: Loop) -> None:
    async def stalls(replica: Replica, asked: Request, writer: asyncio.StreamWriter) -> None:
        event = b'data: {"id":"c","choices":[{"index":0,"text":" t%d","finish_reason":%b}]}\n\n'
        if asked.header("x-arriero-resume-tokens"):
            data = event % (1, b'"length"') + b"data: [DONE]\n\n"
        else:
            data = event % (0, b"null") + b': arriero {"tokens":[0]}\n\n'
        writer.write(SSE + b"x-arriero-resume: 1\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(data), data))
        if data.endswith(b"[DONE]\n\n"):
            writer.write(b"0\r\n\r\n")

    with running(loop, stalls, stalls, replay={"stallSeconds": 0.3}) as (router, _):
        assert text(ask(router.port, TEXT, prompt(stream=True))) == " t0 t1"
        router.idle()


def test_a_client_may_continue_a_stream_of_its_own(loop: Loop) -> None:
    with mocked(loop) as (router, mocks):
        headers = ("x-arriero-resume: 1", "x-arriero-resume-tokens: 0,1,2", "x-arriero-resume-seed: 7")
        answer = ask(router.port, TEXT, prompt(9, "pace=1000", stream=True), *headers)
        assert answer.headers["x-arriero-resume"] == "1"
        found = events(answer.body)
        assert "".join(e["choices"][0]["text"] for e in found if isinstance(e, dict)) == text_of(9, 3)
        comments = [json.loads(e[1].removeprefix("arriero ")) for e in found if isinstance(e, tuple)]
        assert [token for comment in comments for token in comment["tokens"]] == list(range(3, 9))
        assert sum(mock.stats["resumed"] for mock in mocks) == 1
