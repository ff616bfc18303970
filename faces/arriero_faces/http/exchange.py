"""One request and its answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from arriero_faces.http.errors import HttpError

if TYPE_CHECKING:
    from arriero_faces.http.connection import Connection

JSON = "application/json"
_ABSOLUTE = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)
_SIZES = [b"%x\r\n" % size for size in range(4096)]
"""Lines before chunks: to look one up is cheaper than to write it."""


class Disconnected(Exception):
    """The client is gone; what is written goes nowhere."""


class Exchange:
    """A whole request (head and body), and the means to answer it, once.

    Answer with `respond`, or with `start`, any number of `write` and then `finish` (`cut`, for an answer that broke).
    A handler that is a coroutine is cancelled when the client goes away. Any other sets `on_gone`, and says `done` when
    it has answered.
    """

    __slots__ = (
        "_chunked",
        "_connection",
        "_head_only",
        "body",
        "finished",
        "headers",
        "held",
        "keep_alive",
        "method",
        "on_gone",
        "on_writable",
        "path",
        "query",
        "refusal",
        "started",
        "status",
        "version",
    )

    def __init__(
        self,
        connection: Connection,
        method: str,
        target: bytes,
        version: str,
        headers: list[tuple[bytes, bytes]],
        keep_alive: bool,
    ) -> None:
        if not target.startswith(b"/"):
            target = origin_form(target)
        path, _, query = target.partition(b"?")
        self.method = method
        self.path = path.decode("latin-1")
        """As sent, still percent-encoded, without the query."""
        self.query = query.decode("latin-1")
        self.version = version
        self.headers = headers
        """Names in lower case, in the order they came."""
        self.keep_alive = keep_alive
        self.body: bytes = b""
        self.held = 0
        """Bytes that count against the server's budget until this is answered."""
        self.started = False
        self.finished = False
        self.status = 0
        self.refusal: HttpError | None = None
        """Why it is refused without reaching the handler."""
        self.on_writable: Callable[[], None] | None = None
        """Called when the client has taken enough of what was written, for writers that do not await `drain`."""
        self.on_gone: Callable[[], None] | None = None
        """Called when the client has gone away: what is written goes nowhere, and `done` need not be said."""
        self._connection = connection
        self._chunked = False
        self._head_only = method == "HEAD"

    def header(self, name: bytes) -> str | None:
        """The first value of a header (name in lower case), decoded as Latin-1; None if absent."""
        for key, value in self.headers:
            if key == name:
                return value.decode("latin-1").strip()
        return None

    def respond(
        self, status: int, body: bytes, content_type: str = JSON, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        """The whole answer at once."""
        self.respond_with(status, header_lines(content_type if status != 204 else None, headers), body)

    def respond_with(self, status: int, lines: bytes, body: bytes) -> None:
        """The whole answer, with header lines as bytes, each ended by CRLF."""
        end = b"content-length: %d\r\n\r\n" % len(body) if status != 204 else b"\r\n"
        self._connection.send(self._head(status, lines, end) + (b"" if self._head_only else body))
        self.finished = True

    def refuse(self, error: HttpError) -> None:
        self.respond(error.status, error.body(), headers=error.header_lines())

    def start(self, status: int, content_type: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        """The head of an answer of unknown length. An HTTP/1.0 client gets it without chunks, ended by closing."""
        self.start_with(status, header_lines(content_type, headers), b"")

    def start_with(self, status: int, lines: bytes, data: bytes, last: bool = False) -> None:
        """The same, with header lines as bytes, each ended by CRLF, and the first piece of the body; with `last` it is
        the only one.
        """
        self._chunked = self.version == "1.1"
        if not self._chunked:
            self.keep_alive = False
        head = self._head(status, lines, b"transfer-encoding: chunked\r\n\r\n" if self._chunked else b"\r\n")
        end = b"0\r\n\r\n" if last and self._chunked and not self._head_only else b""
        self._connection.send(head + self._framed(data) + end)
        self.finished = last

    def write(self, data: bytes) -> bool:
        """A piece of the body; never blocks. Returns whether the client has enough to take for now: a writer of many
        pieces then waits for `drain`, or for `on_writable`.
        """
        connection = self._connection
        if data and not self._head_only:
            connection.send(_chunk(data) if self._chunked else data)
        return connection.blocked

    async def drain(self) -> None:
        """Wait until the client has taken enough of what was written. Raises Disconnected."""
        await self._connection.drained()

    @property
    def peer(self) -> str:
        """The client's address."""
        return self._connection.peer

    @property
    def blocked(self) -> bool:
        """Whether `drain` would wait."""
        return self._connection.blocked

    def finish(self, data: bytes = b"") -> None:
        """The answer is whole, `data` being its last piece."""
        if not self._head_only:
            end = self._framed(data) + (b"0\r\n\r\n" if self._chunked else b"")
            if end:
                self._connection.send(end)
        self.finished = True

    def cut(self) -> None:
        """End a started answer so that the client sees it is not whole: close without the last chunk."""
        self.finished = True
        self.keep_alive = False

    def done(self, error: Exception | None = None) -> None:
        """The handler, no coroutine, is done with this; `error` is what it would have raised."""
        self._connection.ended(self, error)

    def _framed(self, data: bytes) -> bytes:
        if not data or self._head_only:
            return b""
        return _chunk(data) if self._chunked else data

    def _head(self, status: int, lines: bytes, end: bytes) -> bytes:
        assert not self.started, "an exchange is answered once"
        self.started = True
        self.status = status
        server = self._connection.server
        if server.draining:
            self.keep_alive = False
        if not self.keep_alive:
            lines += b"connection: close\r\n"
        elif self.version == "1.0":
            lines += b"connection: keep-alive\r\n"
        return server.first_lines(status) + lines + end


def _chunk(data: bytes) -> bytes:
    size = len(data)
    return (_SIZES[size] if size < len(_SIZES) else b"%x\r\n" % size) + data + b"\r\n"


def origin_form(target: bytes) -> bytes:
    """A target in absolute form, which clients of proxies send, without scheme and authority; any other as it is
    (RFC 9112, 3.2.2).
    """
    found = _ABSOLUTE.match(target)
    if found is None:
        return target
    rest = target[found.end() :]
    return rest if rest.startswith(b"/") else b"/" + rest


def header_lines(content_type: str | None, headers: tuple[tuple[str, str], ...]) -> bytes:
    """Lines for `respond_with` and `start_with`."""
    lines = [f"content-type: {content_type}\r\n"] if content_type is not None else []
    lines += [f"{name}: {value}\r\n" for name, value in headers]
    return "".join(lines).encode("latin-1")
