"""The processes of one router ask each other for their metrics, so that whichever is scraped tells those of all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from arriero_router.observe.metrics import merged

log = logging.getLogger("arriero.router")

_PATIENCE = 1.0


class Siblings:
    """Each process answers on a Unix socket in a folder that they share: whoever connects gets its metrics."""

    def __init__(self, folder: Path, index: int, count: int) -> None:
        self._folder, self._index, self._count = folder, index, count
        self._server: asyncio.Server | None = None

    async def start(self, text: Callable[[], bytes]) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(text())
            try:
                await writer.drain()
            except ConnectionError:
                pass
            writer.close()

        path = self._path(self._index)
        path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(answer, path)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    async def metrics(self, own: bytes) -> bytes:
        """Those of all; of a process that does not answer (it is just starting again) nothing is counted."""
        others = [index for index in range(self._count) if index != self._index]
        texts = await asyncio.gather(*(self._ask(index) for index in others))
        return merged([own.decode(), *filter(None, texts)])

    async def _ask(self, index: int) -> str:
        try:
            async with asyncio.timeout(_PATIENCE):
                reader, writer = await asyncio.open_unix_connection(self._path(index), limit=1 << 24)
                try:
                    return (await reader.read(-1)).decode()
                finally:
                    writer.close()
        except (OSError, TimeoutError) as error:
            log.warning("process %d does not tell its metrics: %s", index, error or "no answer in time")
            return ""

    def _path(self, index: int) -> Path:
        return socket_of(self._folder, index)


def socket_of(folder: Path, index: int) -> Path:
    """The socket of one process; it is there once that process serves."""
    return folder / f"{index}.sock"
