"""Where requests wait for a replica: bounded, by priority, fair among tenants, and never past a deadline.

Priority classes come first, lower before higher. Inside a class, tenants share by tokens: start-time fair queueing
(Goyal, Vin, Cheng 1996), each tenant's start tag moved on by tokens / weight for what it was given. Inside a tenant,
first come, first served. While two tenants both wait from one time on, what they were given differs, divided by their
weights, by at most one largest request; who did not wait has nothing saved up.

When there is no room, the newcomer takes the place of one of a lower class, or, in its own class, of a tenant that
has more waiting than its own would have. Who gives way is the last of the tenant with the most waiting.

Every operation is O(log n), amortized.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from typing import Generic, NamedTuple, TypeVar

from arriero_router.core.ask import FOREVER, Ask

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

_SLACK = 16
"""Stale entries that a heap may have besides as many as there are live ones."""


class Refusal(StrEnum):
    """Why a request cannot wait."""

    FULL = "full"
    """As many wait as may, and none of them gives way."""
    EXPIRED = "expired"
    """Its deadline is over."""


class Waiting(NamedTuple, Generic[T]):
    """One that waits, or did."""

    ask: Ask
    item: T


class Pushed(NamedTuple, Generic[T]):
    """What came of a push."""

    refused: Refusal | None = None
    displaced: Waiting[T] | None = None
    """Who gave way, and waits no longer."""

    @property
    def held(self) -> bool:
        return self.refused is None


@dataclass(slots=True, eq=False)
class _Held(Generic[T]):
    ask: Ask
    item: T
    since: float
    begun: bool

    @property
    def waiting(self) -> Waiting[T]:
        return Waiting(self.ask, self.item)

    @property
    def cost(self) -> int:
        # What has begun was counted when it left the queue before.
        return 0 if self.begun else max(1, self.ask.tokens)


class HoldQueue(Generic[T]):
    """Items are told apart by identity; none may wait twice. Times are by the caller's clock, in seconds."""

    def __init__(self, limit: int, weights: Mapping[str, float] | None = None) -> None:
        self.limit = limit
        """May be changed at any time; who waits already stays."""
        self.weights: Mapping[str, float] = {} if weights is None else weights
        """Shares of tenants, above 0; 1 for those not named. May be changed or replaced at any time."""
        self._all: OrderedDict[int, _Held[T]] = OrderedDict()
        self._due: _Ranking[int] = _Ranking()
        self._over: list[Waiting[T]] = []
        self._classes: dict[int, _Class[T]] = {}
        self._first: _Ranking[int] = _Ranking()
        self._last: _Ranking[int] = _Ranking()
        self._lengths: Counter[str] = Counter()

    def __len__(self) -> int:
        """How many wait, those included that only `expire` can still take out."""
        return len(self._all) + len(self._over)

    @property
    def lengths(self) -> Mapping[str, int]:
        """How many wait of each tenant that has any; not to be changed."""
        return self._lengths

    def oldest_wait(self, now: float) -> float:
        """Seconds that the one that came first has waited; 0 if none waits."""
        return now - next(iter(self._all.values())).since if self._all else 0.0

    @property
    def next_deadline(self) -> float:
        """When `expire` has something to return: in the past if it has already; FOREVER if never."""
        if self._over:
            return self._over[0].ask.deadline
        key = self._due.first()
        return FOREVER if key is None else self._all[key].ask.deadline

    def push(self, ask: Ask, item: T, now: float, *, begun: bool = False) -> Pushed[T]:
        """Let an item wait; its ask may not change from now on.

        begun: its answer has begun, and it was in the queue before. It goes before its tenant's others, never gives
        way, and is not refused for want of room.
        """
        if ask.deadline <= now:
            return Pushed(refused=Refusal.EXPIRED)
        self._sweep(now)
        displaced = None
        if len(self._all) >= self.limit:
            displaced = self._give_way(ask)
            if displaced is None and not begun:
                return Pushed(refused=Refusal.FULL)
        key = id(item)
        assert key not in self._all, "an item waits once"
        held = _Held(ask, item, now, begun)
        self._all[key] = held
        self._lengths[ask.tenant] += 1
        if ask.deadline < FOREVER:
            self._due.set(key, ask.deadline)
        group = self._classes.get(ask.priority)
        if group is None:
            group = self._classes[ask.priority] = _Class()
            self._first.set(ask.priority, ask.priority)
        if not begun and ask.priority not in self._last:
            self._last.set(ask.priority, -ask.priority)
        group.add(key, held, self._weight(ask.tenant))
        return Pushed(displaced=displaced)

    def peek(self, now: float) -> Waiting[T] | None:
        """Whose turn it is; None if nobody waits."""
        held = self._head(now)
        return None if held is None else held.waiting

    def pop(self, now: float) -> Waiting[T] | None:
        """Take out whose turn it is, and count its tokens; None if nobody waits. Never one whose deadline is over."""
        held = self._head(now)
        if held is None:
            return None
        self._classes[held.ask.priority].serve(held, self._weight(held.ask.tenant))
        self._take(held)
        self._left(held.ask.tenant)
        return held.waiting

    def remove(self, item: T) -> bool:
        """Take out an item that no longer wants to wait; False if it does not wait (any more)."""
        held = self._all.get(id(item))
        if held is not None:
            self._take(held)
            self._left(held.ask.tenant)
            return True
        for i, over in enumerate(self._over):
            if over.item is item:
                del self._over[i]
                self._left(over.ask.tenant)
                return True
        return False

    def expire(self, now: float) -> list[Waiting[T]]:
        """Take out all whose deadline is over, the earliest first."""
        self._sweep(now)
        over, self._over = self._over, []
        for waiting in over:
            self._left(waiting.ask.tenant)
        return over

    def charge(self, ask: Ask, used: int) -> None:
        """Correct what `pop` counted for a request: it has used so many tokens in the end, not `ask.tokens`."""
        group = self._classes.get(ask.priority)
        if group is not None:
            group.correct(ask.tenant, (used - max(1, ask.tokens)) / self._weight(ask.tenant))

    def _weight(self, tenant: str) -> float:
        return self.weights.get(tenant, 1.0)

    def _head(self, now: float) -> _Held[T] | None:
        self._sweep(now)
        priority = self._first.first()
        return None if priority is None else self._all[self._classes[priority].head()]

    def _sweep(self, now: float) -> None:
        while (key := self._due.first()) is not None:
            held = self._all[key]
            if held.ask.deadline > now:
                return
            self._take(held)
            self._over.append(held.waiting)

    def _give_way(self, ask: Ask) -> Waiting[T] | None:
        priority = self._last.first()
        if priority is None or priority < ask.priority:
            return None
        group = self._classes[priority]
        if priority == ask.priority and not group.has_less(ask.tenant, self._weight(ask.tenant)):
            return None
        held = self._all[group.victim()]
        self._take(held)
        self._left(held.ask.tenant)
        return held.waiting

    def _left(self, tenant: str) -> None:
        self._lengths[tenant] -= 1
        if not self._lengths[tenant]:
            del self._lengths[tenant]

    def _take(self, held: _Held[T]) -> None:
        key, ask = id(held.item), held.ask
        del self._all[key]
        self._due.discard(key)
        group = self._classes[ask.priority]
        group.drop(key, held, self._weight(ask.tenant))
        if not group.yielding:
            self._last.discard(ask.priority)
        if group.empty:
            # With nobody left, nobody was treated unfairly: the class begins anew when someone comes.
            del self._classes[ask.priority]
            self._first.discard(ask.priority)


