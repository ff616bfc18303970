"""One request and its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from arriero_faces.http.errors import REASONS, HttpError

if TYPE_CHECKING:
    from arriero_faces.http.connection import Connection

JSON = "application/json"


class Disconnected(Exception):
    """The client is gone; what is written goes nowhere."""


class Exchange:
    """A whole request (head and body), and the means to answer it, once.

    Answer with `respond`, or with `start`, any number of `write` and then `finish` (`cut`, for an answer that broke).
    The handler's task is cancelled when the client goes away.
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
        head = self._head(status, content_type, headers)
        length = f"content-length: {len(body)}\r\n" if status != 204 else ""
        self._connection.send(f"{head}{length}\r\n".encode("latin-1") + (b"" if self._head_only else body))
        self.finish()

    def refuse(self, error: HttpError) -> None:
        self.respond(error.status, error.body(), headers=error.header_lines())

    def start(self, status: int, content_type: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        """The head of an answer of unknown length. An HTTP/1.0 client gets it without chunks, ended by closing."""
        self._chunked = self.version == "1.1"
        if not self._chunked:
            self.keep_alive = False
        head = self._head(status, content_type, headers)
        framing = "transfer-encoding: chunked\r\n\r\n" if self._chunked else "\r\n"
        self._connection.send((head + framing).encode("latin-1"))

    def write(self, data: bytes) -> None:
        """A piece of the body; never blocks. A writer of many pieces awaits `drain` between them."""
        if data and not self._head_only:
            self._connection.send(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

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

    def finish(self) -> None:
        """The answer is whole."""
        if self._chunked and not self._head_only:
            self._connection.send(b"0\r\n\r\n")
        self.finished = True

    def cut(self) -> None:
        """End a started answer so that the client sees it is not whole: close without the last chunk."""
        self.finished = True
        self.keep_alive = False

    def _head(self, status: int, content_type: str, headers: tuple[tuple[str, str], ...]) -> str:
        assert not self.started, "an exchange is answered once"
        self.started = True
        self.status = status
        server = self._connection.server
        if server.draining:
            self.keep_alive = False
        lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}\r\ndate: {server.date}\r\n"]
        if status != 204:
            lines.append(f"content-type: {content_type}\r\n")
        lines += [f"{name}: {value}\r\n" for name, value in headers]
        if not self.keep_alive:
            lines.append("connection: close\r\n")
        elif self.version == "1.0":
            lines.append("connection: keep-alive\r\n")
        return "".join(lines)
