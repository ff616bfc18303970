"""What a replica answers, on its way to the client: whole, or as a stream that another replica can continue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import Meta

from arriero_faces.http.errors import HttpError
from arriero_faces.http.exchange import Exchange
from arriero_faces.resume import CACHED, CREATED, HEADER, ID, SEED, TOKENS
from arriero_router.core.replay import Break
from arriero_router.front.upstream import Upstream

_EVENT_STREAM = b"text/event-stream"
_COMMENT = b": arriero "
_COMMENT_AT = len(_COMMENT)
_MARKER = b"\n\n" + _COMMENT
_DONE = b"data: [DONE]\n\n"
_DATA = b"data: "
_NEXT = b"\n" + _DATA  # there is no line feed inside an event's JSON
_GOES_ON = b'"finish_reason":null}]}\n\n'
_UNFINISHED = b'"finish_reason":null'
_OWN_FAULT = (501, 504, 505)
"""Errors of a server that lie with the request: not supported, or late by the request's own limit."""
_VOUCHED = b"x-arriero-resume: 1\r\n"
_UNKNOWN, _WHOLE, _BYTES, _EVENTS = range(4)
"""What an answer is: not known yet, no stream, a stream that nobody can continue, one with resume comments."""
MAX_ANSWER = 16 * 1024 * 1024
"""Bytes of an answer that is not streamed, up to which it is kept until it is whole, so that it can be replayed."""
MAX_EVENT = 16 * 1024 * 1024
"""Bytes of a stream without a comment that vouches for them."""
_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"content-length",
        b"date",
        b"keep-alive",
        b"proxy-authenticate",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-request-id",
        HEADER.encode(),
    )
)


class _ErrorFields(msgspec.Struct):
    message: str = ""
    status: Annotated[int, Meta(ge=400, le=599)] | None = None
    type: str | None = None
    param: str | None = None
    code: str | int | None = None


class _ErrorEvent(msgspec.Struct):
    error: _ErrorFields


class Comment(msgspec.Struct):
    """What a replica says of the piece in front of it. Bounded, for it becomes part of headers."""

    tokens: list[Annotated[int, Meta(ge=0)]] = []
    index: Annotated[int, Meta(ge=0, le=65535)] = 0
    seed: Annotated[int, Meta(ge=0)] | None = None
    id: Annotated[str, Meta(pattern=r"^[-_.A-Za-z0-9]{1,128}\Z")] | None = None
    created: Annotated[int, Meta(ge=0)] | None = None
    cached: Annotated[int, Meta(ge=0)] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []


_error_of = msgspec.json.Decoder(_ErrorEvent).decode
_comment_of = msgspec.json.Decoder(Comment).decode
_event_of = msgspec.json.Decoder(_Event).decode


class Progress:
    """How far the answers of one streamed request have come at the client, over all attempts.

    Only whole events whose tokens are known were passed on, so what is here is exactly what the client has.
    """

    __slots__ = ("_finished", "_given", "_ids", "_values", "cached", "steps")

    def __init__(self, given: dict[str, str]) -> None:
        self.steps = 0
        """Grows with everything that was passed on."""
        self.cached: int | None = None
        """Tokens of the prompt that the replica had cached; None: it did not say."""
        """Prompt tokens that the first replica found in its cache, as far as told."""
        self._given = given
        """Resume headers of the client's own: it continues what it had from elsewhere."""
        self._ids: list[list[int]] = []
        self._finished: set[int] = set()
        self._values: dict[str, str] = {}

    def passed(self, comment: Comment) -> None:
        """A piece was passed on."""
        self.steps += 1
        index, ids = comment.index, self._ids
        while len(ids) <= index:
            ids.append([])
        ids[index] += comment.tokens
        if comment.cached is not None:
            self.cached = comment.cached
            self._values[CACHED] = str(comment.cached)
        if comment.seed is not None or comment.id is not None:
            for name, value in ((SEED, comment.seed), (ID, comment.id), (CREATED, comment.created)):
                if value is not None:
                    self._values.setdefault(name, str(value))

    def finished(self, event: bytes) -> None:
        """An event that may carry a finish was passed on."""
        try:
            self._finished.update(choice.index for choice in _event_of(event).choices if choice.finish_reason)
        except msgspec.DecodeError:
            pass

    @property
    def begun(self) -> bool:
        return self.steps > 0

    @property
    def tokens(self) -> int:
        """Of all answers so far."""
        return sum(map(len, self._ids))

    def headers(self, answers: int) -> list[tuple[str, str]]:
        """The resume headers that continue here, for a request of so many answers."""
        if not self.steps:
            return list(self._given.items())
        had = self._given[TOKENS].split(";") if TOKENS in self._given else []
        groups = []
        for index in range(max(answers, len(had), len(self._ids))):
            before = had[index].strip() if index < len(had) else ""
            since = ",".join(map(str, self._ids[index])) if index < len(self._ids) else ""
            text = ",".join(filter(None, (before, since)))
            groups.append(text + "!" if index in self._finished and not text.endswith("!") else text)
        values = {
            **self._values,
            **{name: value for name, value in self._given.items() if name not in (TOKENS, CACHED)},
        }
        if CACHED in self._given:
            values.setdefault(CACHED, self._given[CACHED])
        return [(TOKENS, ";".join(groups)), *values.items()]


