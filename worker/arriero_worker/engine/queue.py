"""Sequences in order, and deadlines."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from operator import attrgetter

from arriero_worker.engine.sequence import Sequence

_order = attrgetter("order")


class Ordered:
    """Sequences sorted by `Sequence.order`: lower priority first, then first come, first served.

    A sorted list: finding is a bisection, inserting and removing move a few kilobytes of pointers at most.
    """

    __slots__ = ("_items",)

    def __init__(self) -> None:
        self._items: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._items)

    @property
    def first(self) -> Sequence | None:
        return self._items[0] if self._items else None

    @property
    def last(self) -> Sequence | None:
        return self._items[-1] if self._items else None

    def add(self, sequence: Sequence) -> None:
        insort(self._items, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        index = bisect_left(self._items, sequence.order, key=_order)
        assert self._items[index] is sequence
        del self._items[index]

    def discard(self, sequence: Sequence) -> bool:
        """Remove it if it is there; says whether it was."""
        index = bisect_left(self._items, sequence.order, key=_order)
        if index == len(self._items) or self._items[index] is not sequence:
            return False
        del self._items[index]
        return True


class Deadlines:
    """When whose time is up. Entries of ended sequences are dropped lazily, before they far outnumber the living."""

    __slots__ = ("_heap",)

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int]] = []

    def add(self, time: float, sequence: Sequence) -> None:
        heappush(self._heap, (time, sequence.order[1], sequence.id))

    @property
    def next(self) -> float | None:
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: float, living: dict[int, Sequence]) -> list[Sequence]:
        """The living sequences one of whose deadlines has passed, each once."""
        due: dict[Sequence, None] = {}
        while self._heap and self._heap[0][0] <= now:
            _time, arrival, id_ = heappop(self._heap)
            sequence = living.get(id_)
            if sequence is not None and sequence.order[1] == arrival:
                due[sequence] = None
        return list(due)

    def compact(self, living: dict[int, Sequence]) -> None:
        """Drop the entries of ended sequences once they are the majority; call it when sequences end."""
        if len(self._heap) > 64 + 4 * len(living):
            self._heap = [entry for entry in self._heap if entry[2] in living and living[entry[2]].order[1] == entry[1]]
            heapify(self._heap)
