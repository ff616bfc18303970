"""Connections to replicas: HTTP/1.1 kept alive, one request at a time on each, never pipelined."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from typing import Any, Protocol, cast

import httptools

from arriero_router.endpoints.channel import unreachable

MAX_HEAD = 65536
"""Bytes of an answer without any of its body: its head, informational answers before it, chunk headers, trailers."""


_SIZES = {b"%x" % size: size for size in range(1, 4096)}
"""Of chunks that are taken past the parser, by the line before them as all but everybody writes it."""
_LONGEST = 5
"""Bytes of such a line, its end included."""


class UpstreamError(Exception):
    """A replica could not be reached, or broke off."""


class Receiver(Protocol):
    """What comes back for one request: `head`, any number of `body`, then `end`; or `broken` at any point, last.

    `body` gets together what arrived together. It may `abandon` or `pause` the connection; after `end` and `broken` the
    connection may be another request's.
    """

    def head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None: ...

    def body(self, data: bytes) -> None: ...

    def end(self) -> None: ...

    def broken(self, reason: str, untouched: bool) -> None:
        """`untouched`: a kept connection turned out to be closed before a byte of an answer came."""
        ...


class Upstream(asyncio.Protocol):
    """One connection. `send` while it is idle; then the receiver is called until `end` or `broken`."""

    __slots__ = (
        "_answered",
        "_bare",
        "_between_chunks",
        "_complete",
        "_headers",
        "_in_body",
        "_informational",
        "_keep",
        "_parser",
        "_parts",
        "_receiver",
        "_status",
        "_surplus",
        "_time",
        "_used",
        "closed",
        "heard",
        "pool",
        "transport",
    )

    def __init__(self, pool: UpstreamPool) -> None:
        self.pool = pool
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # set by connection_made, before all else
        self.closed = False
        self._time = pool.loop.time
        self.heard = self._time()
        """When bytes last came, by the loop's clock."""
        self._parser: Any = httptools.HttpResponseParser(self)
        self._receiver: Receiver | None = None
        self._used = False
        self._answered = False
        self._keep = False
        self._complete = False
        """The answer is whole; what follows in the same arrival is nobody's."""
        self._surplus = False
        self._informational = False
        self._in_body = False
        self._status = 0
        """Of a head that has just come."""
        self._headers: list[tuple[bytes, bytes]] = []
        self._parts: list[bytes] = []
        """Of the body, since the last arrival."""
        self._between_chunks = False
        """The parser expects the beginning of a chunk, so whole ones can be taken past it."""
        self._bare = 0
        """Bytes in a row that held no body."""

    # -- for the front

    def send(self, data: bytes, receiver: Receiver) -> None:
        assert self._receiver is None
        self._receiver = receiver
        self._answered = False
        self._bare = 0
        self.heard = self._time()
        if self.closed or self.transport.is_closing():
            # It was lost between its making and this: nobody would be told of that any more.
            self._used = True
            self.pool.loop.call_soon(self._break, "the connection was closed before it was used")
            return
        self.transport.write(data)

    def pause(self) -> None:
        """Read no further: the client does not take what it was sent."""
        if not self.closed:
            self.transport.pause_reading()

    def resume(self) -> None:
        if not self.closed and not self.transport.is_reading():
            self.transport.resume_reading()

    @property
    def paused(self) -> bool:
        return not self.closed and not self.transport.is_reading()

    @property
    def begun(self) -> bool:
        """Whether anything of the answer has come."""
        return self._answered

    def give_up(self, reason: str) -> None:
        """Break off, as if the replica had."""
        self._break(reason)

    def abandon(self) -> None:
        """The answer is not wanted any more: the replica sees it by the closed connection."""
        self._receiver = None
        self.abort()

    def abort(self) -> None:
        self.closed = True
        self.transport.abort()

    @property
    def busy(self) -> bool:
        return self._receiver is not None

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it
        self.pool.opened(self)

    def data_received(self, data: bytes) -> None:
        receiver = self._receiver
        if receiver is None:
            self.abort()  # nobody asked
            return
        self.heard = self._time()
        self._answered = True
        if self._between_chunks:
            # Most arrivals are one whole chunk; the parser need not see those.
            start = data.find(b"\r\n", 0, _LONGEST)
            size = _SIZES.get(data[:start], 0)
            if size:
                if start + size + 4 == len(data) and data.endswith(b"\r\n"):
                    self._bare = 0
                    receiver.body(data[start + 2 : -2])
                    return
                data = self._take_chunks(data)
        if data:
            try:
                self._parser.feed_data(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
                self._break(f"the replica's answer is not HTTP/1.1 ({type(error).__name__})")
                return
            self._between_chunks = self._between_chunks and data.endswith(b"\r\n")
        if self._status:
            status, self._status = self._status, 0
            receiver.head(status, self._headers)
        parts = self._parts
        if parts:
            self._bare = 0
            body = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
            if self._receiver is receiver:
                receiver.body(body)
        elif self._receiver is receiver and not self._complete:
            # What the parser keeps of a head or a trailer that never ends is bounded by this alone.
            self._bare += len(data)
            if self._bare > MAX_HEAD:
                self._break(f"the replica sent {MAX_HEAD} bytes without anything of an answer's body")
        if self._complete:
            self._end(receiver)

    def _take_chunks(self, data: bytes) -> bytes:
        """Put by the bodies of the whole chunks that the data begins with; returns the rest."""
        position = 0
        while True:
            start = data.find(b"\r\n", position, position + _LONGEST)
            size = _SIZES.get(data[position:start], 0)
            end = start + 2 + size
            if not size or data[end : end + 2] != b"\r\n":
                return data[position:]
            self._parts.append(data[start + 2 : end])
            position = end + 2

    def _end(self, receiver: Receiver) -> None:
        self._complete = self._between_chunks = False
        if self._receiver is not receiver:
            return  # it has given up
        self._receiver = None
        self._used = True
        if self._keep and not self._surplus and not self.closed:
            if not self.transport.is_reading():
                self.transport.resume_reading()
            self.pool.idle(self)
        else:
            self.abort()
        receiver.end()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self.pool.lost(self)
        self._parser = None  # each knows the other
        receiver = self._receiver
        if receiver is None:
            return
        # Replicas frame their answers, so a closed connection never ends a whole one.
        self._break(str(error) if error is not None else "the replica closed the connection")

    def _break(self, reason: str) -> None:
        receiver, self._receiver = self._receiver, None
        untouched = self._used and not self._answered
        self.abort()
        if receiver is not None:
            receiver.broken(reason, untouched)

    # -- httptools

    def on_message_begin(self) -> None:
        self._headers = []
        self._in_body = False
        if self._complete:
            self._surplus = True  # more than was asked for: whose answer comes next could not be told

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:  # it would be a trailer
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._informational = status < 200
        if self._informational or self._receiver is None or self._complete:
            return
        self._in_body = True
        self._keep = self._parser.should_keep_alive()
        self._status = status
        codings = [value for name, value in self._headers if name == b"transfer-encoding"]
        self._between_chunks = codings == [b"chunked"]

    def on_chunk_header(self) -> None:
        self._between_chunks = False

    def on_chunk_complete(self) -> None:
        self._between_chunks = True

    def on_body(self, body: bytes) -> None:
        if not self._complete:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        if not self._informational:
            self._complete = True


class UpstreamPool:
    """The connections to one replica."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        connect_seconds: float = 2.0,
        max_idle: int = 256,
        tls: ssl.SSLContext | None = None,
        server_name: str | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.host, self.port = host, port
        self.authority = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}").encode("latin-1")
        """For the Host header."""
        self._connect_seconds = connect_seconds
        self._max_idle = max_idle
        self._tls = tls
        self._server_name = server_name
        self._idle: deque[Upstream] = deque()
        self._open: set[Upstream] = set()
        self._closed = False

    @property
    def connections(self) -> int:
        return len(self._open)

    def lease(self) -> Upstream | None:
        """An idle connection, the one used last; None: `connect`."""
        while self._idle:
            upstream = self._idle.pop()
            if not upstream.closed and not upstream.transport.is_closing():
                return upstream
        return None

    async def connect(self) -> Upstream:
        """A new connection. Raises UpstreamError."""
        try:
            async with asyncio.timeout(self._connect_seconds):
                _, upstream = await self.loop.create_connection(
                    lambda: Upstream(self),
                    self.host,
                    self.port,
                    ssl=self._tls,
                    server_hostname=(self._server_name or self.host) if self._tls is not None else None,
                )
        except TimeoutError as error:
            raise UpstreamError(f"no connection within {self._connect_seconds:g} s") from error
        except OSError as error:
            raise UpstreamError(unreachable(error)) from error
        return upstream

    def close(self, *, busy: bool = False) -> None:
        """Close idle connections, the others when they become idle, or (`busy`) at once."""
        self._closed = True
        for upstream in list(self._open):
            if busy or not upstream.busy:
                upstream.abort()
        self._idle.clear()

    def sweep(self, now: float, *, idle: float, head: float, silence: float) -> None:
        """Close connections that were not used for `idle` seconds, and break off answers that are overdue: their head
        for `head` seconds, anything more of them for `silence` seconds (0: never).
        """
        for upstream in list(self._open):
            quiet = now - upstream.heard
            if not upstream.busy:
                if quiet > idle:
                    upstream.abort()
            elif upstream.paused:
                upstream.heard = now
            elif upstream.begun:
                if silence and quiet > silence:
                    upstream.give_up(f"the replica said nothing for {silence:g} s")
            elif head and quiet > head:
                upstream.give_up(f"the replica did not answer within {head:g} s")

    # -- for connections

    def opened(self, upstream: Upstream) -> None:
        self._open.add(upstream)

    def idle(self, upstream: Upstream) -> None:
        if self._closed or len(self._idle) >= self._max_idle:
            upstream.abort()
        else:
            self._idle.append(upstream)

    def lost(self, upstream: Upstream) -> None:
        self._open.discard(upstream)
        try:
            self._idle.remove(upstream)
        except ValueError:
            pass
