"""Spans at an OTLP collector: one for the request, one for each attempt, in the client's trace."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tests.router.mocks import text_of

from .running import TEXT, Loop, ask, mocked, prompt, running
from .test_grpc import fleet
from .test_http import echo

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """A small OTLP receiver over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    import gzip

                    data = gzip.decompress(data)
                for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
                    for attribute in resource.resource.attributes:
                        if attribute.key == "service.name":
                            outer.services.add(attribute.value.string_value)
                    for scope in resource.scope_spans:
                        outer.spans += scope.spans
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def options(self, ratio: float = 1.0) -> dict[str, Any]:
        return {"otlpEndpoint": f"http://127.0.0.1:{self.server.server_port}/v1/traces", "sampleRatio": ratio}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.close()


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_a_request_and_its_attempts_are_in_the_clients_trace(loop: Loop, collector: Collector) -> None:
    with mocked(loop, tracing=collector.options(0.0)) as (router, mocks):
        answer = ask(
            router.port, TEXT, prompt(8, "break=3", stream=True), f"traceparent: 00-{TRACE}-{PARENT}-01",
            "x-request-id: me",
        )  # fmt: skip
        assert answer.body.count(b" t7") == 1
        assert sum(mock.stats["broken"] for mock in mocks) == 1
    request, first, second = sorted(
        collector.spans, key=lambda span: (span.name == "attempt", span.start_time_unix_nano)
    )
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    assert request.parent_span_id.hex() == PARENT
    assert first.parent_span_id == second.parent_span_id == request.span_id
    assert (request.name, first.name) == (TEXT, "attempt")
    assert (request.kind, first.kind) == (2, 3), "server, client"
    assert {attributes(first)["arriero.replica"], attributes(second)["arriero.replica"]} == {"a", "b"}
    assert first.status.code == 2, "it broke"
    assert second.status.code == request.status.code == 0
    told = attributes(request)
    assert (told["arriero.status"], told["arriero.attempts"], told["arriero.request_id"]) == (200, 2, "me")
    assert request.start_time_unix_nano <= first.start_time_unix_nano <= first.end_time_unix_nano
    assert first.end_time_unix_nano <= second.start_time_unix_nano <= request.end_time_unix_nano
    assert collector.services == {"arriero-router"}


def test_the_replica_is_told_its_attempts_span(loop: Loop, collector: Collector) -> None:
    with running(loop, echo, tracing=collector.options()) as (router, _):
        seen = dict(
            map(tuple, ask(router.port, TEXT, prompt(), f"traceparent: 00-{TRACE}-{PARENT}-01").json()["headers"])
        )
    attempt = next(span for span in collector.spans if span.name == "attempt")
    assert seen["traceparent"] == f"00-{TRACE}-{attempt.span_id.hex()}-01"


def test_what_the_client_does_not_sample_is_not_told(loop: Loop, collector: Collector) -> None:
    with running(loop, echo, tracing=collector.options()) as (router, _):
        seen = dict(
            map(tuple, ask(router.port, TEXT, prompt(), f"traceparent: 00-{TRACE}-{PARENT}-00").json()["headers"])
        )
        assert seen["traceparent"].startswith(f"00-{TRACE}-")
        assert seen["traceparent"].endswith("-00")
    assert collector.spans == []


def test_without_a_word_of_the_clients_the_ratio_decides(loop: Loop, collector: Collector) -> None:
    for ratio, spans in ((0.0, 0), (1.0, 4)):
        with running(loop, echo, tracing=collector.options(ratio)) as (router, _):
            for given in ((), ("traceparent: nonsense",)):
                assert ask(router.port, TEXT, prompt(), *given).status == 200
        assert len(collector.spans) == spans
    assert len({span.trace_id for span in collector.spans}) == 2
    roots = [span for span in collector.spans if span.name == TEXT]
    assert all(not span.parent_span_id for span in roots)


def test_a_collector_that_is_away_harms_nobody(loop: Loop) -> None:
    options = {"otlpEndpoint": "http://127.0.0.1:1/v1/traces", "sampleRatio": 1.0}
    with mocked(loop, 1, tracing=options) as (router, _):
        for _ in range(3):
            assert ask(router.port, TEXT, prompt()).status == 200
        router.idle()


def test_grpc_calls_have_spans(loop: Loop, collector: Collector) -> None:
    with fleet(loop, tracing=collector.options(0.0)) as f:
        given = ("traceparent", f"00-{TRACE}-{PARENT}-01")
        assert "".join(piece.text for piece in f.generate(4, "break=2", given)) == text_of(4)
        seen = [m["traceparent"] for face in f.faces for m in face.metadata]
    root = next(span for span in collector.spans if span.name.endswith("/Generate"))
    attempts = [span for span in collector.spans if span.name == "attempt"]
    assert root.parent_span_id.hex() == PARENT
    assert {span.parent_span_id for span in attempts} == {root.span_id}
    assert sorted(seen) == sorted(f"00-{TRACE}-{span.span_id.hex()}-01" for span in attempts)
    assert len(attempts) == 2
    assert attributes(root)["arriero.status"] == "OK"
