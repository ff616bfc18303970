"""HTTP as a test sees it: bytes of a socket into responses and events."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import Any


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    try:
        while data := connection.recv(65536):
            parts.append(data)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def parse_response(data: bytes, method: str = "GET") -> Response:
    """One response from the bytes of a connection that was closed behind it; a cut body ends in `<cut>`."""
    while data.startswith(b"HTTP/1.1 100 "):
        data = data.split(b"\r\n\r\n", 1)[1]
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
    if headers.get("transfer-encoding") == "chunked" and method != "HEAD":
        body = dechunk(body)
    return Response(int(lines[0].split()[1]), headers, body)


def dechunk(data: bytes) -> bytes:
    """A chunked body; `<cut>` is appended where the last chunk is missing."""
    out = []
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            return b"".join(out)
        out.append(data[:length])
        data = data[length + 2 :]
    return b"".join([*out, b"<cut>"])


def events(body: bytes) -> list[Any]:
    """The data of server-sent events; comments as ("comment", text)."""
    out: list[Any] = []
    for block in body.decode().split("\n\n"):
        if block.startswith("data: "):
            text = block[6:]
            out.append(text if text == "[DONE]" else json.loads(text))
        elif block.startswith(": "):
            out.append(("comment", block[2:]))
        elif block:
            out.append(block)
    return out
