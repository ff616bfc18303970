"""The less loaded of two replicas drawn by chance: many routers with old news of the load do not herd."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from arriero_router.core.ask import Ask
from arriero_router.core.policy import Pick
from arriero_router.core.replica import Replica


class PowerOfTwo:
    def __init__(self, rng: Random) -> None:
        self._random = rng.random

    def pick(self, ask: Ask, replicas: Sequence[Replica], shares: Sequence[float], now: float) -> Pick:
        count = len(replicas)
        first = int(self._random() * count)
        if count == 1:
            return Pick(replicas[0], "load")
        second = (first + 1 + int(self._random() * (count - 1))) % count
        one, other = replicas[first], replicas[second]
        if (one.in_flight + one.others + 1) * shares[second] <= (other.in_flight + other.others + 1) * shares[first]:
            return Pick(one, "load")
        return Pick(other, "load")

    def sent(self, ask: Ask, pick: Pick) -> None:
        pass

    def found(self, pick: Pick, cached: int) -> None:
        pass

    def gone(self, replica: Replica) -> None:
        pass
