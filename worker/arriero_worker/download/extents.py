"""Which bytes of a file are there: a set of half-open ranges. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import pairwise


class Extents:
    """Ranges [start, stop), kept merged and in order."""

    def __init__(self) -> None:
        self._edges: list[int] = []  # start, stop, start, stop, ... strictly rising
        self.covered = 0
        """Bytes in all ranges."""

    def add(self, start: int, stop: int) -> None:
        """Ranges may overlap and touch what is there."""
        if start >= stop:
            return
        left, right = bisect_left(self._edges, start), bisect_right(self._edges, stop)
        # An odd position lies within a range, or at its end: that range's other edge stays.
        begin = [start] if left % 2 == 0 else []
        end = [stop] if right % 2 == 0 else []
        self._edges[left:right] = begin + end
        self.covered = sum(b - a for a, b in self.ranges())

    def ranges(self) -> list[tuple[int, int]]:
        return [pair for position, pair in enumerate(pairwise(self._edges)) if position % 2 == 0]

    def missing(self, size: int) -> list[tuple[int, int]]:
        """What of [0, size) is not there, in order."""
        gaps, at = [], 0
        for start, stop in self.ranges():
            if start > at:
                gaps.append((at, min(start, size)))
            at = max(at, stop)
        if at < size:
            gaps.append((at, size))
        return gaps


def segments(gaps: list[tuple[int, int]], longest: int) -> list[tuple[int, int]]:
    """The same bytes in pieces of at most `longest`."""
    return [(at, min(at + longest, stop)) for start, stop in gaps for at in range(start, stop, longest)]
