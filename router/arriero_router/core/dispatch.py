"""Ask, and get a replica now, later, or a refusal: pool, policy and hold queue of one model put together.

Nothing here waits: who asks hands in a `Waiter`, which hears of its turn. Time is the clock's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from arriero_faces.prefix import CHUNK
from arriero_router.core.ask import FOREVER, Ask
from arriero_router.core.hold import HoldQueue
from arriero_router.core.policy import Pick, Policy
from arriero_router.core.pool import Pool
from arriero_router.core.replica import Replica


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request gets no replica."""

    full: bool
    """The queue is full (try again later), rather than: the wait was over."""
    message: str
    retry_after: float


class Waiter(Protocol):
    """Hears exactly one of these, unless it withdraws before."""

    def granted(self, grant: Grant) -> None: ...

    def refused(self, refusal: Refusal) -> None: ...


class Grant:
    """A request's place on a replica, from the pick until `Dispatcher.release`."""

    __slots__ = ("ask", "began", "matched", "pick", "reason", "replica", "uncached", "unworked")

    def __init__(self, ask: Ask, pick: Pick, began: float) -> None:
        self.ask = ask
        self.pick = pick
        self.replica: Replica = pick.replica
        self.reason = pick.reason
        self.matched = pick.matched
        self.began = began
        self.uncached = max(0, ask.size - pick.matched * CHUNK)
        """Bytes of prompt that the replica is believed not to have in its cache."""
        self.unworked = self.uncached
        """Of these, what is still ahead of the first token."""


class Dispatcher:
    """For one model. Every `Grant` is released once."""

    def __init__(
        self,
        pool: Pool,
        policy: Policy,
        queue: HoldQueue[Waiter],
        clock: Callable[[], float],
        on_pick: Callable[[Grant], None] = lambda grant: None,
    ) -> None:
        self.pool = pool
        self.policy = policy
        self.queue = queue
        self._clock = clock
        self._on_pick = on_pick
        self._pumping = False
        self._closed = ""

    @property
    def held(self) -> int:
        return len(self.queue)

    def ask(self, ask: Ask, waiter: Waiter) -> Grant | Refusal | None:
        """A replica at once, or a refusal, or None: the waiter will hear.

        Nobody overtakes: while others of the same or a better priority are held, the newcomer is held behind them.
        """
        if self._closed:
            return Refusal(False, self._closed, 1.0)
        now = self._clock()
        if not self.queue:
            replicas, shares = self.pool.candidates(ask.avoid)
            if replicas:
                return self._grant(ask, self.policy.pick(ask, replicas, shares, now), now)
        if ask.deadline <= now:
            return self._late()
        pushed = self.queue.push(ask, waiter, now, begun=ask.begun)
        if pushed.displaced is not None:
            pushed.displaced.item.refused(self._full())
        if pushed.refused is not None:
            return self._full()
        self.pump()
        return None

    def withdraw(self, waiter: Waiter) -> None:
        """The waiter waits no longer: its client is gone."""
        self.queue.remove(waiter)

    def turn_away(self, why: str) -> None:
        """Nobody is held any longer."""
        for held in self.queue.expire(FOREVER):
            held.item.refused(Refusal(False, why, 1.0))

    def close(self, why: str) -> None:
        """Nobody is held any longer, nor will be: who would be has nobody left to wake it."""
        self._closed = why
        self.turn_away(why)

    def first_token(self, grant: Grant) -> None:
        """The answer has begun."""
        if grant.unworked:
            self.pool.first_token(grant.replica, grant.unworked)
            grant.unworked = 0

    def found(self, grant: Grant, cached: int) -> None:
        """The answer says that the replica had about so many bytes of the prompt in its cache."""
        if grant.matched:
            self.policy.found(grant.pick, cached)

    def release(self, grant: Grant) -> None:
        """The request left the replica, however it went."""
        self.pool.release(grant.replica, grant.unworked)
        grant.unworked = 0
        self.pump()

    def settle(self, ask: Ask, used: int) -> None:
        """The request has cost so many tokens in the end: fairness goes by that, if it was ever held."""
        if ask.counted:
            self.queue.charge(ask, used)

    def pump(self) -> None:
        """Let held requests go while there is room, and those whose time is over."""
        if self._pumping or not self.queue:
            return
        self._pumping = True
        try:
            now = self._clock()
            for late in self.queue.expire(now):
                late.item.refused(self._late())
            while (held := self.queue.peek(now)) is not None:
                replicas, shares = self.pool.candidates(held.ask.avoid)
                if not replicas:
                    break
                self.queue.pop(now)
                held.ask.counted = held.ask.counted or not held.ask.begun
                held.item.granted(self._grant(held.ask, self.policy.pick(held.ask, replicas, shares, now), now))
        finally:
            self._pumping = False

    @property
    def next_deadline(self) -> float:
        """When `pump` has to be called at the latest; FOREVER while nobody waits."""
        return self.queue.next_deadline

    def _grant(self, ask: Ask, pick: Pick, now: float) -> Grant:
        grant = Grant(ask, pick, now)
        self.pool.acquire(pick.replica, grant.uncached)
        self.policy.sent(ask, pick)
        self._on_pick(grant)
        return grant

    def _retry_after(self) -> float:
        """Seconds: about as long as the first in line has waited already."""
        return min(30.0, max(1.0, math.ceil(self.queue.oldest_wait(self._clock()))))

    def _full(self) -> Refusal:
        return Refusal(True, f"{len(self.queue)} requests are waiting already", self._retry_after())

    def _late(self) -> Refusal:
        if not self.pool.replicas:
            why = "there is no replica"
        elif not self.pool.ready:
            reasons = sorted({replica.report.reason for replica in self.pool.replicas if replica.report.reason})
            why = "no replica is ready" + (f" ({'; '.join(reasons[:3])})" if reasons else "")
        else:
            why = "every replica has all it may take"
        return Refusal(False, f"the request waited for as long as it may: {why}", self._retry_after())
