"""One HTTP request on its way to replicas and back: an Exchange with the client, attempts at replicas behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from arriero_faces.http.errors import HttpError
from arriero_faces.http.exchange import Disconnected, Exchange
from arriero_faces.prefix import RoutedFields
from arriero_faces.resume import HEADER
from arriero_router.core.dispatch import Grant
from arriero_router.core.replay import Break
from arriero_router.front.journey import HoldSettings, Outcome
from arriero_router.front.record import Record
from arriero_router.front.relay import Progress, Relay, error_of, forwarded
from arriero_router.front.upstream import Upstream, UpstreamError, UpstreamPool

if TYPE_CHECKING:
    from arriero_router.observe.tracing import AttemptTrace

EVENT_STREAM = "text/event-stream; charset=utf-8"
_STREAM_HEADERS = (("cache-control", "no-cache"), ("x-accel-buffering", "no"))
_NOT_FORWARDED = frozenset(
    (
        b"authorization",
        b"connection",
        b"content-length",
        b"expect",
        b"host",
        b"keep-alive",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"traceparent",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-api-key",
        b"x-request-id",
    )
)
"""Ends here, or is written anew for each attempt."""
_COMMON_OPTIONS = frozenset((b"keep-alive", b"close", b""))


class _Tokens(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Tokens | None = None


class _Used(msgspec.Struct):
    usage: _Usage | None = None


_used_in = msgspec.json.Decoder(_Used).decode


_WHOLE = Outcome(None)


class Forward:
    """`start` once. In the end the client has its answer, whole or cut, or is gone; then `on_over` is told the error
    that the client is to get where it has had nothing.
    """

    __slots__ = (
        "_connecting",
        "_exchange",
        "_fields",
        "_head",
        "_last",
        "_on_over",
        "_passes_comments",
        "_progress",
        "_record",
        "_span",
        "_steps_before",
        "_trace",
        "_upstream",
    )

    def __init__(
        self,
        exchange: Exchange,
        record: Record,
        fields: RoutedFields,
        generates: bool,
        on_over: Callable[[Exchange, Record, Exception | None], None],
    ) -> None:
        """`generates`: it asks for tokens; any other request is sent again only if nothing came back. `on_over` gets
        Disconnected where the client has gone.
        """
        self._exchange, self._record = exchange, record
        self._fields = fields if generates else None
        self._on_over: Callable[[Exchange, Record, Exception | None], None] | None = on_over
        """None: it is over."""
        self._trace = b""
        self._span: AttemptTrace | None = None
        self._passes_comments = False
        self._head = b""
        self._upstream: Upstream | None = None
        """Of the attempt under way."""
        self._connecting: asyncio.Task[None] | None = None
        self._last: Relay | None = None
        """The last attempt that reached a replica and failed."""
        self._progress = Progress({})
        self._steps_before = 0

    def start(self, hold: HoldSettings) -> None:
        exchange, record = self._exchange, self._record
        exchange.on_gone = self._gone
        try:
            self._prepare()
            record.journey.start(self, hold if record.streamed else None)
        except Exception as error:
            self._fell(error)

    # -- life

    def _gone(self) -> None:
        """The client is gone."""
        self._stop("cancelled")
        self._end(Disconnected())

    def _fell(self, error: Exception) -> None:
        """A fault of this program's: the client shall not wait for an answer that nobody is working on."""
        self._stop(f"{type(error).__name__}: {error}")
        self._end(error)

    def _stop(self, reason: str) -> None:
        """Let go of the replica."""
        self._record.journey.leave()
        if self._connecting is not None:
            self._connecting.cancel()
        if self._upstream is not None:
            self._upstream.abandon()
        self._attempt_over(reason)

    def _attempt_over(self, error: str) -> None:
        self._connecting = self._upstream = None
        self._exchange.on_writable = None
        if self._span is not None:
            self._span.end(error)
            self._span = None

    def _end(self, error: Exception | None = None) -> None:
        on_over, self._on_over = self._on_over, None
        self._exchange.on_gone = None  # it knows this: nothing shall be left to the garbage collector
        if on_over is not None:
            on_over(self._exchange, self._record, error)

    # -- Traveller

    def over(self, outcome: Outcome) -> None:
        error: HttpError | None = None
        if outcome.kind is not None:
            self._count_stream()
            self._record.error = outcome.error
            error = self._give_up(outcome)
        self._end(error)

    def turned_away(self, error: HttpError) -> None:
        try:
            self._end(self._failure(error))
        except Exception as fault:
            self._fell(fault)

    def waiting(self) -> None:
        """A held or paused stream shows life. From now on errors travel in it."""
        exchange = self._exchange
        if not exchange.started:
            vouched = ((HEADER, "1"),) if self._passes_comments else ()
            exchange.start(200, EVENT_STREAM, (*_STREAM_HEADERS, *vouched, ("x-request-id", self._record.request_id)))
        if not exchange.blocked:
            exchange.write(b": waiting\n\n")

    def attempt(self, grant: Grant) -> None:
        record = self._record
        try:
            if record.trace is not None:
                self._span = record.trace.attempt(grant.replica.name)
            upstreams = record.served.upstreams(grant.replica)
            upstream = upstreams.lease()
            if upstream is not None:
                self._send(upstream)
            else:
                self._connecting = upstreams.loop.create_task(self._connect(upstreams))
        except Exception as error:
            self._fell(error)

    # -- attempts

    async def _connect(self, upstreams: UpstreamPool) -> None:
        try:
            try:
                upstream = await upstreams.connect()
            except UpstreamError as error:
                self._attempt_over(str(error))
                self._record.journey.ended(Outcome(Break.UNREACHED, str(error)))
            else:
                self._send(upstream)
        except Exception as error:
            self._fell(error)

    def _send(self, upstream: Upstream) -> None:
        record, exchange = self._record, self._exchange
        self._connecting = None
        self._upstream = upstream
        self._steps_before = self._progress.steps
        relay = Relay(
            exchange,
            upstream,
            self._progress,
            record.request_id,
            self._passes_comments,
            record.first_byte,
            self._relayed,
        )
        trace = self._span.traceparent.encode() if self._span is not None else self._trace
        upstream.send(b"%b%b%b" % (self._head, self._tail(upstream.pool.authority, trace), exchange.body), relay)
        record.sent()

    def _relayed(self, relay: Relay, how: Break | None) -> None:
        """An attempt is over."""
        try:
            self._attempt_over(relay.error if how is not None else "")
            journey = self._record.journey
            if how is None:
                self._answered(relay)
                journey.ended(_WHOLE)
                return
            self._last = relay
            journey.ended(
                Outcome(
                    how,
                    relay.error,
                    gained=self._progress.steps > self._steps_before,
                    resumable=not relay.passed,
                    untouched=relay.untouched,
                )
            )
        except Exception as error:
            self._fell(error)

    def _prepare(self) -> None:
        exchange, record = self._exchange, self._record
        query = f"?{exchange.query}" if exchange.query else ""
        lines = [f"{exchange.method} {exchange.path}{query} HTTP/1.1\r\n".encode("latin-1")]
        given: dict[str, str] = {}
        named: set[bytes] = set()
        for name, value in exchange.headers:
            if name in _NOT_FORWARDED:
                if name == b"traceparent":
                    self._trace = value
                elif name == b"x-request-id":
                    record.request_id = value.decode("latin-1").strip() or record.request_id
                elif name == b"connection":
                    # What it names is for this connection alone (RFC 9110, 7.6.1).
                    named.update([part.strip().lower() for part in value.split(b",")])
            elif name.startswith(b"x-arriero-resume"):
                text = name.decode()
                if text == HEADER:
                    self._passes_comments = value.strip() == b"1"
                else:
                    given[text] = value.decode("latin-1").strip()
            else:
                lines.append(b"%b: %b\r\n" % (name, value))
        named -= _COMMON_OPTIONS
        if named:
            lines[1:] = [line for line in lines[1:] if line.partition(b":")[0] not in named]
        lines.append(b"x-request-id: %b\r\n" % record.request_id.encode("latin-1"))
        if record.streamed:
            lines.append(b"x-arriero-resume: 1\r\n")
        if exchange.body or exchange.method == "POST":
            lines.append(b"content-length: %d\r\n" % len(exchange.body))
        self._head = b"".join(lines)
        if given:
            self._progress = Progress(given)

    def _tail(self, authority: bytes, traceparent: bytes) -> bytes:
        """The part of the head that is another one for each attempt."""
        progress = self._progress
        resume = progress.headers(self._answers() if progress.begun else 0)
        if not resume and not traceparent:
            return b"host: %b\r\n\r\n" % authority
        trace = b"traceparent: %b\r\n" % traceparent if traceparent else b""
        lines = "".join([f"{name}: {value}\r\n" for name, value in resume])
        return b"%bhost: %b\r\n%b\r\n" % (trace, authority, lines.encode("latin-1"))

    def _answers(self) -> int:
        """How many answers the request asks for."""
        fields = self._fields
        assert fields is not None
        count = fields.n or 1
        prompt = bytes(fields.prompt)
        if prompt[:1] == b"[":
            listed = msgspec.json.decode(prompt)
            if listed and not isinstance(listed[0], int):
                count *= len(listed)
        return count

    # -- the client's end

    def _answered(self, relay: Relay) -> None:
        record = self._record
        if relay.answer is None:
            self._count_stream()
            return
        status, headers, body = relay.answer
        if self._exchange.started:
            # Keep-alives were sent and the answer is no stream: an error that the replica gave at once.
            self._cut(error_of(body, status if status >= 400 else 502))
            return
        self._exchange.respond_with(status, forwarded(headers, record.request_id), body)
        if status != 200:
            record.used = 0
        elif self._fields is not None:
            self._count(body)

    def _count(self, body: bytes) -> None:
        try:
            usage = _used_in(body).usage
        except msgspec.DecodeError:
            return
        if usage is not None:
            details = usage.prompt_tokens_details
            self._record.tokens(
                usage.prompt_tokens, usage.completion_tokens, details.cached_tokens if details is not None else None
            )

    def _count_stream(self) -> None:
        """What the client has had of a stream, as far as it can be known."""
        record, progress = self._record, self._progress
        if progress.begun and self._fields is not None:
            prompt = prompt_estimate(record.ask.size)
            if progress.cached is not None:
                record.found(progress.cached, prompt)
            record.completion_tokens = progress.tokens
            record.used = prompt + record.completion_tokens

    def _give_up(self, outcome: Outcome) -> HttpError | None:
        """No further attempt is made. Returns what the client is to be told if it has not been."""
        exchange, last = self._exchange, self._last
        if last is not None and outcome.kind in (Break.REFUSED, Break.FAILED, Break.CLIENT):
            if last.answer is not None and not exchange.started:
                status, headers, body = last.answer
                exchange.respond_with(status, forwarded(headers, self._record.request_id), body)
                return None
            if last.failure is not None:
                return self._failure(last.failure)
        made = self._record.journey.attempts.made
        return self._failure(
            HttpError(
                502,
                f"no replica could answer; the last one: {outcome.error or 'broke off'} ({made} attempts)",
                code="replica_failed",
            )
        )

    def _failure(self, error: HttpError) -> HttpError | None:
        """The error, if the client has had nothing yet; else it is told in what was begun."""
        if not self._exchange.started:
            return error
        self._cut(error)
        return None

    def _cut(self, error: HttpError) -> None:
        """An error in a stream that was begun: no client takes what it has for the whole answer."""
        exchange = self._exchange
        if not exchange.finished:
            if self._record.streamed:
                fields = {**error.fields(), "status": error.status}
                exchange.write(b"data: " + msgspec.json.encode({"error": fields}) + b"\n\n")
            exchange.cut()
        exchange.status = error.status
        self._record.error = self._record.error or error.message


def prompt_estimate(size: int) -> int:
    """Tokens of a prompt of so many bytes, about."""
    return size // 4
