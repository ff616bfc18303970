"""One operator process: waits for its turn, leads, ends."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable

import uvloop

from arriero_operator.runtime.api import Api, NoCluster, connected
from arriero_operator.runtime.app import App
from arriero_operator.runtime.config import Config, own_namespace
from arriero_operator.runtime.election import Election, LeadershipLost
from arriero_operator.runtime.web import serving

log = logging.getLogger("arriero.operator")

EXIT_FAILED, EXIT_USAGE = 1, 2


def run_operator(config: Config, host: str, port: int) -> int:
    """Run until told to stop (0), or until it fails (1). 2: no cluster, or no port."""
    # What is read is JSON, which has no cycles: there is less to collect than the defaults look for.
    gc.set_threshold(20_000, 10, 5)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(config, host, port))


class _Operator:
    """What health checks ask."""

    def __init__(self, api: Api, config: Config, take_signals: Callable[[], None]) -> None:
        self.identity = os.environ.get("ARRIERO_POD_NAME") or f"{socket.gethostname()}-{os.getpid()}"
        self.election = Election(api, own_namespace(), self.identity)
        self._api = api
        self._config = config
        self._take_signals = take_signals
        self._app: App | None = None

    def live(self) -> str:
        return self._app.stuck if self._app else ""

    def ready(self) -> str:
        return self.election.trouble or (self._app.trouble if self._app else "")

    async def lead(self) -> None:
        """Lead whenever it is this operator's turn; what it knew is forgotten with each lease that it loses."""
        while True:
            try:
                await self.election.lead(self.work)
                return
            except LeadershipLost as error:
                log.error("%s", error)

    async def work(self) -> None:
        self._app = App(self._api, self._config, self.identity, self._take_signals)
        try:
            await self._app.run()
        finally:
            await self._app.close()
            self._app = None


async def _run(config: Config, host: str, port: int) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def take_signals() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)

    take_signals()
    try:
        async with connected() as api:
            operator = _Operator(api, config, take_signals)
            async with serving(host, port, operator.live, operator.ready) as bound:
                log.info("%s serves health and metrics on port %d", operator.identity, bound)
                return await _until(stop, operator)
    except NoCluster as error:
        log.error("%s", error)
    except OSError as error:
        log.error("port %d cannot be opened: %s", port, error)
    return EXIT_USAGE


async def _until(stop: asyncio.Event, operator: _Operator) -> int:
    leading = asyncio.create_task(operator.lead())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait((leading, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    ended = leading.done()
    leading.cancel()
    (result,) = await asyncio.gather(leading, return_exceptions=True)
    if ended or (isinstance(result, Exception) and not isinstance(result, asyncio.CancelledError)):
        log.error("the operator ended by itself", exc_info=result if isinstance(result, BaseException) else None)
    else:
        log.info("stopped")
        return 0
    return EXIT_FAILED
