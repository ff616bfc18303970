"""The clients that judge the router notice what is wrong with an answer."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.router.chaos import Case, Expected, Outcome
from tests.router.load import Answer, ask, read
from tests.worker.replica import free_ports

HEAD = {"id": "x", "created": 1}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
CASE = Case("/v1/completions", {"stream": True})
EXPECTED = Expected(" t0 t1", "length", (3, 2))


def event(text: str, finish: str | None = None, **fields: Any) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return b"data: %b\n\n" % json.dumps({**HEAD, "choices": [choice], **fields}).encode()


LAST = b"data: %b\n\n" % json.dumps({**HEAD, "choices": [], "usage": USAGE}).encode()
DONE = b"data: [DONE]\n\n"


def streamed(*parts: bytes, whole: bool = True) -> Answer:
    answer = Answer()
    answer.status, answer.whole = 200, whole
    for at, part in enumerate(parts):
        answer.parts.append(part)
        answer.times.append(float(at))
    return answer


def judged(answer: Answer) -> Outcome:
    outcome = Outcome()
    outcome.count(CASE, EXPECTED, read(answer, stream=True))
    return outcome


def test_a_sound_answer() -> None:
    data = event(" t0") + b": waiting\n\n" + event(" t1", "length") + LAST + DONE
    for split in range(len(data)):
        outcome = judged(streamed(data[:split], data[split:]))
        assert outcome.sound, outcome.problems


@pytest.mark.parametrize(
    ("parts", "whole", "what"),
    [
        ((event(" t0"),), False, "cut"),
        ((event(" t0"), event(" t1", "length"), LAST), True, "cut"),
        ((event(" t0"), event(" t1", "length")[:20]), False, "cut"),
        ((event(" t0"), b'data: {"error":{"message":"gone"}}\n\n', DONE), True, "cut"),
        ((event(" t0"), event(" t0"), event(" t1", "length"), LAST, DONE), True, "wrong"),
        ((event(" t0"), event("", "length"), LAST, DONE), True, "wrong"),
        ((event(" t0"), event(" t1", "stop"), LAST, DONE), True, "wrong"),
        ((event(" t0"), event(" t1", "length"), DONE), True, "miscounted"),
        ((event(" t0"), event(" t1", "length"), LAST, LAST, DONE), True, "miscounted"),
        ((event(" t0"), event(" t1", "length", usage={**USAGE, "completion_tokens": 3}), DONE), True, "miscounted"),
        ((event(" t0"), event(" t1", "length", id="y"), LAST, DONE), True, "failed"),
        ((event(" t0"), b': arriero {"tokens":[1]}\n\n', event(" t1", "length"), LAST, DONE), True, "failed"),
    ],
)
def test_a_fault_is_noticed(parts: tuple[bytes, ...], whole: bool, what: str) -> None:
    outcome = judged(streamed(*parts, whole=whole))
    assert not outcome.sound
    assert {name: getattr(outcome, name) for name in ("failed", "cut", "wrong", "miscounted")} == {
        **dict.fromkeys(("failed", "cut", "wrong", "miscounted"), 0),
        what: 1,
    }


async def test_a_refusal_and_a_port_where_nothing_listens() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\nno")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        answer = await ask(port, CASE.request, timeout=10)
    assert (answer.status, answer.body) == (503, b"no")
    assert judged(answer).failed == 1
    (closed,) = free_ports(1)
    answer = await ask(closed, CASE.request, timeout=10)
    assert answer.error
    assert judged(answer).failed == 1


async def test_an_answer_that_never_ends_is_given_up() -> None:
    over = asyncio.Event()

    async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        data = event(" t0")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(data), data))
        await reader.read()
        writer.close()
        over.set()

    server = await asyncio.start_server(stall, "127.0.0.1", 0)
    async with server:
        answer = await ask(server.sockets[0].getsockname()[1], CASE.request, timeout=0.2)
        assert not answer.whole
        assert "0.2 s" in answer.error
        await over.wait()
    outcome = judged(answer)
    assert (outcome.cut, outcome.failed) == (1, 0)
