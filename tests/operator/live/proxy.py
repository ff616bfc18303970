"""The test's own hands on the line between an operator and the API server: each call passes through here.

A fault is a coroutine in the call's way: it may look on, wait, answer by itself, raise Cut, or do something before or
after `forward`. So the operator needs no hook for any test.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
import time
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import trustme
from aiohttp import web

T = TypeVar("T")
Forward = Callable[[], Awaitable[web.StreamResponse]]
"""Ask the API server and give its answer; that of a watch once it has ended."""


@dataclass(slots=True)
class Call:
    """One request of the operator."""

    method: str
    path: str
    body: bytes
    at: float
    """time.monotonic() when it came."""
    watch: bool = False
    token: str = ""
    status: int = 0
    """The API server's answer; 0: there was none yet, or the operator did not get it."""
    namespace: str = ""
    plural: str = ""
    name: str = ""
    subresource: str = ""

    def __post_init__(self) -> None:
        parts = self.path.strip("/").split("/")
        rest = parts[2:] if parts[0] == "api" else parts[3:]
        if rest[:1] == ["namespaces"] and len(rest) > 2:
            self.namespace, rest = rest[1], rest[2:]
        self.plural, self.name, self.subresource = [*rest, "", "", ""][:3]

    @property
    def writes(self) -> bool:
        """Whether it changes something of a deployment: a lease is the operator's own affair."""
        return self.method != "GET" and self.plural != "leases"

    def __str__(self) -> str:
        subresource = f"/{self.subresource}" if self.subresource else ""
        return f"{self.method} {self.plural}/{self.name}{subresource}"


Fault = Callable[[Call, Forward], Awaitable[web.StreamResponse]]


class Cut(Exception):
    """The connection breaks, without an answer."""


def refusal(status: int, reason: str, message: str = "the test says no", **headers: str) -> web.Response:
    """What the API server says when it will not."""
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "reason": reason}
    return web.json_response({**body, "code": status}, status=status, headers=headers)


async def through(_: Call, forward: Forward) -> web.StreamResponse:
    """No fault."""
    return await forward()


class ApiProxy:
    """HTTP and HTTPS in, HTTPS to the API server, in a thread of its own. `fault` may be set at any time."""

    def __init__(self, server: str, authority: Path) -> None:
        self.calls: list[Call] = []
        self.fault: Fault = through
        self._server = server
        self._tls = ssl.create_default_context(cafile=str(authority))
        own = trustme.CA()
        self.authority: str = own.cert_pem.bytes().decode()
        self._own_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        own.issue_cert("127.0.0.1").configure_cert(self._own_tls)
        self._loop = asyncio.new_event_loop()
        self._transports: weakref.WeakSet[asyncio.BaseTransport] = weakref.WeakSet()  # of both sides
        self._silent: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="api-proxy", daemon=True)
        self._thread.start()
        self.port = self._do(self._start())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._do(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """Break every connection that there is now."""
        self._loop.call_soon_threadsafe(self._abort)

    def part(self) -> None:
        """From now on nothing passes and nobody is told: packets are lost, connections stay."""

        def begin() -> None:
            self._silent = asyncio.Event()

        self._loop.call_soon_threadsafe(begin)

    def heal(self) -> None:
        """New connections pass again; what was on the way is lost with its connection."""

        def end() -> None:
            self._abort()
            if self._silent is not None:
                self._silent.set()
                self._silent = None

        self._loop.call_soon_threadsafe(end)

    def writes(self, namespace: str = "", since: int = 0) -> list[Call]:
        """Writes that the API server took, of one namespace or of all."""
        return [
            call
            for call in self.calls[since:]
            if call.writes and 200 <= call.status < 300 and namespace in ("", call.namespace)
        ]

    def counts(self, namespace: str = "", since: int = 0) -> Counter[str]:
        return Counter(f"{call.method} {call.plural}" for call in self.writes(namespace, since))

    def call_soon(self, work: Callable[[], object]) -> None:
        """Do something where faults run."""
        self._loop.call_soon_threadsafe(work)

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        done: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return done.result(20.0)

    async def _start(self) -> int:
        connector = aiohttp.TCPConnector(ssl=self._tls, limit=0)
        self._upstream = aiohttp.ClientSession(
            connector=connector, auto_decompress=False, timeout=aiohttp.ClientTimeout(total=None), trust_env=False
        )
        app = web.Application(client_max_size=32 << 20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._own_tls).start()
        (_, port), (_, self.tls_port) = self._runner.addresses
        return int(port)

    async def _stop(self) -> None:
        for site in [*self._runner.sites]:
            await site.stop()
        self._abort()
        await self._runner.cleanup()
        await self._upstream.close()
        self._abort()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        for _ in range(5):  # aborted transports close in the loop's next turns
            await asyncio.sleep(0.01)

    def _abort(self) -> None:
        for transport in [*self._transports]:
            transport.abort()  # type: ignore[attr-defined] # they are all of the kind that has it
        self._transports.clear()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        transport = request.transport
        if transport is None:
            raise web.HTTPServiceUnavailable
        self._transports.add(transport)
        body = await request.read()
        token = request.headers.get("Authorization", "").partition(" ")[2]
        call = Call(request.method, request.path, body, time.monotonic(), "watch" in request.query, token)
        self.calls.append(call)
        await self._silence()
        try:
            return await self.fault(call, lambda: self._forward(request, call))
        except (Cut, aiohttp.ClientError, OSError):
            # An API server that is away looks to the operator as it is: nobody is there.
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=502)

    async def _silence(self) -> None:
        if (silent := self._silent) is not None:
            await silent.wait()
            raise ConnectionResetError

    async def _forward(self, request: web.Request, call: Call) -> web.StreamResponse:
        headers = {
            name: value for name in ("Authorization", "Accept", "Accept-Encoding", "Content-Type", "User-Agent")
            if (value := request.headers.get(name))
        }  # fmt: skip
        url = f"{self._server}{request.raw_path}"
        asked = self._upstream.request(
            call.method, url, headers=headers, data=call.body or None, skip_auto_headers=("Accept-Encoding",)
        )
        async with asked as answer:
            if answer.connection is not None and answer.connection.transport is not None:
                self._transports.add(answer.connection.transport)
            if call.watch and answer.status == 200:
                call.status = answer.status
                return await self._follow(request, answer)
            text = await answer.read()
        await self._silence()
        call.status = answer.status
        kept = {
            n: answer.headers[n] for n in ("Content-Type", "Content-Encoding", "Retry-After") if n in answer.headers
        }
        return web.Response(body=text, status=answer.status, headers=kept)

    async def _follow(self, request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        kept = {n: answer.headers[n] for n in ("Content-Type", "Content-Encoding") if n in answer.headers}
        response = web.StreamResponse(headers=kept)
        await response.prepare(request)
        async for chunk in answer.content.iter_any():
            await self._silence()
            await response.write(chunk)
        await response.write_eof()
        return response


def json_of(call: Call) -> Any:
    """The body that the operator sent."""
    return json.loads(call.body) if call.body else None
