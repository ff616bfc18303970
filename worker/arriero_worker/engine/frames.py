"""Frames on the Unix socket between the public faces and the engine: a 4-byte little-endian length, then msgpack.

Plain functions and one class without I/O, shared by both ends; the messages are those of `messages`.
"""

from __future__ import annotations

import struct

import msgspec

from arriero_worker.engine.messages import FromEngine, ToEngine

MAX_FRAME = 256 * 1024 * 1024
"""Bytes of one message at most; a longer length means the peer is not speaking this protocol."""

_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


class FrameError(ValueError):
    """Bytes that are not a frame or not one of the messages; the connection is of no further use."""


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """One message as a whole frame. Raises FrameError if it is longer than MAX_FRAME."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise FrameError(f"a message of {len(body)} bytes is longer than a frame may be ({MAX_FRAME})")
    return _LENGTH.pack(len(body)) + body


def decode_to_engine(body: bytes | memoryview) -> ToEngine:
    """A frame's body, as the engine reads it. Raises FrameError."""
    try:
        return _to_engine.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FrameError(f"not a message to the engine: {error}") from error


def decode_from_engine(body: bytes | memoryview) -> FromEngine:
    """A frame's body, as the faces read it. Raises FrameError."""
    try:
        return _from_engine.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FrameError(f"not a message from the engine: {error}") from error


class FrameReader:
    """Cuts a byte stream into frame bodies, whatever way the stream was cut by the transport."""

    def __init__(self, max_frame: int = MAX_FRAME) -> None:
        self._buffer = bytearray()
        self._max_frame = max_frame

    @property
    def pending(self) -> int:
        """Bytes of a frame that is not whole yet; 0 between frames."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that became whole with `data`, in order. Raises FrameError on a length over the limit."""
        if self._buffer:
            self._buffer += data
            data = bytes(self._buffer) if self._whole() else b""
            if not data:
                return []
            self._buffer.clear()
        bodies = []
        at, end = 0, len(data)
        while end - at >= 4:
            (length,) = _LENGTH.unpack_from(data, at)
            self._check(length)
            if end - at - 4 < length:
                break
            bodies.append(data[at + 4 : at + 4 + length])
            at += 4 + length
        self._buffer += data[at:]
        return bodies

    def _whole(self) -> bool:
        """Whether the buffer holds a whole frame: a long one is not copied for each piece that arrives."""
        if len(self._buffer) < 4:
            return False
        (length,) = _LENGTH.unpack_from(self._buffer)
        self._check(length)
        return len(self._buffer) - 4 >= int(length)

    def _check(self, length: int) -> None:
        if length > self._max_frame:
            raise FrameError(f"a frame of {length} bytes is longer than allowed ({self._max_frame})")
