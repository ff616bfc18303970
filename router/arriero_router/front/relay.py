"""What a replica answers, on its way to the client: whole, or as a stream that another replica can continue."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from arriero_faces.http.exchange import Exchange
from arriero_faces.resume import CACHED, CREATED, HEADER, ID, SEED, TOKENS
from arriero_router.core.replay import Break
from arriero_router.front.upstream import Upstream

_EVENT_STREAM = b"text/event-stream"
_COMMENT = b": arriero "
_MARKER = b"\n\n" + _COMMENT
_DONE = b"data: [DONE]\n\n"
_UNFINISHED = b'"finish_reason":null'
MAX_ANSWER = 64 * 1024 * 1024
"""Bytes of an answer that is not streamed."""
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
    status: int = 502
    code: str | None = None


class _ErrorEvent(msgspec.Struct):
    error: _ErrorFields


class _Comment(msgspec.Struct):
    tokens: list[int] = []
    index: int = 0
    seed: int | None = None
    id: str | None = None
    created: int | None = None
    cached: int | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []


_error_of = msgspec.json.Decoder(_ErrorEvent).decode
_comment_of = msgspec.json.Decoder(_Comment).decode
_event_of = msgspec.json.Decoder(_Event).decode


class Progress:
    """How far the answers of one streamed request have come at the client, over all attempts.

    Only whole events whose tokens are known were passed on, so what is here is exactly what the client has.
    """

    __slots__ = ("_comments", "_finished", "_given")

    def __init__(self, given: dict[str, str]) -> None:
        self._comments: list[bytes] = []
        self._finished: set[int] = set()
        self._given = given
        """Resume headers of the client's own: it continues what it had from elsewhere."""

    def passed(self, comment: bytes) -> None:
        self._comments.append(comment)

    def finished(self, event: bytes) -> None:
        """An event that may carry a finish was passed on."""
        try:
            data = event.rpartition(b"data: ")[2]
            self._finished.update(choice.index for choice in _event_of(data).choices if choice.finish_reason)
        except msgspec.DecodeError:
            pass

    @property
    def begun(self) -> bool:
        return bool(self._comments)

    @property
    def steps(self) -> int:
        """Grows with everything that was passed on."""
        return len(self._comments)

    def tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(len(_comment_of(comment).tokens) for comment in self._comments)

    def cached(self) -> int:
        """Prompt tokens that the first replica found in its cache, as far as told."""
        for comment in reversed(self._comments):
            if b'"cached"' in comment:
                return _comment_of(comment).cached or 0
        return 0

    def headers(self, answers: int) -> list[tuple[str, str]]:
        """The resume headers that continue here, for a request of so many answers."""
        if not self._comments:
            return list(self._given.items())
        given = self._given.get(TOKENS, "").split(";") if TOKENS in self._given else []
        ids = [[part] if (part := group.strip()) else [] for group in given]
        ids += [[] for _ in range(answers - len(ids))]
        values = {name: value for name, value in self._given.items() if name != TOKENS}
        for raw in self._comments:
            comment = _comment_of(raw)
            if comment.index >= len(ids):
                ids += [[] for _ in range(comment.index + 1 - len(ids))]
            ids[comment.index] += map(str, comment.tokens)
            for name, value in (
                (SEED, comment.seed), (ID, comment.id), (CREATED, comment.created), (CACHED, comment.cached)
            ):  # fmt: skip
                if value is not None and (name == CACHED or name not in values):
                    values[name] = str(value)
        groups = []
        for index, group in enumerate(ids):
            text = ",".join(group)
            groups.append(text + "!" if index in self._finished and not text.endswith("!") else text)
        return [(TOKENS, ";".join(groups)), *values.items()]


