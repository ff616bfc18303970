"""Faults of the router's own: whatever raises, and wherever, the client is answered and the counts return to zero."""

from __future__ import annotations

from typing import Any

import pytest
from tests.faces.raw import parse_response, read_all

from .running import TEXT, Loop, Running, ask, mocked, prompt, request, running, send, until
from .test_http import echo


class Fault(Exception):
    """Nobody expects it."""


def fails(*_: Any) -> Any:
    raise Fault("a bug")


def whole_answer_comes(router: Running) -> None:
    assert ask(router.port, TEXT, prompt()).status == 200
    router.idle()


@pytest.mark.parametrize("stream", [False, True])
def test_before_anything_was_sent(loop: Loop, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    with mocked(loop) as (router, _):
        loop.call(lambda: setattr(router.served, "upstreams", fails))
        answer = ask(router.port, TEXT, prompt(stream=stream))
        assert answer.status == 500
        assert b"a bug" not in answer.body
        router.idle()
        loop.call(lambda: delattr(router.served, "upstreams"))
        whole_answer_comes(router)
        assert router.metric("arriero_router_requests_total", status="500") == 1
    assert sum("failed on POST" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_under_a_request_that_was_held(loop: Loop, stream: bool) -> None:
    """Nobody is left to raise to when it is let go."""
    with running(loop, echo, hold={"timeoutSeconds": 20}) as (router, (replica,)):
        replica.ready = False
        router.ready(0)
        with send(router.port, request(TEXT, prompt(stream=stream))) as client:
            until(lambda: router.metric("arriero_router_held") == 1, "it is held")
            loop.call(lambda: setattr(router.served, "upstreams", fails))
            replica.ready = True
            assert parse_response(read_all(client)).status == 500
        router.idle()
        loop.call(lambda: delattr(router.served, "upstreams"))
        whole_answer_comes(router)


@pytest.mark.parametrize("stream", [False, True])
def test_behind_the_answer(loop: Loop, stream: bool) -> None:
    """The client has all it needs, so it must not wait, and the replica is free again."""
    with mocked(loop) as (router, _):
        loop.call(lambda: setattr(router.served.pool, "succeeded", fails))
        answer = ask(router.port, TEXT, prompt(stream=stream))
        assert answer.status == 200
        router.idle()
        loop.call(lambda: delattr(router.served.pool, "succeeded"))
        whole_answer_comes(router)


def test_while_the_request_is_closed(loop: Loop) -> None:
    """Its end is not lost with the log line."""
    with mocked(loop) as (router, _):
        loop.call(lambda: setattr(router.router, "close", fails))
        with send(router.port, request(TEXT, prompt(), close=False)) as client:
            client.recv(65536)
            client.sendall(request(TEXT, prompt()))
            assert b"200 OK" in read_all(client), "the connection goes on"
        loop.call(lambda: delattr(router.router, "close"))
