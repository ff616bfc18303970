"""How a program with public faces is asked to leave: SIGTERM or SIGINT drains, a second of the same kind stops now."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any


class Leave:
    """Takes over both signals of the running loop. Await `asked`, then `drain`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._asked, self._now = asyncio.Event(), asyncio.Event()
        self._seen: set[int] = set()
        self._first = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._signalled, number)

    async def asked(self) -> int:
        """Returns the signal's number when the first one has come."""
        await self._asked.wait()
        return self._first

    async def drain(self, draining: Coroutine[Any, Any, bool]) -> None:
        """Returns when it is over, or at once when told to stop now."""
        drain = self._loop.create_task(draining)
        stop = self._loop.create_task(self._now.wait())
        await asyncio.wait((drain, stop), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        drain.cancel()

    def _signalled(self, number: int) -> None:
        # A terminal's Ctrl-C reaches every process of the group and a supervisor may add its SIGTERM: that is one wish.
        if number in self._seen:
            self._now.set()
        self._first = self._first or number
        self._seen.add(number)
        self._asked.set()
