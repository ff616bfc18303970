"""Listening, and what all connections share: limits, the clock, the sweep of those behind their deadlines."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any

from arriero_faces.http.connection import Connection
from arriero_faces.http.errors import REASONS, HttpError
from arriero_faces.http.exchange import Exchange

log = logging.getLogger("arriero.http")

Handler = Callable[[Exchange], Coroutine[Any, Any, None] | None]
"""Raises HttpError where it refuses. A coroutine is run, and cancelled when the client goes; None: the handler answers
by itself, now or later, and says `Exchange.done`.
"""


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Sizes in bytes, times in seconds."""

    max_head: int = 65536
    """Request line and headers."""
    max_headers: int = 100
    max_body: int = 16 * 1024 * 1024
    max_connections: int = 4096
    max_pipelined: int = 16
    """Requests read ahead of the one being answered."""
    max_unanswered: int = 512 * 1024 * 1024
    """Bodies held by all connections together."""
    write_buffer: int = 65536
    """Bytes written and not taken by the client beyond which its writer waits."""
    head_seconds: float = 10.0
    body_seconds: float = 60.0
    idle_seconds: float = 90.0
    stall_seconds: float = 30.0
    """How long a client may leave the write buffer over its limit."""
    linger_seconds: float = 2.0
    sweep_seconds: float = 0.5
    """Precision of the times above."""


class HttpServer:
    """Serves `handler`, which answers one Exchange."""

    def __init__(
        self,
        handler: Handler,
        limits: HttpLimits | None = None,
        on_refused: Callable[[Exchange, HttpError], None] | None = None,
    ) -> None:
        self.handler = handler
        self.limits = limits or HttpLimits()
        self.draining = False
        self._first_lines: dict[int, bytes] = {}
        """By status, until the date is another."""
        self.loop: asyncio.AbstractEventLoop = None  # type: ignore[assignment]  # set by start
        self._on_refused = on_refused
        self._connections: set[Connection] = set()
        self._unanswered = 0
        self._listeners: list[asyncio.Server] = []
        self._sweeper: asyncio.TimerHandle | None = None
        self._empty: asyncio.Future[None] | None = None

    @property
    def now(self) -> float:
        return self.loop.time()

    @property
    def connections(self) -> int:
        return len(self._connections)

    @property
    def busy(self) -> int:
        """Connections with a request being answered or waiting to be."""
        return sum(1 for connection in self._connections if connection.busy)

    @property
    def unanswered(self) -> int:
        """Bytes of bodies held."""
        return self._unanswered

    async def start(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Serve on a bound socket, which is the server's from now on."""
        self.loop = asyncio.get_running_loop()
        self._listeners.append(
            await self.loop.create_server(lambda: Connection(self), sock=listener, backlog=1024, ssl=tls)
        )
        if self._sweeper is None:
            self._sweep()

    def drain(self) -> None:
        """Answers from now on end their connections; idle connections are closed."""
        self.draining = True
        for connection in list(self._connections):
            connection.close_if_idle()

    async def stop(self) -> None:
        """Stop listening and cut off what is left."""
        for listener in self._listeners:
            listener.close()
        for connection in list(self._connections):
            connection.abort()
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._connections:
            self._empty = self.loop.create_future()
            await self._empty

    # -- for connections

    def admit(self, connection: Connection) -> bool:
        self._connections.add(connection)
        return len(self._connections) <= self.limits.max_connections

    def forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if self._empty is not None and not self._connections and not self._empty.done():
            self._empty.set_result(None)

    def reserve(self, size: int) -> bool:
        """Take `size` bytes (or give them back, if negative) of the budget for bodies."""
        if size > 0 and self._unanswered + size > self.limits.max_unanswered:
            return False
        self._unanswered += size
        return True

    def first_lines(self, status: int) -> bytes:
        """The status line and the date of an answer."""
        lines = self._first_lines.get(status)
        if lines is None:
            date = formatdate(usegmt=True)
            lines = f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}\r\ndate: {date}\r\n".encode()
            self._first_lines[status] = lines
        return lines

    def refused(self, exchange: Exchange, error: HttpError) -> None:
        """A request was refused before it reached the handler."""
        if self._on_refused is not None:
            self._on_refused(exchange, error)

    def _sweep(self) -> None:
        self._first_lines.clear()
        now = self.loop.time()
        for connection in [c for c in self._connections if c.deadline < now]:
            connection.expire()
        self._sweeper = self.loop.call_later(self.limits.sweep_seconds, self._sweep)


ANY = ("", "0.0.0.0", "::")


def bind(address: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening socket on one address, or on all of them, IPv6 included, for one of `ANY`. Raises OSError.

    `shared`: other processes of this user may listen on it, too; the kernel deals connections out (SO_REUSEPORT).
    """
    if address not in ANY:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=1024, reuse_port=shared)
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024, reuse_port=shared
        )
    return socket.create_server(("", port), backlog=1024, reuse_port=shared)
