"""The replica with the fewest requests."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from arriero_router.core.ask import Ask
from arriero_router.core.policy import Pick
from arriero_router.core.replica import Replica


class LeastLoad:
    """Requests of this process and of others; as many with fewer bytes to prefill is less; then chance."""

    def __init__(self, rng: Random) -> None:
        self._random = rng.random

    def pick(self, ask: Ask, replicas: Sequence[Replica], shares: Sequence[float], now: float) -> Pick:
        best = replicas[0]
        least = pending = float("inf")
        ties = 1
        for replica, share in zip(replicas, shares, strict=True):
            # With this request on it: an idle replica in slow start is not as good as an idle one.
            load = (replica.in_flight + replica.others + 1) / share
            if load > least:
                continue
            if load == least:
                if replica.pending > pending:
                    continue
                if replica.pending == pending:
                    ties += 1
                    if self._random() * ties < 1:
                        best = replica
                    continue
            best, least, pending, ties = replica, load, replica.pending, 1
        return Pick(best, "load")

    def sent(self, ask: Ask, pick: Pick) -> None:
        pass

    def found(self, pick: Pick, cached: int) -> None:
        pass

    def gone(self, replica: Replica) -> None:
        pass
