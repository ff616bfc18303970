"""Every replica in its turn."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from arriero_router.core.ask import Ask
from arriero_router.core.policy import Pick
from arriero_router.core.replica import Replica


class RoundRobin:
    """Stride scheduling: each turn costs a replica 1/share, and the one that has paid least is next. So turns stay fair
    when replicas come and go, and one in slow start gets its share of them. Who was away owes nothing, and is owed
    at most one turn.
    """

    def __init__(self, rng: Random) -> None:
        self._random = rng.random
        self._paid: dict[str, float] = {}
        self._level = 0.0

    def pick(self, ask: Ask, replicas: Sequence[Replica], shares: Sequence[float], now: float) -> Pick:
        paid_by, floor = self._paid, self._level - 1
        best, best_share = replicas[0], shares[0]
        least = float("inf")
        for replica, share in zip(replicas, shares, strict=True):
            paid = paid_by.get(replica.name)
            if paid is None:  # a newcomer's place in the round is chance: processes started together keep out of step
                paid = paid_by[replica.name] = self._level + self._random()
            elif paid < floor:
                paid = paid_by[replica.name] = floor
            if paid < least:
                best, best_share, least = replica, share, paid
        paid_by[best.name] = least + 1 / best_share
        self._level = max(self._level, least)
        return Pick(best, "turn")

    def sent(self, ask: Ask, pick: Pick) -> None:
        pass

    def found(self, pick: Pick, cached: int) -> None:
        pass

    def gone(self, replica: Replica) -> None:
        self._paid.pop(replica.name, None)
