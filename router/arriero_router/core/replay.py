"""What becomes of a request when an attempt at it broke: another attempt, or an end."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Break(Enum):
    """How an attempt ended without an answer."""

    UNREACHED = "unreached"
    """The replica could not be connected to: it never saw the request."""
    CUT = "cut"
    """The connection broke under the answer, or before it."""
    REFUSED = "refused"
    """The replica said that it cannot take it now: draining, not ready, full."""
    FAILED = "failed"
    """The replica failed on it (a 5xx of its own)."""
    CLIENT = "client"
    """The replica ended it for a fault of the request or its client: another one would do the same."""

    @property
    def untried(self) -> bool:
        """Nothing was tried: the replica did not take the request, and may be asked again a little later."""
        return self in (Break.UNREACHED, Break.REFUSED)

    @property
    def is_fault(self) -> bool:
        """Whether it speaks against the replica's health."""
        return self not in (Break.REFUSED, Break.CLIENT)


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    again: int = 3
    """Attempts behind the first that may end without a token gained; 0: a broken request is never sent again."""
    total: int = 32
    """Attempts in all."""


class Attempts:
    """Counts the attempts at one request.

    What no replica took does not count: it is held again, until its deadline. An attempt that brought the answer on
    was worth it and does not count against the next; so a stream outlives any number of rolling restarts up to `total`,
    while a request that kills every replica it meets is given up soon.
    """

    __slots__ = ("_settings", "made", "replays", "vain")

    def __init__(self, settings: ReplaySettings) -> None:
        self._settings = settings
        self.made = 0
        self.vain = 0
        """Attempts in a row that gained nothing."""
        self.replays = 0
        """Attempts behind the first that took over an answer or a request that had been under way."""

    def begin(self) -> None:
        self.made += 1

    def broke(self, kind: Break, *, gained: bool, resumable: bool) -> bool:
        """Whether there is to be another attempt.

        `gained`: the attempt brought new tokens. `resumable`: what the client has had can be continued (nothing yet,
        or all of it with its tokens known).
        """
        settings = self._settings
        if kind.untried:
            self.made -= 1
            return settings.again > 0 and resumable
        self.vain = 0 if gained else self.vain + 1
        spent = not settings.again or self.vain > settings.again or self.made >= settings.total
        if kind is Break.CLIENT or not resumable or spent:
            return False
        self.replays += 1
        return True
