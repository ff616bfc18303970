"""Requests of one session on one replica, as long as it is not too busy."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from xxhash import xxh3_64_intdigest

from arriero_router.core.ask import Ask
from arriero_router.core.policies.least_load import LeastLoad
from arriero_router.core.policy import Pick
from arriero_router.core.replica import Replica

EXCESS = 1.25
"""How much over its fair part of all requests a replica may have (bounded loads: arXiv 1608.01350)."""
SLACK = 4
"""Requests over that: with few requests in all, a session's second one is not yet a reason to leave."""


class Hashing:
    """Rendezvous hashing: every session ranks the replicas by a hash of both names and goes to the first that has room.
    When one comes or goes, only its own sessions move. All routers rank alike. Without a session: the least loaded.
    """

    def __init__(self, rng: Random) -> None:
        self._least_load = LeastLoad(rng)

    def pick(self, ask: Ask, replicas: Sequence[Replica], shares: Sequence[float], now: float) -> Pick:
        if not ask.session:
            return self._least_load.pick(ask, replicas, shares, now)
        key = xxh3_64_intdigest(ask.session.encode())
        requests = sum(replica.in_flight + replica.others for replica in replicas) + 1
        part = EXCESS * requests / sum(shares)
        best: Replica | None = None
        highest = -1
        for replica, share in zip(replicas, shares, strict=True):
            if replica.in_flight + replica.others + 1 <= part * share + SLACK * share:
                rank = xxh3_64_intdigest(replica.name.encode(), key)
                if rank > highest:
                    best, highest = replica, rank
        if best is None:
            return self._least_load.pick(ask, replicas, shares, now)
        return Pick(best, "session")

    def sent(self, ask: Ask, pick: Pick) -> None:
        pass

    def found(self, pick: Pick, cached: int) -> None:
        pass

    def gone(self, replica: Replica) -> None:
        pass
