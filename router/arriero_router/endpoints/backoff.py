"""How long to wait before the next try."""

from __future__ import annotations

import random

_random = random.Random()


class Backoff:
    """Waits that double from `first` to `most` seconds, each cut by up to a fifth so that many who lost the same thing
    do not come back in step.
    """

    def __init__(self, first: float, most: float) -> None:
        self._first = first
        self._most = most
        self._next = first

    def reset(self) -> None:
        self._next = self._first

    def next(self) -> float:
        wait = self._next
        self._next = min(self._most, 2 * wait)
        return wait * (1 - 0.2 * _random.random())