Answer = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers, body."""


class Relay:
    """One attempt's answer. `done` tells how it ended: None when the client has all of it.

    A stream of a replica that speaks the resume contract is passed on event by event, each only with its tokens
    known; any other stream as its bytes come. An answer that is not streamed is kept until it is whole.
    """

    __slots__ = (
        "_buffer",
        "_exchange",
        "_headers",
        "_mode",
        "_on_first",
        "_parts",
        "_passes_comments",
        "_progress",
        "_request_id",
        "_size",
        "_upstream",
        "answer",
        "done",
        "error",
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
    ) -> None:
        """`passes_comments`: the client asked for them. `on_first` is called when the answer begins."""
        self.done: asyncio.Future[Break | None] = upstream.pool.loop.create_future()
        self.status = 0
        self.error = ""
        """What the replica said, or how it broke off, in words."""
        self.answer: Answer | None = None
        """An answer that is no stream; the caller decides whether the client gets it."""
        self.untouched = False
        self.passed = False
        """Bytes of a stream that nobody can continue went to the client."""
        self._exchange, self._upstream, self._progress = exchange, upstream, progress
        self._request_id = request_id
        self._passes_comments = passes_comments
        self._on_first: Callable[[], None] | None = on_first
        self._headers: list[tuple[bytes, bytes]] = []
        self._mode = ""
        self._parts: list[bytes] = []
        self._size = 0
        self._buffer = b""

    # -- Receiver

    def head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        self._headers = headers
        self._mode = "whole"
        if status == 200:
            for name, value in headers:
                if name == b"content-type" and value.startswith(_EVENT_STREAM):
                    self._mode = "bytes" if self._mode == "whole" else self._mode
                elif name == b"x-arriero-resume":
                    self._mode = "events"

    def body(self, data: bytes) -> None:
        self._parts.append(data)

    def flush(self) -> None:
        if self._mode == "whole":
            self._size = sum(map(len, self._parts)) if len(self._parts) < 64 else self._fold()
            if self._size > MAX_ANSWER:
                self._end(Break.FAILED, f"the answer is larger than {MAX_ANSWER} bytes")
                self._upstream.abandon()
            return
        parts = self._parts
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        if self._on_first is not None:
            self._on_first()
            self._on_first = None
        if self._mode == "bytes":
            self.passed = True
            self._write(data)
        else:
            self._events(self._buffer + data if self._buffer else data)

    def end(self) -> None:
        if self._mode == "whole":
            self._whole()
        elif self._mode == "bytes":
            self._start()
            self._exchange.finish()
            self._end(None)
        elif self._buffer == b"" and self._exchange.finished:
            self._end(None)
        else:
            self._broken_stream("the answer ended too early")

    def broken(self, reason: str, untouched: bool) -> None:
        self.untouched = untouched
        if self._mode == "events":
            self._broken_stream(reason)
        else:
            self._end(Break.CUT, reason)

    # -- inside

    def _fold(self) -> int:
        whole = b"".join(self._parts)
        self._parts = [whole]
        return len(whole)

    def _whole(self) -> None:
        body = b"".join(self._parts)
        if self._on_first is not None:
            self._on_first()
            self._on_first = None
        status = self.status
        if status in (429, 503):
            self.answer = (status, self._headers, body)
            self._end(Break.REFUSED, _words(body))
        elif status >= 500:
            self.answer = (status, self._headers, body)
            self._end(Break.FAILED, _words(body))
        else:
            self.answer = (status, self._headers, body)
            self._end(None)

    def _start(self) -> None:
        if not self._exchange.started:
            content_type, headers = forwarded(self._headers, self._request_id)
            own = ((HEADER, "1"),) if self._passes_comments and self._mode == "events" else ()
            self._exchange.start(200, content_type, (*headers, *own))

    def _write(self, data: bytes) -> None:
        exchange = self._exchange
        if not exchange.started:
            self._start()
        exchange.write(data)
        if exchange.blocked:
            self._upstream.pause()
            exchange.on_writable = self._upstream.resume

    def _events(self, data: bytes) -> None:
        """Pass on what stands before the last comment, without the comments; keep the rest."""
        position, progress = 0, self._progress
        out: list[bytes] = []
        while True:
            if data.startswith(_COMMENT, position):
                stop = start = position
            else:
                stop = data.find(_MARKER, position) + 2
                if stop == 1:
                    break
                start = stop
            end = data.find(b"\n\n", start + len(_COMMENT))
            if end < 0:
                break
            event = data[position:stop]
            progress.passed(data[start + len(_COMMENT) : end])
            if _UNFINISHED not in event:
                progress.finished(event)
            out.append(data[position : end + 2] if self._passes_comments else event)
            position = end + 2
        rest = data[position:]
        if rest.endswith(_DONE):
            out.append(rest)
            rest = b""
            self._write(b"".join(out))
            self._exchange.finish()
        elif out:
            self._write(out[0] if len(out) == 1 else b"".join(out))
        self._buffer = rest

    def _broken_stream(self, reason: str) -> None:
        """The rest that was kept back may say why."""
        if self._exchange.finished:
            self._end(None)  # the client has all of it
            return
        kind = Break.CUT
        event = self._buffer.rpartition(b"data: ")[2]
        if event.startswith(b'{"error"'):
            try:
                error = _error_of(event).error
            except msgspec.DecodeError:
                pass
            else:
                reason = error.message
                if 400 <= error.status < 500 and error.status != 429:
                    kind = Break.CLIENT
                elif error.status in (429, 503):
                    kind = Break.CUT if error.code == "engine_gone" else Break.REFUSED
                else:
                    kind = Break.FAILED
                self.status = error.status
        self._end(kind, reason)

    def _end(self, how: Break | None, reason: str = "") -> None:
        self.error = reason
        if not self.done.done():
            self.done.set_result(how)


def forwarded(headers: list[tuple[bytes, bytes]], request_id: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """(content type, the other headers) of a replica's answer that the client is to see."""
    content_type = "application/json"
    kept = [("x-request-id", request_id)]
    for name, value in headers:
        if name == b"content-type":
            content_type = value.decode("latin-1")
        elif name not in _HOP_BY_HOP:
            kept.append((name.decode("latin-1"), value.decode("latin-1")))
    return content_type, tuple(kept)


def _words(body: bytes) -> str:
    """The message of an error's body, or its beginning."""
    try:
        return _error_of(body).error.message
    except msgspec.DecodeError:
        return body[:200].decode("utf-8", "replace")
