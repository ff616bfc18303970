"""The replica that is expected to answer first: a cached prefix saves work, and a queue costs time."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from arriero_faces.prefix import CHUNK
from arriero_router.core.ask import Ask
from arriero_router.core.policy import Pick
from arriero_router.core.prefix_index import PrefixIndex
from arriero_router.core.replica import Replica

REQUEST = 1024
"""What a request on a replica costs a new one there, in bytes of prompt: its decoding slows every step."""
MISS = 1.0
"""What a byte that must be computed costs, in bytes waiting there before it."""


class Prefix:
    """Weighs, for each replica, the bytes of prompt that have to be computed there before this request's first token:
    those of requests before it, and its own beyond what the cache holds. So a prefix stays where it is until the queue
    there is longer than the prefix; then another replica takes the request and has the prefix as well: what is asked
    for most ends up on as many replicas as it needs, and there is no hot spot.
    """

    def __init__(self, index: PrefixIndex, rng: Random) -> None:
        self._index = index
        self._random = rng.random
        self._now = 0.0

    def pick(self, ask: Ask, replicas: Sequence[Replica], shares: Sequence[float], now: float) -> Pick:
        self._now = now
        held = self._index.match(ask.marks)
        size = ask.size
        best, best_matched = replicas[0], 0
        least = float("inf")
        ties = 1
        for replica, share in zip(replicas, shares, strict=True):
            matched = held.get(replica.slot, 0) if held else 0
            cost = replica.pending + REQUEST * (replica.in_flight + replica.others) + MISS * (size - CHUNK * matched)
            cost /= share
            if cost > least:
                continue
            if cost == least:
                ties += 1
                if replica.in_flight > best.in_flight:
                    continue
                if replica.in_flight == best.in_flight and self._random() * ties >= 1:
                    continue
            else:
                ties = 1
            best, best_matched, least = replica, matched, cost
        return Pick(best, "prefix" if best_matched else "load", best_matched)

    def sent(self, ask: Ask, pick: Pick) -> None:
        if ask.marks:
            self._index.expect(pick.replica.slot, ask.marks, self._now)

    def gone(self, replica: Replica) -> None:
        self._index.forget(replica.slot)
