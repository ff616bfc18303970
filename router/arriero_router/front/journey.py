"""One request's way over the replicas: asked, held, sent, replayed, ended. The same for both faces."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arriero_faces.http.errors import HttpError
from arriero_router.core.ask import Ask
from arriero_router.core.dispatch import Grant, Refusal
from arriero_router.core.replay import Attempts, Break

if TYPE_CHECKING:
    from arriero_router.served import Served


_STALE = 8
"""Kept connections that may turn out to be closed, for one request."""


@dataclass(frozen=True, slots=True)
class HoldSettings:
    """Times in seconds."""

    after: float = 1.0
    """A waiting stream is begun after so long."""
    every: float = 10.0
    """Between two signs of life to a client that waits; 0: none."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one attempt ended."""

    kind: Break | None
    """None: the client has the whole answer."""
    error: str = ""
    gained: bool = False
    """It brought tokens that were not there before."""
    resumable: bool = True
    """What the client has can be continued."""
    untouched: bool = False
    """It broke on a kept connection that had been closed before: nothing was tried."""


class Journey:
    """`run` until it returns or raises; the request is then off every replica."""

    __slots__ = ("_future", "_loop", "ask", "attempts", "grant", "held_seconds", "last_error", "served")

    def __init__(self, served: Served, ask: Ask) -> None:
        self.served = served
        self.ask = ask
        self.attempts = Attempts(served.replay)
        self.held_seconds = 0.0
        self.last_error = ""
        self.grant: Grant | None = None
        """The place of the attempt under way, or of the last one."""
        self._future: asyncio.Future[Grant | Refusal] | None = None
        self._loop = served.loop

    async def run(
        self,
        attempt: Callable[[Grant], Awaitable[Outcome]],
        hold: HoldSettings,
        on_wait: Callable[[], None] | None = None,
    ) -> Outcome:
        """Make attempts until one is the last; returns its outcome. `on_wait` tells a waiting client that it is not
        forgotten.

        Raises HttpError: 429 where no more requests are held, 503 where the wait was over.
        """
        dispatcher = self.served.dispatcher
        stale = 0
        while True:
            asked = dispatcher.ask(self.ask, self)
            if asked is None:
                asked = await self._wait(hold, on_wait)
            if isinstance(asked, Refusal):
                raise self._refused(asked)
            self.grant = grant = asked
            self.attempts.begin()
            outcome = None
            try:
                outcome = await attempt(grant)
            finally:
                # Before its place is free for the next.
                if outcome is not None:
                    self._judge(grant, outcome)
                dispatcher.release(grant)
            if outcome.kind is None:
                return outcome
            if outcome.untouched and stale < _STALE:
                stale += 1
                self.attempts.made -= 1
                continue
            self.served.metrics.broke(outcome.kind)
            self.last_error = outcome.error
            if outcome.kind.untried and time.monotonic() >= self.ask.deadline:
                return outcome
            if not self.attempts.broke(outcome.kind, gained=outcome.gained, resumable=outcome.resumable):
                return outcome
            self.ask.avoid.add(grant.replica.name)
            if not outcome.kind.untried:
                self.served.replaying(self, outcome)
                self.ask.begun = True
                self.ask.deadline = max(self.ask.deadline, time.monotonic() + self.served.hold_seconds)

    def _judge(self, grant: Grant, outcome: Outcome) -> None:
        """What the attempt says of the replica."""
        pool = self.served.pool
        if outcome.kind is None or outcome.kind is Break.CLIENT:
            pool.succeeded(grant.replica)
        elif not outcome.untouched:
            if outcome.kind is not Break.FAILED:
                pool.shun(grant.replica)
            if outcome.kind.is_fault:
                pool.failed(grant.replica)

    async def _wait(self, hold: HoldSettings, on_wait: Callable[[], None] | None) -> Grant | Refusal:
        began = time.monotonic()
        if self._future is None:
            self._future = self._loop.create_future()
        future = self._future
        pause = hold.after if on_wait is not None and hold.every else None
        try:
            while not future.done():
                # Not `await future`: cancelling this task would cancel it, and a grant made just then would be lost.
                await asyncio.wait((future,), timeout=pause)
                if on_wait is not None and not future.done():
                    on_wait()
                    pause = hold.every
            return future.result()
        except BaseException:
            if future.done() and isinstance(granted := future.result(), Grant):
                self.served.dispatcher.release(granted)
            else:
                self.served.dispatcher.withdraw(self)
            raise
        finally:
            self._future = None
            waited = time.monotonic() - began
            self.held_seconds += waited
            self.served.metrics.held.observe(waited)

    def _refused(self, refusal: Refusal) -> HttpError:
        after = f" (it had broken before: {self.last_error})" if self.last_error else ""
        if refusal.full:
            return HttpError(429, refusal.message + after, code="queue_full", retry_after=refusal.retry_after)
        return HttpError(503, refusal.message + after, code="no_replica", retry_after=refusal.retry_after)

    # -- Waiter

    def granted(self, grant: Grant) -> None:
        self._resolve(grant)

    def refused(self, refusal: Refusal) -> None:
        self._resolve(refusal)

    def _resolve(self, result: Grant | Refusal) -> None:
        if self._future is None:
            # Told within `Dispatcher.ask`, before the wait began.
            self._future = self._loop.create_future()
        self._future.set_result(result)
