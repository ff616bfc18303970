"""A network inside one event loop: every delivery comes some turns of the loop late, in an order that a seed decides.

What takes a coincidence of a few microseconds on real sockets (an answer's end, another client's reset and a third
one's request in one turn of the loop) happens here some times a second. A pair of connected transports keeps TCP's
promises and no others: bytes in order, in pieces of any size; an end behind the bytes before it; a reset that overtakes
what was not read.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Mischief:
    """Probabilities of what a network does by itself."""

    refused: float = 0.0
    """A connection is refused."""
    stillborn: float = 0.0
    """It is made, and reset at once."""
    reset: float = 0.0
    """It is reset, whenever a piece arrives."""
    most_turns: int = 3
    """That a delivery may be late."""
    ports: set[int] = field(default_factory=set)
    """Of the servers whose connections are treated so; any other is reliable, if late."""


class Wire(asyncio.Transport):
    """One end of a connection."""

    def __init__(self, loop: Weather, protocol: asyncio.BaseProtocol, reset: float) -> None:
        super().__init__()
        self.loop, self.protocol, self.peer = loop, protocol, self
        self._reset = reset
        self._coming: deque[bytes | None] = deque()
        """Not delivered yet; None: the other side's end."""
        self._moving = False
        self._reading = True
        self._closing = self._over = self._ended = False
        self._high = 65536
        self._blocked = False

    def begin(self) -> None:
        self.protocol.connection_made(self)

    # -- what an application may call

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or self._over or self._ended:
            return
        self.peer._arrive(bytes(data))
        if not self._blocked and self.get_write_buffer_size() > self._high:
            self._blocked = True
            self.protocol.pause_writing()  # type: ignore[attr-defined]

    def write_eof(self) -> None:
        if not self._ended and not self._over:
            self._ended = True
            self.peer._arrive(None)

    def can_write_eof(self) -> bool:
        return True

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self.write_eof()
            self.loop.call_soon(self._lose, None)

    def abort(self) -> None:
        if not self._over:
            self._closing = True
            self.loop.call_soon(self._lose, None)
            self.loop.later(self.peer._break)

    def is_closing(self) -> bool:
        return self._closing or self._over

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        self._move()

    def is_reading(self) -> bool:
        return self._reading and not self._closing

    def get_write_buffer_size(self) -> int:
        return sum(len(piece) for piece in self.peer._coming if piece is not None)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = 65536 if high is None else high

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name == "peername" else default

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol

    # -- what arrives

    def _arrive(self, piece: bytes | None) -> None:
        if not self._over:
            self._coming.append(piece)
            self._move()

    def _move(self) -> None:
        if not self._moving and self._coming and self._reading:
            self._moving = True
            self.loop.later(self._deliver)

    def _deliver(self) -> None:
        self._moving = False
        if self._over or self._closing or not self._reading or not self._coming:
            return
        rng = self.loop.rng
        if rng.random() < self._reset:
            self.peer.abort()
            self._break()
            return
        piece = self._coming.popleft()
        while piece is not None and self._coming and self._coming[0] is not None and rng.random() < 0.5:
            piece += self._coming.popleft() or b""
        if piece is not None and len(piece) > 1 and rng.random() < 0.2:
            at = rng.randrange(1, len(piece))
            self._coming.appendleft(piece[at:])
            piece = piece[:at]
        if piece is None:
            if not self.protocol.eof_received():  # type: ignore[attr-defined]
                self.close()
        else:
            self.protocol.data_received(piece)  # type: ignore[attr-defined]
        peer = self.peer
        if peer._blocked and peer.get_write_buffer_size() <= peer._high // 4 and not peer._over:
            peer._blocked = False
            peer.protocol.resume_writing()  # type: ignore[attr-defined]
        self._move()

    def _break(self) -> None:
        """The other side's reset is here."""
        if not self._over and not self._closing:
            self._closing = True
            self.loop.call_soon(self._lose, ConnectionResetError("reset by peer"))

    def _lose(self, error: Exception | None) -> None:
        if not self._over:
            self._over = True
            self._coming.clear()
            self.protocol.connection_lost(error)


class Weather(asyncio.SelectorEventLoop):
    """An event loop whose TCP connections are `Wire`s."""

    def __init__(self, rng: random.Random, mischief: Mischief) -> None:
        super().__init__()
        self.rng, self.mischief = rng, mischief
        self._servers: dict[int, Callable[[], asyncio.BaseProtocol]] = {}

    def later(self, call: Callable[[], None]) -> None:
        """Some turns from now."""
        self._turn(self.rng.randint(0, self.mischief.most_turns), call)

    def _turn(self, turns: int, call: Callable[[], None]) -> None:
        if turns:
            self.call_soon(self._turn, turns - 1, call)
        else:
            self.call_soon(call)

    async def create_server(self, factory: Any, *_: Any, sock: socket.socket, **__: Any) -> Any:
        """Listen on the port of a bound socket."""
        self._servers[sock.getsockname()[1]] = factory
        return sock  # which can be closed, like a server

    def serve(self, port: int, factory: Callable[[], asyncio.BaseProtocol]) -> None:
        """Listen on a port that need not be free outside."""
        self._servers[port] = factory

    async def create_connection(self, factory: Any, host: Any = None, port: Any = None, **_: Any) -> Any:
        odd = port in self.mischief.ports
        for _turn in range(self.rng.randint(0, self.mischief.most_turns)):
            await asyncio.sleep(0)
        if port not in self._servers or (odd and self.rng.random() < self.mischief.refused):
            raise ConnectionRefusedError(111, "Connection refused")
        reset = self.mischief.reset if odd else 0.0
        far = Wire(self, self._servers[port](), reset)
        near = Wire(self, factory(), reset)
        far.peer, near.peer = near, far
        far.begin()
        near.begin()
        if odd and self.rng.random() < self.mischief.stillborn:
            far.abort()
        waiter: asyncio.Future[None] = self.create_future()
        self.later(lambda: waiter.done() or waiter.set_result(None))  # type: ignore[arg-type,return-value]
        try:
            await waiter
        except BaseException:
            near.abort()
            raise
        return near, near.protocol
