"""The replicas of one model: which are there, which may take a request, and how much of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from arriero_router.core.ask import FOREVER
from arriero_router.core.replica import Endpoint, Replica, Report

_LEAST_SHARE = 0.1
SHUN = 0.2
"""Seconds that a replica gets nothing new after it broke off."""


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Times in seconds."""

    max_in_flight: int = 0
    """Requests of this process on one replica at most; 0: no limit."""
    slow_start: float = 0.0
    """How long a replica that became ready takes less than its full share, rising from a tenth."""
    eject_after: int = 5
    """Faults in a row, none of them the client's, after which a replica is left alone for a while; 0: never."""
    eject_base: float = 1.0
    """The first such while; each further one in a row is twice as long."""
    eject_max: float = 60.0


class Pool:
    """Counts are kept here and nowhere else, so nothing that resets a view of a replica (a probe, a report) can leak
    them: `acquire` and `release` are all that changes them, and a replica that left keeps its own until its last
    request ends.
    """

    def __init__(
        self,
        settings: PoolSettings,
        clock: Callable[[], float],
        on_change: Callable[[], None] = lambda: None,
        on_gone: Callable[[Replica], None] = lambda replica: None,
    ) -> None:
        """`on_change`: there may be room for a request that was not there before. `on_gone`: a replica left."""
        self.settings = settings
        self.ejections = 0
        """How often a replica was ejected."""
        self._clock = clock
        self._on_change = on_change
        self._on_gone = on_gone
        self._replicas: dict[str, Replica] = {}
        self._usable: list[Replica] = []
        self._shares: list[float] = []
        self._fresh_until = -1.0
        """Until when `_usable` and `_shares` hold."""

    @property
    def replicas(self) -> Sequence[Replica]:
        return list(self._replicas.values())

    def get(self, name: str) -> Replica | None:
        return self._replicas.get(name)

    @property
    def ready(self) -> int:
        """Replicas that take new requests, ejected ones included."""
        return sum(replica.eligible for replica in self._replicas.values())

    # -- what is known of replicas

    def set_endpoints(self, endpoints: Iterable[Endpoint]) -> None:
        """The whole truth about which replicas there are. One whose address changed is another replica."""
        wanted = {endpoint.name: endpoint for endpoint in endpoints}
        for name, replica in list(self._replicas.items()):
            endpoint = wanted.get(name)
            if endpoint is None or replace(endpoint, terminating=False) != replace(replica.endpoint, terminating=False):
                del self._replicas[name]
                replica.report = Report(ready=False, draining=True, reason="gone")
                self._on_gone(replica)
            else:
                replica.endpoint = endpoint
        taken = {replica.slot for replica in self._replicas.values()}
        free = (slot for slot in range(len(wanted) + len(taken) + 1) if slot not in taken)
        for name, endpoint in wanted.items():
            if name not in self._replicas:
                self._replicas[name] = Replica(endpoint, next(free))
        self._changed()

    def told(self, name: str, report: Report) -> None:
        """What a replica says of itself."""
        replica = self._replicas.get(name)
        if replica is None:
            return
        was, before = replica.eligible, replica.report
        replica.report = report
        if report.run != before.run and before.run:
            replica.failures = replica.trips = 0
            replica.ejected_until = 0.0
        if replica.eligible and not was:
            replica.ready_since = self._clock()
        if replica.eligible != was:
            self._changed()

    def lost(self, name: str, reason: str) -> None:
        """Nothing is heard of a replica any more: it is not ready until it says so."""
        replica = self._replicas.get(name)
        if replica is not None:
            self.told(name, Report(ready=False, reason=reason, run=replica.report.run))

    # -- who may take a request

    def candidates(self, avoid: set[str]) -> tuple[Sequence[Replica], Sequence[float]]:
        """Replicas that can take one more request, and each one's share of a full load (slow start).

        Those in `avoid` only where there is no other. An ejected replica only where all ready ones are ejected.
        """
        if self._clock() >= self._fresh_until:
            self._refresh()
        usable, shares = self._usable, self._shares
        limit = self.settings.max_in_flight
        if not avoid:
            if not limit:
                return usable, shares
            for replica, share in zip(usable, shares):  # noqa: B905  # they are as long, and this is asked often
                if replica.in_flight >= limit * share:
                    break
            else:
                return usable, shares
        chosen = [
            (replica, share)
            for replica, share in zip(usable, shares, strict=True)
            if not limit or replica.in_flight < limit * share
        ]
        others = [pair for pair in chosen if pair[0].name not in avoid] if avoid else chosen
        chosen = others or chosen
        return [replica for replica, _ in chosen], [share for _, share in chosen]

    def _refresh(self) -> None:
        now, settings = self._clock(), self.settings
        eligible = [replica for replica in self._replicas.values() if replica.eligible]
        shunned = [replica.shunned_until for replica in eligible if replica.shunned_until > now]
        if shunned:
            eligible = [replica for replica in eligible if replica.shunned_until <= now]
        kept = [replica for replica in eligible if replica.ejected_until <= now]
        self._usable = kept or eligible
        self._shares = [self._share(replica, now) for replica in self._usable]
        changes = shunned + [replica.ejected_until for replica in eligible if replica.ejected_until > now]
        if any(share < 1.0 for share in self._shares):
            if all(share < 1.0 for share in self._shares):
                # All began together: what counts is how they compare.
                most = max(self._shares)
                self._shares = [share / most for share in self._shares]
            changes.append(now + max(0.05, settings.slow_start / 50))
        self._fresh_until = min(changes, default=FOREVER)

    def _share(self, replica: Replica, now: float) -> float:
        length = self.settings.slow_start
        if length <= 0:
            return 1.0
        return min(1.0, _LEAST_SHARE + (1 - _LEAST_SHARE) * (now - replica.ready_since) / length)

    def _changed(self) -> None:
        self._fresh_until = -1.0
        self._on_change()

    # -- requests on replicas

    def acquire(self, replica: Replica, size: int) -> None:
        """A request is on its way to it, with `size` bytes of prompt that its cache does not hold."""
        replica.in_flight += 1
        replica.pending += size

    def first_token(self, replica: Replica, size: int) -> None:
        """The prompt of such a request has been worked off."""
        replica.pending -= size

    def release(self, replica: Replica, size: int) -> None:
        """The request left it; `size` is what `first_token` was not told of."""
        replica.in_flight -= 1
        replica.pending -= size
        assert replica.in_flight >= 0
        assert replica.pending >= 0

    def shun(self, replica: Replica) -> None:
        """It broke off, or did not take a request."""
        replica.shunned_until = self._clock() + SHUN
        self._fresh_until = -1.0

    def succeeded(self, replica: Replica) -> None:
        replica.failures = replica.trips = 0

    def failed(self, replica: Replica) -> None:
        """It failed on a request, and that was not the client's doing. The last one that takes any is not ejected."""
        replica.failures += 1
        settings = self.settings
        now = self._clock()
        if not settings.eject_after or replica.failures < settings.eject_after or replica.ejected_until > now:
            return
        if any(o.eligible and o.ejected_until <= now for o in self._replicas.values() if o is not replica):
            length = min(settings.eject_max, settings.eject_base * 2.0 ** min(replica.trips, 64))
            replica.trips += 1
            replica.failures = 0
            replica.ejected_until = now + length
            self.ejections += 1
            self._fresh_until = -1.0
