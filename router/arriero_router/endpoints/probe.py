"""How a replica without `Worker.Status` is: another engine, asked over HTTP whether it is ready."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import httptools

from arriero_router.core.replica import Endpoint, Report
from arriero_router.endpoints.channel import Security, unreachable
from arriero_router.endpoints.model import address
from arriero_router.endpoints.status import Listener

log = logging.getLogger("arriero.endpoints")

READY_PATH = "/health/ready"
_OTHER_PATH = "/health"
"""Asked where the first is not there."""
_MAX_ANSWER = 1 << 20
_NOT_THERE = (404, 405, 501)


@dataclass(frozen=True, slots=True)
class ProbeLimits:
    """Seconds."""

    interval: float = 1.0
    """Between two questions to a replica that is ready."""
    hurried: float = 0.25
    """Between two questions to one that is not: it may be any moment."""
    answer: float = 2.0
    """How long connecting and answering may take together."""


class _Answer:
    """What httptools reports of one response."""

    def __init__(self) -> None:
        self.begun = False
        """Whether its head is there, which says all that is asked."""
        self.complete = False
        self.kept = False
        """Whether the connection may be used again."""
        self.reason = b""
        self.parser = httptools.HttpResponseParser(self)

    def on_status(self, reason: bytes) -> None:
        self.reason += reason

    def on_headers_complete(self) -> None:
        self.begun = True

    def on_message_complete(self) -> None:
        self.complete = True
        self.kept = self.parser.should_keep_alive()


class _Refused(Exception):
    """The probe failed; the message says how."""


class Probe:
    """Asks one endpoint over a kept connection, and tells the listener when the answer changes. A connection that the
    replica closes between two questions is a reason to ask at once.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        listener: Listener,
        limits: ProbeLimits | None = None,
        path: str = READY_PATH,
        security: Security | None = None,
    ) -> None:
        """path: what answers 200 while the replica is ready; where it does not exist, /health is asked"""
        self._endpoint = endpoint
        self._listener = listener
        self._limits = limits or ProbeLimits()
        self._paths = (path,) if path == _OTHER_PATH else (path, _OTHER_PATH)
        self._security = security or Security()
        self._where = address(endpoint.host, endpoint.http_port)
        self._path = 0
        self._known: Report | str | None = None
        self._connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self) -> None:
        """Ask until cancelled."""
        try:
            while True:
                try:
                    async with asyncio.timeout(self._limits.answer):
                        self._told(await self._ask())
                except TimeoutError:
                    self._lost(f"no answer within {self._limits.answer:g} s")
                except (OSError, EOFError) as error:
                    self._lost(unreachable(error) if isinstance(error, OSError) else str(error))
                except (_Refused, httptools.HttpParserError) as error:
                    self._lost(f"no HTTP answer: {error}")
                await self._pause()
        finally:
            self._hang_up()

    async def _ask(self) -> Report:
        """Raises _Refused, HttpParserError, OSError or EOFError."""
        kept = self._connection is not None
        try:
            status, reason = await self._get()
        except (OSError, EOFError):
            if not kept:
                raise
            status, reason = await self._get()  # it may have closed the kept connection just then
        while status in _NOT_THERE and self._path + 1 < len(self._paths):
            self._path += 1
            status, reason = await self._get()
        ready = status == 200
        path = self._paths[self._path]
        if status in _NOT_THERE:
            self._path = 0  # another engine may be there the next time
        return Report(ready=ready, reason="" if ready else f"{path} answers {status} {reason}".rstrip())

    async def _get(self) -> tuple[int, str]:
        """One question; an answer that does not allow another one on the connection ends it."""
        done = False
        try:
            if self._connection is None:
                self._connection = await self._connect()
            reader, writer = self._connection
            path = self._paths[self._path]
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {self._where}\r\nUser-Agent: arriero-router\r\n\r\n".encode())
            answer = _Answer()
            received = 0
            while not answer.complete:
                data = await reader.read(1 << 16)
                received += len(data)
                if received > _MAX_ANSWER:
                    raise _Refused(f"more than {_MAX_ANSWER} bytes")
                if data:
                    answer.parser.feed_data(data)
                elif answer.begun:
                    break
                else:
                    raise EOFError("it hung up")
            done = answer.kept
            return int(answer.parser.get_status_code()), answer.reason.decode("latin-1")[:100]
        finally:
            if not done:
                self._hang_up()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port, context = self._endpoint.host, self._endpoint.http_port, self._security.http
        if context is None:
            return await asyncio.open_connection(host, port)
        return await asyncio.open_connection(
            host, port, ssl=context, server_hostname=self._security.server_name or None
        )

    async def _pause(self) -> None:
        """Until the next question is due; or shorter, if the connection of a ready replica ends."""
        ready = isinstance(self._known, Report) and self._known.ready
        seconds = self._limits.interval if ready else self._limits.hurried
        if self._connection is None or not ready:
            await asyncio.sleep(seconds)
            return
        try:
            async with asyncio.timeout(seconds):
                await self._connection[0].read(1)
        except TimeoutError:
            return
        except OSError:
            pass
        # It was closed, or sent what nobody asked for: not a connection to ask on.
        self._hang_up()

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection[1].transport.abort()
            self._connection = None

    def _told(self, report: Report) -> None:
        if report == self._known:
            return
        log.info("replica %s at %s: %s", self._endpoint.name, self._where, report.reason or "ready")
        self._known = report
        self._listener.told(self._endpoint.name, report)

    def _lost(self, reason: str) -> None:
        if not isinstance(self._known, str):
            log.warning("replica %s: lost sight of it at %s: %s", self._endpoint.name, self._where, reason)
            self._listener.lost(self._endpoint.name, reason)
        self._known = reason
