"""The least of an HTTP/1.1 client that streams: a load generator on the same cores must not be what is measured."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

_HEAD_LIMIT = 1 << 20


class BrokenAnswer(ConnectionError):
    """The server closed the connection, or spoke something else than HTTP, before the answer ended."""


class Connection:
    """One connection, for one request at a time; opened when first needed and again after the server closed it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._path = parts.hostname or "", parts.path.rstrip("/")
        self._tls = parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._authority = parts.netloc.rpartition("@")[2]
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.status = 0
        """Of the last answer."""

    async def post(self, path: str, body: bytes) -> AsyncIterator[bytes]:
        """Send JSON; yields the answer's body as it comes. Left early, the connection is closed.

        Raises OSError (BrokenAnswer among them).
        """
        fresh = self._writer is None
        try:
            chunks = await self._exchange(path, body)
        except (BrokenAnswer, ConnectionResetError, BrokenPipeError):
            await self.close()
            if fresh:
                raise
            # An idle connection may be closed by the server at any time: that says nothing about this request.
            chunks = await self._exchange(path, body)
        complete = False
        try:
            async for chunk in chunks:
                yield chunk
            complete = True
        finally:
            if not complete:
                await self.close()

    async def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
        self._reader = self._writer = None

    async def _exchange(self, path: str, body: bytes) -> AsyncIterator[bytes]:
        """Send the request and read the answer's head; returns its body."""
        if self._reader is None or self._writer is None:
            context = ssl.create_default_context() if self._tls else None
            self._reader, self._writer = await asyncio.open_connection(
                self._host, self._port, ssl=context, limit=_HEAD_LIMIT
            )
        head = (
            f"POST {self._path}{path} HTTP/1.1\r\nHost: {self._authority}\r\nContent-Type: application/json\r\n"
            f"Accept: text/event-stream\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode("latin-1") + body)
        await self._writer.drain()
        status, headers = await self._read_head(self._reader)
        self.status = status
        keep = headers.get(b"connection", b"").lower() != b"close"
        if b"chunked" in headers.get(b"transfer-encoding", b"").lower():
            return self._chunked(self._reader, keep)
        if b"content-length" in headers:
            return self._sized(self._reader, int(headers[b"content-length"]), keep)
        return self._until_closed(self._reader)

    async def _read_head(self, reader: asyncio.StreamReader) -> tuple[int, dict[bytes, bytes]]:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
                raise BrokenAnswer("the server closed the connection") from error
            first, *lines = head[:-4].split(b"\r\n")
            words = first.split(None, 2)
            if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
                raise BrokenAnswer("the server does not speak HTTP/1.1")
            if int(words[1]) >= 200:
                pairs = (line.partition(b":") for line in lines)
                return int(words[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}

    async def _chunked(self, reader: asyncio.StreamReader, keep: bool) -> AsyncIterator[bytes]:
        try:
            while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
                yield (await reader.readexactly(size + 2))[:-2]
            while await reader.readuntil(b"\r\n") != b"\r\n":
                pass
        except (asyncio.IncompleteReadError, ValueError) as error:
            raise BrokenAnswer("the answer broke off") from error
        if not keep:
            await self.close()

    async def _sized(self, reader: asyncio.StreamReader, size: int, keep: bool) -> AsyncIterator[bytes]:
        try:
            yield await reader.readexactly(size)
        except asyncio.IncompleteReadError as error:
            raise BrokenAnswer("the answer broke off") from error
        if not keep:
            await self.close()

    async def _until_closed(self, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        while chunk := await reader.read(65536):
            yield chunk
        await self.close()
