"""Marks of a prompt on their way to the engine, and those that its prefix cache holds on their way to routers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from arriero_faces.prefix import CHUNK, Marked
from arriero_worker.engine.messages import PrefixNews

MIN_TOKENS = 4
"""Tokens for each mark, at least: a text of more than 64 bytes a token is hardly what the prompt was made of."""

MAX_PENDING = 10_000
"""Changes that may wait for a watcher, if the whole set is shorter than they are."""


def mark_depths(marked: Marked, tokens: int) -> list[tuple[int, int]]:
    """(depth, mark) for a prompt of so many tokens: by proportion, for nobody knows which bytes became which tokens.

    Chat templates put little around the text, so a depth is off by a few tokens, seldom by more than a block or two.
    """
    marks, size = marked
    if len(marks) * MIN_TOKENS > tokens:
        return []
    return [(-(-at * CHUNK * tokens // size), mark) for at, mark in enumerate(marks, 1)]


@dataclass(slots=True)
class Change:
    """What a watcher has to learn. With `reset`, `added` is the whole set."""

    reset: bool
    added: list[int]
    removed: list[int]
    run: str


@dataclass(eq=False, slots=True)
class Watcher:
    """One follower of a feed: wait for `news`, then `take`. What it does not take is folded, and bounded."""

    feed: MarkFeed
    news: asyncio.Event = field(default_factory=asyncio.Event)
    _reset: bool = False
    _added: set[int] = field(default_factory=set)
    _removed: set[int] = field(default_factory=set)

    def reset(self) -> None:
        self._reset = True
        self._added.clear()
        self._removed.clear()
        self.news.set()

    def changed(self, added: Iterable[int], removed: Iterable[int]) -> None:
        """`added` were not in the set, `removed` were."""
        if self._reset:
            return  # `take` will look at the set as it is then
        for mark in removed:
            if mark in self._added:
                self._added.remove(mark)
            else:
                self._removed.add(mark)
        for mark in added:
            if mark in self._removed:
                self._removed.remove(mark)
            else:
                self._added.add(mark)
        if len(self._added) + len(self._removed) > max(MAX_PENDING, len(self.feed.held)):
            self.reset()
        else:
            self.news.set()

    def take(self) -> Change:
        """All that is new since the last call."""
        if self._reset:
            change = Change(True, list(self.feed.held), [], self.feed.run)
        else:
            change = Change(False, list(self._added), list(self._removed), self.feed.run)
        self._reset = False
        self._added.clear()
        self._removed.clear()
        self.news.clear()
        return change


class MarkFeed:
    """The marks whose blocks are in the engine's prefix cache, and who follows them."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.run = ""
        """The engine's; empty while it is away."""
        self._watchers: set[Watcher] = set()

    @property
    def watchers(self) -> int:
        return len(self._watchers)

    def watch(self) -> Watcher:
        """A new follower; its first `take` is the whole set. End with `leave`."""
        watcher = Watcher(self)
        watcher.reset()
        self._watchers.add(watcher)
        return watcher

    def leave(self, watcher: Watcher) -> None:
        self._watchers.discard(watcher)

    def apply(self, news: PrefixNews) -> None:
        """The engine's word. What comes before its first `reset` was meant for another connection."""
        if news.reset:
            self._replace(set(news.added), str(news.run))
        elif self.run:
            removed = self.held.intersection(news.removed)
            added = set(news.added) - self.held
            self.held -= removed
            self.held |= added
            for watcher in self._watchers:
                watcher.changed(added, removed)

    def clear(self) -> None:
        """The engine went away."""
        self._replace(set(), "")

    def _replace(self, held: set[int], run: str) -> None:
        if held or self.held or run != self.run:
            self.held, self.run = held, run
            for watcher in self._watchers:
                watcher.reset()
