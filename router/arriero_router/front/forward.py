"""One HTTP request on its way to replicas and back: an Exchange with the client, attempts at replicas behind it."""

from __future__ import annotations

import msgspec

from arriero_faces.http.errors import HttpError
from arriero_faces.http.exchange import Exchange
from arriero_faces.prefix import RoutedFields
from arriero_faces.resume import HEADER
from arriero_router.core.dispatch import Grant
from arriero_router.core.replay import Break
from arriero_router.front.journey import HoldSettings, Outcome
from arriero_router.front.record import Record
from arriero_router.front.relay import Progress, Relay, error_of, forwarded
from arriero_router.front.upstream import UpstreamError

EVENT_STREAM = "text/event-stream; charset=utf-8"
_STREAM_HEADERS = (("cache-control", "no-cache"), ("x-accel-buffering", "no"))
_NOT_FORWARDED = frozenset(
    (
        b"authorization",
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


class Forward:
    """`run` once. Afterwards the client has its answer, whole or cut, and the fields tell how it went."""

    __slots__ = ("_exchange", "_fields", "_head", "_last", "_passes_comments", "_progress", "_record", "_trace")

    def __init__(self, exchange: Exchange, record: Record, fields: RoutedFields, generates: bool) -> None:
        """`generates`: it asks for tokens; any other request is sent again only if nothing came back."""
        self._exchange, self._record = exchange, record
        self._fields = fields if generates else None
        self._trace = b""
        self._passes_comments = False
        self._head = b""
        self._last: Relay | None = None
        """The last attempt that reached a replica."""
        self._progress = Progress({})

    async def run(self, hold: HoldSettings) -> None:
        """Raises HttpError where the client has had nothing yet and is to get an error of the router's."""
        self._prepare()
        record = self._record
        try:
            outcome = await record.journey.run(self._attempt, hold, self._still_there if record.streamed else None)
        except HttpError as error:
            if not self._exchange.started:
                raise
            self._cut(error)
            return
        if outcome.kind is not None:
            self._count_stream()
            record.error = outcome.error
            self._give_up(outcome)

    # -- attempts

    def _prepare(self) -> None:
        exchange = self._exchange
        lines = [
            f"{exchange.method} {exchange.path}{'?' + exchange.query if exchange.query else ''} HTTP/1.1\r\n".encode(
                "latin-1"
            )
        ]
        given: dict[str, str] = {}
        request_id = ""
        named: set[bytes] = set()
        for name, value in exchange.headers:
            if name.startswith(b"x-arriero-resume"):
                text = name.decode()
                if text == HEADER:
                    self._passes_comments = value.strip() == b"1"
                else:
                    given[text] = value.decode("latin-1").strip()
            elif name == b"x-request-id":
                request_id = value.decode("latin-1").strip()
            elif name == b"traceparent":
                self._trace = value
            elif name == b"connection":
                # What it names is for this connection alone (RFC 9110, 7.6.1).
                named.update(part.strip().lower() for part in value.split(b","))
            elif name not in _NOT_FORWARDED:
                lines.append(b"%b: %b\r\n" % (name, value))
        named -= _COMMON_OPTIONS
        if named:
            lines[1:] = [line for line in lines[1:] if line.partition(b":")[0] not in named]
        if request_id:
            self._record.request_id = request_id
        lines.append(b"x-request-id: %b\r\n" % self._record.request_id.encode("latin-1"))
        if self._record.streamed:
            lines.append(b"x-arriero-resume: 1\r\n")
        if exchange.body or exchange.method == "POST":
            lines.append(b"content-length: %d\r\n" % len(exchange.body))
        self._head = b"".join(lines)
        self._progress = Progress(given)

    async def _attempt(self, grant: Grant) -> Outcome:
        trace = self._record.trace
        if trace is None:
            return await self._try(grant, self._trace)
        span = trace.attempt(grant.replica.name)
        outcome: Outcome | None = None
        try:
            outcome = await self._try(grant, span.traceparent.encode())
            return outcome
        finally:
            span.end("cancelled" if outcome is None else outcome.error)

    async def _try(self, grant: Grant, traceparent: bytes) -> Outcome:
        record, progress = self._record, self._progress
        upstreams = record.served.upstreams(grant.replica)
        upstream = upstreams.lease()
        if upstream is None:
            try:
                upstream = await upstreams.connect()
            except UpstreamError as error:
                return Outcome(Break.UNREACHED, str(error))
        before = progress.steps
        relay = Relay(self._exchange, upstream, progress, record.request_id, self._passes_comments, record.first_byte)
        upstream.send(self._head + self._tail(upstreams.authority, traceparent) + self._exchange.body, relay)
        record.sent()
        try:
            how = await relay.done
        except BaseException:
            upstream.abandon()
            raise
        finally:
            self._exchange.on_writable = None
        if how is None:
            self._answered(relay)
            return Outcome(None)
        self._last = relay
        return Outcome(
            how,
            relay.error,
            gained=progress.steps > before,
            resumable=not relay.passed,
            untouched=relay.untouched,
        )

    def _tail(self, authority: str, traceparent: bytes) -> bytes:
        """The part of the head that is another one for each attempt."""
        trace = b"traceparent: %b\r\n" % traceparent if traceparent else b""
        progress = self._progress
        resume = progress.headers(self._answers() if progress.begun else 0)
        lines = "".join([f"{name}: {value}\r\n" for name, value in resume])
        return b"%bhost: %b\r\n%b\r\n" % (trace, authority.encode("latin-1"), lines.encode("latin-1"))

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

    def _still_there(self) -> None:
        """A held or paused stream shows life. From now on errors travel in it."""
        exchange = self._exchange
        if not exchange.started:
            vouched = ((HEADER, "1"),) if self._passes_comments else ()
            exchange.start(200, EVENT_STREAM, (*_STREAM_HEADERS, *vouched, ("x-request-id", self._record.request_id)))
        if not exchange.blocked:
            exchange.write(b": waiting\n\n")

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
        content_type, kept = forwarded(headers, self._record.request_id)
        self._exchange.respond(status, body, content_type, kept)
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
                usage.prompt_tokens, usage.completion_tokens, details.cached_tokens if details is not None else 0
            )

    def _count_stream(self) -> None:
        """What the client has had of a stream, as far as it can be known."""
        record, progress = self._record, self._progress
        if progress.begun and self._fields is not None:
            record.cached_tokens = progress.cached
            record.served.metrics.cached_tokens += record.cached_tokens
            record.completion_tokens = progress.tokens
            record.used = prompt_estimate(record.ask.size) + record.completion_tokens

    def _give_up(self, outcome: Outcome) -> None:
        """No further attempt is made."""
        exchange, last = self._exchange, self._last
        if last is not None and outcome.kind in (Break.REFUSED, Break.FAILED, Break.CLIENT):
            if last.answer is not None and not exchange.started:
                status, headers, body = last.answer
                content_type, kept = forwarded(headers, self._record.request_id)
                exchange.respond(status, body, content_type, kept)
                return
            if last.failure is not None:
                self._fail(last.failure)
                return
        made = self._record.journey.attempts.made
        error = HttpError(
            502,
            f"no replica could answer; the last one: {outcome.error or 'broke off'} ({made} attempts)",
            code="replica_failed",
        )
        self._fail(error)

    def _fail(self, error: HttpError) -> None:
        if not self._exchange.started:
            raise error
        self._cut(error)

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
