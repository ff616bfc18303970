"""Requests that no replica can take yet: they wait, are shown life, and end well or with the error that is due."""

from __future__ import annotations

import asyncio
import time

import pytest
from tests.faces.raw import events, parse_response, read_all
from tests.router.mocks import text_of

from .running import TEXT, Loop, Replica, Request, ask, mocked, prompt, request, running, send, until
from .test_http import echo, error


def test_a_request_waits_for_a_replica(loop: Loop) -> None:
    with running(loop, echo, hold={"timeoutSeconds": 20}) as (router, (replica,)):
        replica.ready = False
        router.ready(0)
        clients = [send(router.port, request(TEXT, prompt())) for _ in range(5)]
        until(lambda: router.metric("arriero_router_held") == 5, "all are held")
        assert not replica.requests
        replica.ready = True
        for client in clients:
            with client:
                assert parse_response(read_all(client)).status == 200
        assert len(replica.requests) == 5, "each was asked once"
        router.idle()
        assert router.metric("arriero_router_hold_seconds_count") == 5


def test_a_waiting_stream_is_shown_life(loop: Loop) -> None:
    hold = {"afterSeconds": 0.05, "keepAliveSeconds": 0.05, "timeoutSeconds": 20}
    with mocked(loop, 1, hold=hold) as (router, (mock,)):
        replica = router.loop.call(lambda: router.served.pool.replicas[0])
        router.loop.call(lambda: setattr(router.served.pool, "shun", router.served.pool.shun))
        router.loop.call(lambda: router.served._publish([]))
        with send(router.port, request(TEXT, prompt(3, stream=True), "x-request-id: me")) as client:
            seen = b""
            while seen.count(b": waiting\n\n") < 3:
                seen += client.recv(1000)
            assert seen.startswith(b"HTTP/1.1 200 OK")
            assert mock.stats["requests"] == 0
            router.loop.call(lambda: router.served._publish([replica.endpoint]))
            answer = parse_response(seen + read_all(client))
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-request-id"] == "me"
        found = [event for event in events(answer.body) if not isinstance(event, tuple)]
        assert "".join(event["choices"][0]["text"] for event in found[:-1]) == text_of(3)
        assert found[-1] == "[DONE]"


def test_a_whole_answer_is_not_begun_early(loop: Loop) -> None:
    hold = {"afterSeconds": 0.01, "keepAliveSeconds": 0.01, "timeoutSeconds": 0.3}
    with running(loop, echo, hold=hold) as (router, (replica,)):
        replica.ready = False
        router.ready(0)
        assert ask(router.port, TEXT, prompt()).status == 503


def test_without_keep_alives_a_stream_is_not_begun_early(loop: Loop) -> None:
    hold = {"afterSeconds": 0.01, "keepAliveSeconds": 0, "timeoutSeconds": 0.3}
    with running(loop, echo, hold=hold) as (router, (replica,)):
        replica.ready = False
        router.ready(0)
        assert ask(router.port, TEXT, prompt(stream=True)).status == 503


@pytest.mark.parametrize("stream", [False, True])
def test_a_wait_ends_at_its_deadline(loop: Loop, stream: bool) -> None:
    with running(loop, echo, hold={"timeoutSeconds": 0.3}) as (router, (replica,)):
        replica.ready = False
        router.ready(0)
        began = time.monotonic()
        answer = ask(router.port, TEXT, prompt(stream=stream))
        assert 0.25 < time.monotonic() - began < 5
        assert answer.status == 503
        fields = error(answer)
        assert fields["code"] == "no_replica"
        assert "no replica is ready (/health/ready answers 503 Service Unavailable)" in fields["message"]
        assert int(answer.headers["retry-after"]) >= 1
        router.idle()


def test_an_error_in_a_stream_that_was_begun_is_an_event_without_done(loop: Loop) -> None:
    hold = {"afterSeconds": 0.05, "keepAliveSeconds": 0.05, "timeoutSeconds": 0.4}
    with running(loop, echo, hold=hold) as (router, (replica,)):
        replica.ready = False
        router.ready(0)
        answer = ask(router.port, TEXT, prompt(stream=True))
        assert answer.status == 200
        assert answer.body.endswith(b"<cut>"), "the last chunk is missing"
        found = events(answer.body.removesuffix(b"<cut>"))
        assert found[0] == ("comment", "waiting")
        assert found[-1]["error"]["status"] == 503
        assert found[-1]["error"]["code"] == "no_replica"
        assert "[DONE]" not in found
        router.idle()
        assert router.metric("arriero_router_requests_total", status="503") == 1


