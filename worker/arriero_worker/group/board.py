"""The latest status of a pod, and those who watch it: one status for all of them, however many, and however slow."""

from __future__ import annotations

import asyncio
import random

from arriero.inference.v1 import worker_pb2 as pb

_random = random.Random()

TOLD_SECONDS = 0.25
"""Between two statuses to one watcher that differ in numbers only, about: who came together is not told together, or a
step plan would wait behind hundreds of them.
"""


class Board:
    """Used on one loop."""

    def __init__(self) -> None:
        self._latest: pb.StatusResponse | None = None
        self._turn = 0
        """Counts what is to be told at once."""
        self._next: asyncio.Future[None] | None = None
        self._closed = False

    def post(self, status: pb.StatusResponse, *, now: bool) -> None:
        """`now`: it is news, and not only other numbers."""
        if status != self._latest:
            self._latest = status
            if now:
                self._wake()

    def close(self) -> None:
        """There is no further status."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._turn += 1
        if self._next is not None:
            self._next.set_result(None)
            self._next = None

    def watch(self) -> Watch:
        return Watch(self)


class Watch:
    """One watcher. When it takes its time, it gets the latest status then, and not those between."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._seen: pb.StatusResponse | None = None
        self._turn = -1

    async def next(self) -> pb.StatusResponse | None:
        """A status that it has not seen: at once if there is news, otherwise after a while. None: there is no more."""
        board, loop = self._board, asyncio.get_running_loop()
        due = loop.time() + TOLD_SECONDS * _random.uniform(0.8, 1.2) if self._seen is not None else 0.0
        while not board._closed:
            left = due - loop.time()
            if board._latest is not self._seen and (left <= 0 or board._turn != self._turn):
                self._seen, self._turn = board._latest, board._turn
                return self._seen
            if board._next is None:
                board._next = loop.create_future()
            # Not the future itself, which all watchers share: one that goes away would cancel it for the others.
            await asyncio.wait((board._next,), timeout=left if left > 0 else TOLD_SECONDS)
        return None
