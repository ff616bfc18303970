"""The operator's own HTTP port: health and metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import generate_latest

Check = Callable[[], str]
"""Empty: well; else what is wrong, in one sentence."""


@asynccontextmanager
async def serving(host: str, port: int, live: Check, ready: Check) -> AsyncIterator[int]:
    """Serve until the block ends; the port. Raises OSError where it cannot be opened."""

    async def answer(check: Check) -> web.Response:
        trouble = check()
        return web.Response(text=f"{trouble or 'ok'}\n", status=503 if trouble else 200)

    async def liveness(_: web.Request) -> web.Response:
        return await answer(live)

    async def readiness(_: web.Request) -> web.Response:
        return await answer(ready)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    app = web.Application()
    app.add_routes(
        [web.get("/health/live", liveness), web.get("/health/ready", readiness), web.get("/metrics", metrics)]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
