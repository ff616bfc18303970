"""The one seam for choosing: a policy looks at replicas that can all take the request, and names one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from arriero_router.core.ask import Ask
from arriero_router.core.replica import Replica

NEVER = float("-inf")


class Pick(NamedTuple):
    replica: Replica
    reason: str
    """A stable word for the metric of picks by reason: "prefix", "load", "turn", "session"."""
    matched: int = 0
    """Chunks of the prompt that its cache is believed to hold."""
    since: float = NEVER
    """When the last of these was used there before, where this process guesses; NEVER: the replica said so."""


class Policy(Protocol):
    def pick(self, ask: Ask, replicas: Sequence[Replica], shares: Sequence[float], now: float) -> Pick:
        """One of `replicas` (never empty). `shares[i]`, above 0 and at most 1, is how much of a full load replica i
        should take yet (slow start): loads are divided by it.
        """
        ...

    def sent(self, ask: Ask, pick: Pick) -> None:
        """The request is on its way to the replica."""
        ...

    def found(self, pick: Pick, cached: int) -> None:
        """The answer says that the replica had about so many bytes of the prompt in its cache."""
        ...

    def gone(self, replica: Replica) -> None:
        """The replica's slot is free for another from now on."""
        ...