def test_an_answer_that_is_no_stream_ends_one_that_was_begun(loop: Loop) -> None:
    hold = {"afterSeconds": 0.02, "keepAliveSeconds": 0.02, "timeoutSeconds": 20}

    async def refuses(replica: Replica, asked: Request, writer: asyncio.StreamWriter) -> None:
        body = b'{"error":{"message":"too long","type":"invalid_request_error","param":"prompt","code":"x"}}'
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

    with running(loop, refuses, hold=hold) as (router, (replica,)):
        replica.ready = False
        router.ready(0)
        with send(router.port, request(TEXT, prompt(stream=True))) as client:
            seen = b""
            while b": waiting" not in seen:
                seen += client.recv(1000)
            replica.ready = True
            answer = parse_response(seen + read_all(client))
        found = events(answer.body.removesuffix(b"<cut>"))
        assert found[-1]["error"]["message"] == "too long"
        assert found[-1]["error"]["status"] == 400
        assert found[-1]["error"]["code"] == "x"
        assert answer.body.endswith(b"<cut>")


def test_a_full_queue_refuses_at_once(loop: Loop) -> None:
    with running(loop, echo, hold={"maxQueue": 2, "timeoutSeconds": 20}) as (router, (replica,)):
        replica.ready = False
        router.ready(0)
        clients = [send(router.port, request(TEXT, prompt())) for _ in range(2)]
        until(lambda: router.metric("arriero_router_held") == 2, "two are held")
        answer = ask(router.port, TEXT, prompt())
        assert answer.status == 429
        assert error(answer)["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
        replica.ready = True
        for client in clients:
            with client:
                assert parse_response(read_all(client)).status == 200
        router.idle()


def test_what_is_over_the_limit_waits_its_turn(loop: Loop) -> None:
    with mocked(loop, 1) as (router, (mock,)):
        model = router.configuration().models[0].model_dump(by_alias=True, mode="json")
        assert router.reload(models=[model | {"maxInFlightPerReplica": 2}]) == ()
        most = 0
        clients = [send(router.port, request(TEXT, prompt(8, "pace=5000", stream=True))) for _ in range(10)]

        def over() -> bool:
            nonlocal most
            most = max(most, mock.running)
            return mock.stats["requests"] == 10 and not mock.running

        until(over, "all are answered")
        for client in clients:
            with client:
                assert events(parse_response(read_all(client)).body)[-1] == "[DONE]"
        assert most == 2
        router.idle()


def test_a_waiting_client_that_goes_away_is_forgotten(loop: Loop) -> None:
    with running(loop, echo, hold={"timeoutSeconds": 20, "afterSeconds": 0.02}) as (router, (replica,)):
        replica.ready = False
        router.ready(0)
        clients = [send(router.port, request(TEXT, prompt(stream=index % 2 == 0))) for index in range(6)]
        until(lambda: router.metric("arriero_router_held") == 6, "all are held")
        for client in clients:
            client.close()
        router.idle()
        replica.ready = True
        router.ready(1)
        assert ask(router.port, TEXT, prompt()).status == 200
        assert len(replica.requests) == 1


def test_a_broken_stream_is_shown_life_until_another_replica_comes(loop: Loop) -> None:
    hold = {"afterSeconds": 0.05, "keepAliveSeconds": 0.05, "timeoutSeconds": 20}
    with mocked(loop, 1, hold=hold) as (router, (mock,)):
        endpoint = router.loop.call(lambda: router.served.pool.replicas[0].endpoint)
        body = prompt(50, "pace=10000 break=10", stream=True)
        with send(router.port, request(TEXT, body)) as client:
            seen = client.recv(100)
            router.loop.call(lambda: router.served._publish([]))
            while b": waiting" not in seen:
                seen += client.recv(1000)
            router.loop.call(lambda: router.served._publish([endpoint]))
            answer = parse_response(seen + read_all(client))
        found = [event for event in events(answer.body) if not isinstance(event, tuple)]
        assert "".join(event["choices"][0]["text"] for event in found[:-1]) == text_of(50)
        assert mock.stats["resumed"] == 1
        router.idle()
