"""What a load balancer and its clients see of a router that is asked to leave, from outside of its process."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from tests.faces.raw import Response, dechunk, parse_response, read_all
from tests.router.mocks import MODEL, MockReplica, text_of
from tests.router.router_process import Backend, RouterProcess
from tests.worker.replica import free_ports

from arriero.inference.v1 import inference_pb2 as pb
from arriero.inference.v1 import inference_pb2_grpc

from .running import PATIENCE, TEXT, ask, prompt, request, send, until

LONG = 3600


@pytest.fixture(scope="module")
def mock() -> Iterator[MockReplica]:
    with MockReplica("a", *free_ports(3)) as replica:
        yield replica


@contextmanager
def process(mock: MockReplica, replicas: int = 1, **changes: Any) -> Iterator[RouterProcess]:
    """With so many replicas ready."""
    backend = Backend("a", mock.http_port, int(mock.command[-3]), int(mock.command[-1]))
    with RouterProcess.ours(MODEL, [backend], *free_ports(2), **changes) as router:

        def ready() -> int:
            return int(ask(router.http_port, "/v1/models").json()["data"][0]["ready_replicas"])

        until(lambda: ready() == replicas, "the replicas are ready")
        yield router


def sent(router: RouterProcess, number: int = signal.SIGTERM) -> None:
    assert router.process is not None
    router.process.send_signal(number)
    until(lambda: ask(router.http_port, "/health/ready").status == 503, "it is not ready")


def ended(router: RouterProcess) -> None:
    assert router.process is not None
    assert router.process.wait(PATIENCE) == 0
    assert "Traceback" not in router.last_words(), router.last_words()


def whole(client: Any) -> Response:
    """The answer of a connection that the router closes behind it."""
    with client:
        return parse_response(read_all(client))


def test_for_a_while_requests_are_taken_as_ever(mock: MockReplica) -> None:
    with process(mock, leaveSeconds=LONG, drainSeconds=LONG) as router:
        kept = [send(router.http_port, request("/health/live", close=False)) for _ in range(2)]
        for client in kept:
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        with grpc.insecure_channel(f"127.0.0.1:{router.grpc_port}") as channel:
            sent(router)
            stub = inference_pb2_grpc.InferenceStub(channel)
            assert ask(router.http_port, "/health/live").status == 200
            answer = ask(router.http_port, TEXT, prompt(3))
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            for client in kept:
                client.sendall(request(TEXT, prompt(3, stream=True), close=False))
                answer = whole(client)
                assert (answer.status, answer.headers["connection"]) == (200, "close")
                assert b"[DONE]" in answer.body
            call = stub.Generate(pb.GenerateRequest(model=MODEL, text="x"), timeout=PATIENCE)
            assert "".join(piece.text for piece in call) == text_of(16)
        assert router.process is not None
        assert router.process.poll() is None, "it stays for as long as it was told to"
        sent(router)
        ended(router)


def test_the_while_is_over_when_it_is_over(mock: MockReplica) -> None:
    with process(mock, leaveSeconds=1) as router:
        with send(router.http_port, request("/health/live", close=False)) as idle:
            assert idle.recv(1000).startswith(b"HTTP/1.1 200")
            began = time.monotonic()
            sent(router)
            assert idle.recv(1000) == b"", "it has nothing to lose any more"
            assert time.monotonic() - began > 0.9
        ended(router)


def test_a_terminal_needs_no_while(mock: MockReplica) -> None:
    with process(mock, leaveSeconds=LONG, drainSeconds=LONG) as router:
        assert router.process is not None
        router.process.send_signal(signal.SIGINT)
        ended(router)


def test_afterwards_new_requests_are_sent_elsewhere_and_running_ones_end(mock: MockReplica) -> None:
    with process(mock, leaveSeconds=0) as router:
        first = request(TEXT, prompt(60, "pace=30000", stream=True), close=False)
        stream = send(router.http_port, first)
        stream.recv(1)
        with grpc.insecure_channel(f"127.0.0.1:{router.grpc_port}") as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            asked = pb.GenerateRequest(model=MODEL, text="mock pace=30000")
            asked.sampling.max_tokens = 60
            call = stub.Generate(asked, timeout=PATIENCE)
            text = next(call).text
            sent(router)
            stream.sendall(request(TEXT, prompt(3), close=False))  # pipelined behind the stream
            answer = ask(router.http_port, TEXT, prompt(3))
            assert (answer.status, answer.json()["error"]["code"]) == (503, "draining")
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["connection"] == "close"
            with pytest.raises(grpc.RpcError) as refused:
                list(stub.Generate(asked, timeout=PATIENCE))
            assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
            text += "".join(piece.text for piece in call)
            assert text == text_of(60), "the one that ran goes on"
        with stream:
            head, _, rest = read_all(stream).partition(b"\r\n\r\n")
        first_body, _, second = rest.partition(b"0\r\n\r\n")
        assert b"data: [DONE]" in dechunk(first_body + b"0\r\n\r\n"), head
        assert not second or parse_response(second).status == 503, (
            "refused, or not answered at all: the client asks again"
        )
        ended(router)


def test_who_is_held_at_the_end_is_told(mock: MockReplica) -> None:
    with process(mock, 0, leaveSeconds=0, drainSeconds=0.5, models=[unreachable()]) as router:
        waiting = send(router.http_port, request(TEXT, prompt(3)))
        begun = send(router.http_port, request(TEXT, prompt(3, stream=True)))
        begun.recv(1)
        sent(router)
        answer = whole(waiting)
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert "leaving" in answer.json()["error"]["message"]
        with begun:
            rest = read_all(begun)
        assert b'"error"' in rest
        assert b"[DONE]" not in rest
        ended(router)


def unreachable() -> dict[str, Any]:
    (port,) = free_ports(1)
    place = {"host": "127.0.0.1", "httpPort": port, "grpcPort": 0, "controlPort": 0}
    return {"name": MODEL, "endpoints": {"static": [place]}}
