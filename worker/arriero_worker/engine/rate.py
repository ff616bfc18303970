"""How fast a counter grows, of late."""

from __future__ import annotations

from collections import deque

WINDOW = 10.0
"""Seconds that it looks back."""


class Rate:
    """Told now and then what the counter shows; `per_second` is its growth over the last `WINDOW` seconds, or since the
    first word where that is less long ago.
    """

    def __init__(self) -> None:
        self._told: deque[tuple[float, int]] = deque()
        self.per_second = 0.0

    def tell(self, now: float, total: int) -> None:
        """`now` in seconds, by any clock that does not go back."""
        told = self._told
        told.append((now, total))
        while len(told) > 2 and told[1][0] <= now - WINDOW:
            told.popleft()
        began, before = told[0]
        self.per_second = (total - before) / (now - began) if now > began else 0.0
