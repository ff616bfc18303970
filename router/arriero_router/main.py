"""One router process: signals in, exit status out."""

from __future__ import annotations

import asyncio
import logging
import os
import signal

import uvloop

from arriero_faces.leave import Leave
from arriero_router.config import Config, ConfigError, changes, load_config
from arriero_router.observe.siblings import Siblings
from arriero_router.router import Router

log = logging.getLogger("arriero.router")

EXIT_USAGE = 2


def run_router(path: str, config: Config, siblings: Siblings | None = None) -> int:
    """Serve until told to stop; the process's exit status.

    SIGTERM and SIGINT drain: running requests may end within `drainSeconds`, and for `leaveSeconds` of them a router
    that got SIGTERM takes new ones; a second one of the same kind stops at once. SIGHUP reads the configuration again
    and reopens the access log. The status is 0, or 1 where the faces could not be opened.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(path, config, siblings))


async def _serve(path: str, config: Config, siblings: Siblings | None) -> int:
    leave = Leave()
    try:
        router = Router(config, siblings, os.environ.get("KUBECONFIG", ""))
    except ConfigError as error:
        log.error("%s", error)
        return EXIT_USAGE
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _reload, router, path)
    try:
        await router.start()
    except (OSError, ConfigError) as error:
        log.error("cannot start: %s", error)
        await router.stop()
        return EXIT_USAGE if isinstance(error, ConfigError) else 1
    asked = await leave.asked()
    # Nobody deals out traffic to a router that is stopped from a terminal.
    window = router.config.leave_seconds if asked == signal.SIGTERM else 0.0
    await leave.drain(router.drain(router.config.drain_seconds, window))
    await router.stop()
    log.info("stopped")
    return 0


def _reload(router: Router, path: str) -> None:
    router.reopen_log()
    try:
        fresh = load_config(path)
    except ConfigError as error:
        log.error("the configuration stays as it was: %s", error)
        return
    change = changes(router.config, fresh)
    for sentence in change.refused:
        log.warning("%s", sentence)
    router.reload(change.config)
    log.info("reloaded %s", path)