class _Line:
    """One tenant's in one class: keys of items, in order."""

    __slots__ = ("begun", "floor", "fresh", "start")

    def __init__(self) -> None:
        self.begun: OrderedDict[int, None] = OrderedDict()
        self.fresh: OrderedDict[int, None] = OrderedDict()
        self.start = 0.0
        """The virtual time at which its next one is due."""
        self.floor = 0.0
        """`start` may not be put back behind this: when it began to wait."""

    @property
    def waits(self) -> bool:
        return bool(self.begun or self.fresh)


class _Class(Generic[T]):
    """The tenants of one priority. Virtual time is the start tag of the one served last."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._turns: _Ranking[str] = _Ranking()
        self._longest: _Ranking[str] = _Ranking()
        self._time = 0.0
        self._sweep_at = _SLACK

    @property
    def empty(self) -> bool:
        return self._turns.first() is None

    @property
    def yielding(self) -> bool:
        """Whether any may have to give way."""
        return self._longest.first() is not None

    def head(self) -> int:
        tenant = self._turns.first()
        assert tenant is not None
        line = self._lines[tenant]
        return next(iter(line.begun or line.fresh))

    def add(self, key: int, held: _Held[T], weight: float) -> None:
        tenant = held.ask.tenant
        line = self._lines.get(tenant)
        if line is None:
            line = self._lines[tenant] = _Line()
        if not line.waits:
            line.floor = self._time
            line.start = max(line.start, self._time)
            self._turns.set(tenant, line.start)
        if held.begun:
            line.begun[key] = None
        else:
            line.fresh[key] = None
            self._longest.set(tenant, -len(line.fresh) / weight)

    def drop(self, key: int, held: _Held[T], weight: float) -> None:
        tenant = held.ask.tenant
        line = self._lines[tenant]
        if held.begun:
            del line.begun[key]
        else:
            del line.fresh[key]
            if line.fresh:
                self._longest.set(tenant, -len(line.fresh) / weight)
            else:
                self._longest.discard(tenant)
        if not line.waits:
            self._turns.discard(tenant)
            self._forget()

    def serve(self, held: _Held[T], weight: float) -> None:
        tenant = held.ask.tenant
        line = self._lines[tenant]
        # A correction can have put a line's start back behind the time, which itself only moves on.
        self._time = max(self._time, line.start)
        line.start += held.cost / weight
        self._turns.set(tenant, line.start)

    def correct(self, tenant: str, amount: float) -> None:
        line = self._lines.get(tenant)
        if line is None:
            if amount <= 0:
                return
            line = self._lines[tenant] = _Line()
            line.start = self._time
        line.start = max(line.floor, line.start + amount)
        if line.waits:
            self._turns.set(tenant, line.start)

    def has_less(self, tenant: str, weight: float) -> bool:
        """Whether the tenant, with one more waiting, would have fewer by its weight than the one that has most."""
        line = self._lines.get(tenant)
        mine = (len(line.fresh) if line is not None else 0) + 1
        return mine / weight < -self._longest.first_value(0.0)

    def victim(self) -> int:
        """The last of the tenant that has most waiting."""
        tenant = self._longest.first()
        assert tenant is not None
        return next(reversed(self._lines[tenant].fresh))

    def _forget(self) -> None:
        """Drop lines of tenants that would begin at the present time anyhow, now and then."""
        if len(self._lines) < self._sweep_at:
            return
        self._lines = {t: line for t, line in self._lines.items() if line.waits or line.start > self._time}
        self._sweep_at = 2 * len(self._lines) + _SLACK


class _Ranking(Generic[K]):
    """Keys by values that may change, the least first, the one set earlier first among equals: a heap that skips what
    is stale.
    """

    __slots__ = ("_current", "_heap", "_numbers")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, K]] = []
        self._current: dict[K, tuple[float, int, K]] = {}
        self._numbers = count()

    def __contains__(self, key: K) -> bool:
        return key in self._current

    def set(self, key: K, value: float) -> None:
        entry = (value, next(self._numbers), key)
        self._current[key] = entry
        if len(self._heap) > 2 * len(self._current) + _SLACK:
            self._heap = list(self._current.values())
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, entry)

    def discard(self, key: K) -> None:
        self._current.pop(key, None)

    def first(self) -> K | None:
        heap = self._heap
        while heap:
            entry = heap[0]
            if self._current.get(entry[2]) is entry:
                return entry[2]
            heapq.heappop(heap)
        return None

    def first_value(self, default: float) -> float:
        return default if self.first() is None else self._heap[0][0]
