"""Marks on cached blocks: which prefixes of requests' own text the prefix cache holds, and what changed of that.

A mark (`arriero_faces.prefix`) belongs to a token depth of its prompt; the block that holds the last token before
there carries it. Where the same text ends in a prompt is known by proportion only, so one mark may come to lie on
several blocks, and several forms of a text (spaces in its JSON, say) put different marks on the same block. A mark is
held as long as any block carries it. A block carries the latest few, so what clients can make it remember is bounded.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class MarkNews(NamedTuple):
    """What changed since the last news. With `reset`, all that was held before is gone, and `removed` is empty."""

    reset: bool
    added: list[int]
    removed: list[int]


class Marks:
    """Who carries which mark. Every call costs as much as what it changes."""

    __slots__ = ("_added", "_carriers", "_limit", "_removed", "_reset", "of")

    def __init__(self, limit: int) -> None:
        """A block carries `limit` at most: the oldest goes for a new one."""
        self._limit = limit
        self.of: dict[int, list[int]] = {}
        """Marks of each block that carries some, oldest first; to read only."""
        self._carriers: dict[int, int] = {}
        """How many blocks carry each mark."""
        self._reset = False
        self._added: set[int] = set()
        self._removed: set[int] = set()

    @property
    def held(self) -> Collection[int]:
        """All marks that some block carries."""
        return self._carriers.keys()

    def attach(self, block: int, mark: int) -> None:
        """Let a cached block carry a mark, if it does not already."""
        marks = self.of.get(block)
        if marks is None:
            self.of[block] = [mark]
        elif mark in marks:
            return
        else:
            marks.append(mark)
            if len(marks) > self._limit:
                self._lose(marks.pop(0))
        carriers = self._carriers.get(mark, 0)
        self._carriers[mark] = carriers + 1
        if not carriers:
            if mark in self._removed:
                self._removed.remove(mark)
            else:
                self._added.add(mark)

    def drop(self, block: int) -> None:
        """The block is evicted: it carries nothing any more."""
        for mark in self.of.pop(block, ()):
            self._lose(mark)

    def reset(self) -> None:
        """No block carries anything any more."""
        if self._carriers or self._removed:
            self._reset = True
            self.of.clear()
            self._carriers.clear()
            self._added.clear()
            self._removed.clear()

    def take(self) -> MarkNews | None:
        """What changed since the last call; None where nothing did."""
        if not (self._added or self._removed or self._reset):
            return None
        news = MarkNews(self._reset, list(self._added), list(self._removed))
        self._reset = False
        self._added.clear()
        self._removed.clear()
        return news

    def _lose(self, mark: int) -> None:
        carriers = self._carriers[mark] - 1
        if carriers:
            self._carriers[mark] = carriers
            return
        del self._carriers[mark]
        if mark in self._added:
            self._added.remove(mark)
        else:
            self._removed.add(mark)
