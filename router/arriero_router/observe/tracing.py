"""Spans of requests, sent by OTLP over HTTP: one for the request, and one for each attempt at a replica.

W3C Trace Context (https://www.w3.org/TR/trace-context/) is taken from the client and passed on to the replica.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_propagator = TraceContextTextMapPropagator()


class RequestTrace:
    """The span of one request, and those of its attempts."""

    __slots__ = ("_span", "_tracer")

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer, self._span = tracer, span

    @property
    def trace_id(self) -> str:
        return format(self._span.get_span_context().trace_id, "032x")

    def attempt(self, replica: str) -> AttemptTrace:
        context = set_span_in_context(self._span)
        span = self._tracer.start_span("attempt", context=context, kind=SpanKind.CLIENT)
        span.set_attribute("arriero.replica", replica)
        return AttemptTrace(span)

    def end(self, fields: Mapping[str, Any], error: str) -> None:
        _end(self._span, {f"arriero.{name}": value for name, value in fields.items()}, error)


class AttemptTrace:
    """The span of one attempt."""

    __slots__ = ("_span",)

    def __init__(self, span: Span) -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        """What tells the replica of it."""
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, context=set_span_in_context(self._span))
        return carrier.get("traceparent", "")

    def end(self, error: str) -> None:
        _end(self._span, {}, error)


class Tracing:
    """Spans are gathered and sent by a thread of the SDK's."""

    def __init__(self, endpoint: str, ratio: float, service_name: str) -> None:
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service_name}),
            sampler=ParentBased(TraceIdRatioBased(ratio)),
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=5)))
        self._tracer = self._provider.get_tracer("arriero.router")

    def begin(self, name: str, traceparent: str | None, tracestate: str | None) -> RequestTrace:
        """The span of a request, below the client's if it told one."""
        carrier = {}
        if traceparent:
            carrier["traceparent"] = traceparent
            if tracestate:
                carrier["tracestate"] = tracestate
        span = self._tracer.start_span(name, context=_propagator.extract(carrier), kind=SpanKind.SERVER)
        return RequestTrace(self._tracer, span)

    def close(self) -> None:
        """Send what is left. Takes up to some seconds."""
        self._provider.shutdown()


def _end(span: Span, attributes: Mapping[str, Any], error: str) -> None:
    if span.is_recording():
        span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        if error:
            span.set_status(Status(StatusCode.ERROR, error))
    span.end()
