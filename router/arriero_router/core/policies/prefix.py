"""The replica that is expected to answer first: a cached prefix saves work, and a queue costs time."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from arriero_faces.prefix import CHUNK
from arriero_router.core.ask import Ask
from arriero_router.core.policy import NEVER, Pick
from arriero_router.core.prefix_index import PrefixIndex
from arriero_router.core.replica import Replica

MISS = 3
"""What a byte that must be computed costs, in bytes that wait there before it. One for its own time; but it also holds
up whatever comes behind, and what it leaves in a full cache puts out something as large, to be computed again. With 1,
the greedy choice, prefixes spread over all replicas until no cache holds them and the queues grow without end.
Found with benchmarks/router_policy.py, as is the next.
"""
REQUEST = 256
"""What a request on a replica costs a new one there, in bytes of prompt: its decoding slows every step."""
EVEN = 1.2
"""Up to so many times its fair part of the requests a replica is not crowded: differences are mostly chance and old
news, and to follow them is to leave a warm cache for nothing.
"""
CROWDED = 1.5
SLACK = 4
"""At so many times its fair part, and so many requests on top, a crowd costs as much as to compute the whole prompt:
no cached prefix, however long, is worth a hot spot. In between it costs in proportion.
"""


class Prefix:
    """Weighs, for each replica, the bytes of prompt that have to be computed there before this request's first token:
    those of requests before it, and its own beyond what the cache holds; and how many requests are there. So a prefix
    stays where it is until the queue there is longer than the prefix is worth; then another replica takes the request
    and has the prefix as well: what is asked for most ends up on as many replicas as it needs, and none is a hot spot.
    """

    def __init__(self, index: PrefixIndex, rng: Random) -> None:
        self._index = index
        self._random = rng.random
        self._now = 0.0

    def pick(self, ask: Ask, replicas: Sequence[Replica], shares: Sequence[float], now: float) -> Pick:
        self._now = now
        held = self._index.match(ask.marks) if ask.marks else {}
        whole = MISS * ask.size
        loads = [replica.in_flight + replica.others for replica in replicas]
        part = sum(loads) / sum(shares)
        even = EVEN * part
        crowd = whole / ((CROWDED - EVEN) * part + SLACK)
        best, best_matched = replicas[0], 0
        least = float("inf")
        ties = 1
        for replica, share, requests in zip(replicas, shares, loads, strict=True):
            matched = held.get(replica.slot, 0) if held else 0
            cost = (replica.pending + REQUEST * requests + whole - MISS * CHUNK * matched) / share
            if requests > even * share:
                cost += crowd * (requests / share - even)
            if cost > least:
                continue
            if cost == least and replica.in_flight >= best.in_flight:
                if replica.in_flight > best.in_flight:
                    continue
                ties += 1
                if self._random() * ties >= 1:
                    continue
            else:
                ties = 1
            best, best_matched, least = replica, matched, cost
        if not best_matched:
            return Pick(best, "load")
        return Pick(best, "prefix", best_matched, self._index.guessed(best.slot, ask.marks[best_matched - 1]))

    def sent(self, ask: Ask, pick: Pick) -> None:
        if ask.marks:
            self._index.expect(pick.replica.slot, ask.marks, self._now)

    def found(self, pick: Pick, cached: int) -> None:
        # Half: bytes are not tokens. Less than that is no rounding, but a prefix that had been evicted.
        if pick.since != NEVER and 2 * cached < pick.matched * CHUNK:
            self._index.missed(pick.replica.slot, pick.since)

    def gone(self, replica: Replica) -> None:
        self._index.forget(replica.slot)
