"""The engine's end of the Unix socket to the faces. One connection at a time: a new one replaces the old, whose
requests are aborted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
from collections.abc import Callable

from arriero_worker.engine.frames import FrameError, FrameReader, decode_to_engine, encode_frame
from arriero_worker.engine.messages import FromEngine, ToEngine

log = logging.getLogger("arriero.engine")

_STALL = 30.0  # seconds after which faces that do not read are cut off


class EngineServer:
    """Reads in a thread of its own, which hands messages to `receive`; `send` is called by the engine's thread."""

    def __init__(
        self, path: str, receive: Callable[[ToEngine], None], connected: Callable[[], None], gone: Callable[[], None]
    ) -> None:
        """`connected` and `gone` tell that faces came and went. Raises OSError when the socket cannot be bound."""
        self._receive, self._connected, self._gone = receive, connected, gone
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(1)
        self._connection: socket.socket | None = None
        threading.Thread(target=self._serve, name="engine-socket", daemon=True).start()

    def send(self, message: FromEngine) -> None:
        """Faces that are away miss it: they hear the status when they connect."""
        connection = self._connection
        if connection is None:
            return
        data = memoryview(encode_frame(message))
        try:
            while data:
                try:
                    data = data[connection.send(data) :]
                except BlockingIOError:
                    if not select.select([], [connection], [], _STALL)[1]:
                        log.error("the faces did not read for %g s: cutting them off", _STALL)
                        connection.shutdown(socket.SHUT_RDWR)
                        return
        except OSError:
            pass  # the reading side sees the end and tells

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            self._connection = connection
            self._connected()
            self._read(connection)
            self._connection = None
            connection.close()
            self._gone()

    def _read(self, connection: socket.socket) -> None:
        reader = FrameReader()
        while True:
            select.select([connection], [], [])
            try:
                data = connection.recv(1 << 20)
            except OSError:
                return
            if not data:
                return
            try:
                for body in reader.feed(data):
                    self._receive(decode_to_engine(body))
            except FrameError as error:
                log.error("the faces sent what is no message: %s", error)
                return