Answer = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers, body."""


class Relay:
    """One attempt's answer. `on_end` is told once how it ended: None when the client has all of it.

    A stream of a replica that speaks the resume contract is passed on event by event, each only with its tokens
    known; any other stream as its bytes come. An answer that is not streamed is kept until it is whole.
    """

    __slots__ = (
        "_buffer",
        "_exchange",
        "_headers",
        "_mode",
        "_on_end",
        "_on_first",
        "_parts",
        "_passes_comments",
        "_progress",
        "_request_id",
        "_size",
        "_upstream",
        "answer",
        "error",
        "failure",
        "passed",
        "status",
        "untouched",
    )

    def __init__(
        self,
        exchange: Exchange,
        upstream: Upstream,
        progress: Progress,
        request_id: str,
        passes_comments: bool,
        on_first: Callable[[], None],
        on_end: Callable[[Relay, Break | None], None],
    ) -> None:
        """`passes_comments`: the client asked for them. `on_first` is called when the answer begins."""
        self.status = 0
        self.error = ""
        """What the replica said, or how it broke off, in words."""
        self.failure: HttpError | None = None
        """The error that ended a stream, as the replica told it."""
        self.answer: Answer | None = None
        """An answer that is no stream; who is told of the end decides whether the client gets it."""
        self.untouched = False
        self.passed = False
        """Bytes of a stream that nobody can continue went to the client."""
        self._exchange, self._upstream, self._progress = exchange, upstream, progress
        self._request_id = request_id
        self._passes_comments = passes_comments
        self._on_first: Callable[[], None] | None = on_first
        self._on_end: Callable[[Relay, Break | None], None] | None = on_end
        """None: it has ended."""
        self._headers: list[tuple[bytes, bytes]] = []
        self._mode = _UNKNOWN
        self._parts: list[bytes] = []
        self._size = 0
        self._buffer = b""

    # -- Receiver

    def head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        self._headers = headers
        self._mode = _WHOLE
        if status == 200:
            streamed = vouched = False
            for name, value in headers:
                if name == b"content-type":
                    streamed = value.startswith(_EVENT_STREAM)
                elif name == b"x-arriero-resume":
                    vouched = True
            if streamed:
                self._mode = _EVENTS if vouched else _BYTES
            if self._progress.begun and self._mode != _EVENTS:
                self._fail("the replica cannot continue a stream")

    def body(self, data: bytes) -> None:
        if self._on_end is None:
            return  # behind the end of the stream
        if self._mode == _WHOLE:
            self._parts.append(data)
            self._size += len(data)
            if self._size <= MAX_ANSWER:
                return
            if self.status != 200 or self._exchange.started:
                self._fail(f"the answer is larger than {MAX_ANSWER} bytes")
                return
            self._mode = _BYTES  # too large to be kept: from here on nobody can take over
            data = b"".join(self._parts)
            self._parts.clear()
        if self._on_first is not None:
            self._first()
        if self._mode == _EVENTS:
            self._events(self._buffer + data if self._buffer else data)
        else:
            self.passed = True
            self._write(data)

    def end(self) -> None:
        if self._on_end is None:
            return
        if self._mode == _WHOLE:
            self._whole()
        elif self._mode == _BYTES:
            if not self._exchange.started:
                self._write(b"")
            self._exchange.finish()
            self._end(None)
        else:
            self._broken_stream("the answer ended too early")

    def broken(self, reason: str, untouched: bool) -> None:
        if self._on_end is None:
            return
        self.untouched = untouched
        if self._mode == _EVENTS:
            self._broken_stream(reason)
        else:
            self._end(Break.CUT, reason)

    # -- inside

    def _first(self) -> None:
        if self._on_first is not None:
            self._on_first()
            self._on_first = None

    def _whole(self) -> None:
        parts = self._parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        self._first()
        kind = _kind_of(self.status)
        self.answer = (self.status, self._headers, body)
        self._end(kind, error_of(body).message if kind is not None else "")

    def _write(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange.started:
            blocked = exchange.write(data)
        else:
            exchange.start_with(200, self._lines(), data)
            blocked = exchange.blocked
        if blocked:
            self._upstream.pause()
            exchange.on_writable = self._upstream.resume

    def _lines(self) -> bytes:
        lines = forwarded(self._headers, self._request_id)
        return lines + _VOUCHED if self._passes_comments and self._mode == _EVENTS else lines

    def _events(self, data: bytes) -> None:
        """Pass on what stands before the last comment, without the comments; keep the rest."""
        position, progress = 0, self._progress
        out = b""
        sound = True
        while True:
            # The line feeds that end a comment may be the ones before the next.
            stop = data.find(_MARKER, position - 2 if position else 0) + 2
            if not position and data.startswith(_COMMENT):
                stop = 0
            elif stop == 1:
                break
            end = data.find(b"\n\n", stop + _COMMENT_AT)
            if end < 0:
                break
            try:
                comment = _comment_of(data[stop + _COMMENT_AT : end])
            except msgspec.DecodeError:
                sound = False
                break
            event = data[position:stop]
            progress.passed(comment)
            if not event.endswith(_GOES_ON):
                # A piece may be several events, of which the last one finishes.
                last = event.rfind(_NEXT) + 1
                if event.find(_UNFINISHED, last) < 0 and event.startswith(_DATA, last):
                    progress.finished(event[last + len(_DATA) :])
            piece = data[position : end + 2] if self._passes_comments else event
            out = out + piece if out else piece
            position = end + 2
            if position == len(data):
                break
        self._buffer = rest = data[position:]
        if rest.endswith(_DONE) and sound:
            if self._exchange.started:
                self._exchange.finish(out + rest)
            else:
                self._exchange.start_with(200, self._lines(), out + rest, last=True)
            self._upstream.resume()
            self._end(None)
            return
        if out:
            self._write(out)
        if sound and not rest:
            return
        if not sound or len(rest) > MAX_EVENT:
            self._fail(
                f"{MAX_EVENT} bytes came without a resume comment" if sound else "a resume comment is not readable"
            )

    def _broken_stream(self, reason: str) -> None:
        """The rest that was kept back may say why."""
        kind = Break.CUT
        event = self._buffer[self._buffer.rfind(_NEXT) + 1 :].removeprefix(_DATA)
        if event.startswith(b'{"error"') and event.endswith(b"\n\n"):
            error = self.failure = error_of(event)
            reason = error.message
            kind = _kind_of(error.status) or Break.CLIENT
            if kind is Break.REFUSED:
                kind = Break.CUT  # it had taken the request
        self._end(kind, reason)

    def _fail(self, reason: str) -> None:
        """The replica sends what nobody can use."""
        self._upstream.abandon()
        self._end(Break.FAILED, reason)

    def _end(self, how: Break | None, reason: str = "") -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            self.error = reason
            on_end(self, how)


def _kind_of(status: int) -> Break | None:
    """What an answer with this status says of the attempt; None: it is the answer."""
    if status in (429, 503):
        return Break.REFUSED
    return Break.FAILED if status >= 500 and status not in _OWN_FAULT else None


def forwarded(headers: list[tuple[bytes, bytes]], request_id: str) -> bytes:
    """Header lines of a replica's answer that the client is to see, and the request's id."""
    lines = b""
    content_type = b"application/json"
    for name, value in headers:
        if name == b"content-type":
            content_type = value
        elif name not in _HOP_BY_HOP:
            lines += b"%b: %b\r\n" % (name, value)
    return b"content-type: %b\r\nx-request-id: %b\r\n%b" % (content_type, request_id.encode("latin-1"), lines)


def error_of(body: bytes, status: int = 502) -> HttpError:
    """An error as a replica told it, or the beginning of what it said instead; `status` where it names none."""
    try:
        error = _error_of(body).error
    except msgspec.DecodeError:
        return HttpError(status, body[:200].decode("utf-8", "replace"))
    code = str(error.code) if error.code is not None else None
    return HttpError(error.status or status, error.message, param=error.param, code=code, type=error.type)
