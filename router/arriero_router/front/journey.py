"""One request's way over the replicas: asked, held, sent, replayed, ended. The same for both faces."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

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


class Traveller(Protocol):
    """Who is on a journey. Hears of `attempt`, any number of times, and then, unless it leaves before, once of `over`
    or `turned_away`, by when the request is off every replica.
    """

    def attempt(self, grant: Grant) -> None:
        """Send the request there; tell `Journey.ended` how it went, now or later."""
        ...

    def waiting(self) -> None:
        """It waits for a replica, and its client has heard nothing for a while."""
        ...

    def over(self, outcome: Outcome) -> None:
        """No further attempt is made."""
        ...

    def turned_away(self, error: HttpError) -> None:
        """429 where no more requests are held, 503 where the wait was over."""
        ...


class Journey:
    """`start` once, or `run` for coroutines."""

    __slots__ = (
        "_began_to_wait",
        "_granted",
        "_hold",
        "_loop",
        "_on_replica",
        "_stale",
        "_timer",
        "_traveller",
        "ask",
        "attempts",
        "grant",
        "held_seconds",
        "last_error",
        "served",
    )

    def __init__(self, served: Served, ask: Ask) -> None:
        self.served = served
        self.ask = ask
        self.attempts = Attempts(served.replay)
        self.held_seconds = 0.0
        self.last_error = ""
        self.grant: Grant | None = None
        """The place of the attempt under way, or of the last one."""
        self._on_replica = False
        """`grant` is to be released."""
        self._stale = 0
        self._traveller: Traveller | None = None
        """None: before the start, and when it is over."""
        self._hold: HoldSettings | None = None
        """Of one whose client is to hear that it waits."""
        self._began_to_wait = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._granted: asyncio.Handle | None = None
        """What a waiting request was told, on its way."""
        self._loop = served.loop

    def start(self, traveller: Traveller, hold: HoldSettings | None = None) -> None:
        """Make attempts until one is the last. `hold`: tell the traveller when it waits."""
        self._traveller = traveller
        self._hold = hold if hold is not None and hold.every else None
        self._go()

    def leave(self) -> None:
        """The client is gone, or its request has failed here: the traveller hears nothing any more."""
        if self._traveller is None:
            return
        self._traveller = None
        if self._granted is not None:
            self._granted.cancel()
        elif self._began_to_wait:
            self.served.dispatcher.withdraw(self)
        self._waited()
        self._release()

    def ended(self, outcome: Outcome) -> None:
        """The attempt under way is over."""
        traveller, grant, served = self._traveller, self.grant, self.served
        if traveller is None or grant is None or not self._on_replica:
            return
        kind = outcome.kind
        self._judge(grant, outcome)  # before its place is free for the next
        self._release()
        if kind is None:
            self._traveller = None
            traveller.over(outcome)
            return
        if outcome.untouched and self._stale < _STALE:
            self._stale += 1
            self.attempts.made -= 1
            self._go()
            return
        served.metrics.broke(kind)
        self.last_error = outcome.error
        late = kind.untried and time.monotonic() >= self.ask.deadline
        if late or not self.attempts.broke(kind, gained=outcome.gained, resumable=outcome.resumable):
            self._traveller = None
            traveller.over(outcome)
            return
        self.ask.avoid.add(grant.replica.name)
        if not kind.untried:
            served.replaying(self, outcome)
            self.ask.begun = True
            self.ask.deadline = max(self.ask.deadline, time.monotonic() + served.hold_seconds)
        self._go()

    async def run(self, attempt: Callable[[Grant], Awaitable[Outcome]], hold: HoldSettings) -> Outcome:
        """Make attempts until one is the last; returns its outcome. Raises HttpError: see `Traveller.turned_away`."""
        walk = _Walk(self._loop)
        try:
            self.start(walk, hold)
            while True:
                step = await walk.step()
                if isinstance(step, Outcome):
                    return step
                if isinstance(step, HttpError):
                    raise step
                self.ended(await attempt(step))
        except BaseException:
            self.leave()
            raise

    # -- inside

    def _go(self) -> None:
        """Ask for a place on a replica."""
        asked = self.served.dispatcher.ask(self.ask, self)
        if asked is not None:
            self._told(asked)
            return
        self._began_to_wait = time.monotonic()
        if self._hold is not None:
            # All waits together: a stream whose replicas keep refusing must not stay silent.
            after = max(0.0, self._hold.after - self.held_seconds)
            self._timer = self._loop.call_later(after, self._still_waits)

    def _told(self, told: Grant | Refusal) -> None:
        traveller = self._traveller
        if traveller is None:
            return
        if isinstance(told, Refusal):
            self._traveller = None
            traveller.turned_away(self._refused(told))
            return
        self.grant = told
        self._on_replica = True
        self.attempts.begin()
        traveller.attempt(told)

    def _release(self) -> None:
        if self._on_replica and self.grant is not None:
            self._on_replica = False
            self.served.dispatcher.release(self.grant)

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

    def _still_waits(self) -> None:
        traveller, hold = self._traveller, self._hold
        if traveller is not None and hold is not None:
            self._timer = self._loop.call_later(hold.every, self._still_waits)
            traveller.waiting()

    def _waited(self) -> None:
        """The wait is over, if it did wait."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._granted = None
        if self._began_to_wait:
            waited = time.monotonic() - self._began_to_wait
            self._began_to_wait = 0.0
            self.held_seconds += waited
            self.served.metrics.held.observe(waited)

    def _refused(self, refusal: Refusal) -> HttpError:
        after = f" (it had broken before: {self.last_error})" if self.last_error else ""
        if refusal.full:
            return HttpError(429, refusal.message + after, code="queue_full", retry_after=refusal.retry_after)
        return HttpError(503, refusal.message + after, code="no_replica", retry_after=refusal.retry_after)

    # -- Waiter

    def granted(self, grant: Grant) -> None:
        self.grant = grant
        self._on_replica = True
        self._hear(grant)

    def refused(self, refusal: Refusal) -> None:
        self._hear(refusal)

    def _hear(self, told: Grant | Refusal) -> None:
        # Who tells it is in the middle of something.
        self._granted = self._loop.call_soon(self._heard, told)

    def _heard(self, told: Grant | Refusal) -> None:
        self._waited()
        self._told(told)


class _Walk(Traveller):
    """A traveller that takes its steps when it is asked for them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._next: asyncio.Future[Grant | Outcome | HttpError] = loop.create_future()

    async def step(self) -> Grant | Outcome | HttpError:
        step = await self._next
        self._next = self._loop.create_future()
        return step

    def attempt(self, grant: Grant) -> None:
        self._take(grant)

    def waiting(self) -> None:
        pass

    def over(self, outcome: Outcome) -> None:
        self._take(outcome)

    def turned_away(self, error: HttpError) -> None:
        self._take(error)

    def _take(self, step: Grant | Outcome | HttpError) -> None:
        if not self._next.done():  # else the caller was cancelled, and leaves
            self._next.set_result(step)
