"""The faces' end of the engine's socket: submit sequences, take what each step brings, survive the engine's death."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol, cast

from arriero_worker.engine.frames import FrameError, FrameReader, decode_from_engine, encode_frame
from arriero_worker.engine.messages import (
    Abort,
    Drain,
    EngineRequest,
    EngineStatus,
    Finish,
    Outputs,
    PrefixNews,
    Refusal,
    Submit,
    TokenLogprobs,
)
from arriero_worker.front.marks import MarkFeed

log = logging.getLogger("arriero.engine-client")

MAX_PENDING = 65536
"""Tokens (a token with logprobs counts one more for each alternative) that may wait for a consumer, per submission."""


MAX_UNSENT = 64 * 1024 * 1024
"""Bytes that may wait for an engine that does not read."""


class EngineGone(Exception):
    """The engine process went away, or is not there: what ran on it is lost to this process."""


class ConsumerTooSlow(Exception):
    """More output waited for its consumer than may be held; the sequences were aborted."""


class Delta:
    """What arrived for one sequence since its consumer last looked; several steps fold into one."""

    __slots__ = ("cached", "finish", "logprobs", "prompt_logprobs", "refusal", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.cached = -1
        """Prompt tokens found in the prefix cache; -1: not told in this delta."""
        self.finish: Finish | None = None
        self.refusal: Refusal | None = None


class Submission:
    """Sequences that were submitted together and are consumed together: `next` until all have ended, `close` always."""

    def __init__(self, client: EngineClient, ids: list[int]) -> None:
        self._client = client
        self._index = {id: i for i, id in enumerate(ids)}
        """Engine ids of the sequences that have not ended, to their place in the submission."""
        self._pending: dict[int, Delta] = {}
        self._held = 0
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None

    @property
    def live(self) -> bool:
        return bool(self._index or self._pending)

    async def next(self) -> list[tuple[int, Delta]]:
        """(place, what is new) of the sequences that have news; waits for the first. Empty once all have ended.

        Raises EngineGone or ConsumerTooSlow, in place of what had not been taken.
        """
        while not self._pending and self._error is None and self._index:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._error is not None:
            raise self._error
        news = list(self._pending.items())
        self._pending = {}
        self._held = 0
        return news

    def abort(self, place: int) -> None:
        """End one sequence without further output."""
        for id, i in self._index.items():
            if i == place:
                del self._index[id]
                self._pending.pop(place, None)
                self._client._abort([id])
                return

    def close(self) -> int:
        """End what has not ended, and say how many that were. Safe to call at any time, any number of times."""
        ids = list(self._index)
        self._index.clear()
        self._pending.clear()
        if ids:
            self._client._abort(ids)
        return len(ids)

    # -- for the client

    def _delta(self, id: int) -> Delta | None:
        place = self._index.get(id)
        if place is None:
            return None
        delta = self._pending.get(place)
        if delta is None:
            delta = self._pending[place] = Delta()
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)
        return delta

    def _hold(self, size: int) -> None:
        self._held += size
        if self._held > MAX_PENDING and self._index:
            self.close()
            self._fail(ConsumerTooSlow(f"more than {MAX_PENDING} tokens waited for the client"))

    def _fail(self, error: Exception) -> None:
        self._error = error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class StatusListener(Protocol):
    def __call__(self, status: EngineStatus | None) -> None: ...


class EngineClient:
    """Keeps one connection to the engine, opening it again whenever it is lost.

    `status` is the engine's latest word, None while there is no connection; `on_status` is called at each change of it.
    """

    def __init__(self, path: str, on_status: StatusListener | None = None, *, max_retry: float = 0.5) -> None:
        self.status: EngineStatus | None = None
        self.last_status: EngineStatus | None = None
        """The latest status of any connection: counters survive here while the engine is away."""
        self.marks = MarkFeed()
        """Which prefixes its cache holds; empty while the engine is away."""
        self._path = path
        self._on_status = on_status
        self._max_retry = max_retry
        self._next_id = 0
        self._submissions: dict[int, Submission] = {}
        self._connection: _Connection | None = None
        self._connector: asyncio.Task[None] | None = None
        self._draining = False

    @property
    def running(self) -> int:
        """Sequences submitted and not ended."""
        return len(self._submissions)

    def start(self) -> None:
        self._connector = asyncio.get_running_loop().create_task(self._connect())

    async def close(self) -> None:
        if self._connector is not None:
            self._connector.cancel()
            await asyncio.gather(self._connector, return_exceptions=True)
        if self._connection is not None:
            self._connection.close()
            self._lost(self._connection, "the front is closing")

    def allocate(self, count: int) -> list[int]:
        """Ids for EngineRequests, never used twice by this client."""
        first = self._next_id
        self._next_id += count
        return list(range(first, first + count))

    def submit(self, requests: list[EngineRequest]) -> Submission:
        """Hand sequences to the engine. Raises EngineGone if it is not there."""
        if self._connection is None or self.status is None:
            raise EngineGone("the engine is not there")
        if self._connection.unsent > MAX_UNSENT:
            raise EngineGone("the engine does not take requests")
        ids = [request.id for request in requests]
        submission = Submission(self, ids)
        frame = encode_frame(Submit(requests))
        for id in ids:
            self._submissions[id] = submission
        self._connection.write(frame)
        return submission

    def drain(self) -> None:
        """Tell the engine, now and whenever it comes back, to take no new request."""
        self._draining = True
        if self._connection is not None:
            self._connection.write(encode_frame(Drain()))

    # -- inside

    def _abort(self, ids: list[int]) -> None:
        for id in ids:
            self._submissions.pop(id, None)
        if self._connection is not None:
            self._connection.write(encode_frame(Abort(ids)))

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        pause = 0.02
        while True:
            try:
                _, connection = await loop.create_unix_connection(lambda: _Connection(self), self._path)
            except OSError:
                await asyncio.sleep(pause)
                pause = min(pause * 2, self._max_retry)
                continue
            pause = 0.02
            await connection.lost
            await asyncio.sleep(pause)

    def _opened(self, connection: _Connection) -> None:
        log.info("connected to the engine")
        self._connection = connection
        if self._draining:
            connection.write(encode_frame(Drain()))

    def _lost(self, connection: _Connection, why: str) -> None:
        if self._connection is not connection:
            return
        self._connection = None
        submissions = set(self._submissions.values())
        self._submissions = {}
        level = logging.WARNING if submissions else logging.INFO
        log.log(level, "lost the engine (%s), with %d requests on it", why, len(submissions))
        for submission in submissions:
            submission._index.clear()
            submission._fail(EngineGone("the engine went away"))
        self.marks.clear()
        self._set_status(None)

    def _set_status(self, status: EngineStatus | None) -> None:
        self.status = status
        if status is not None:
            self.last_status = status
        if self._on_status is not None:
            self._on_status(status)

    def _received(self, body: bytes) -> None:
        message = decode_from_engine(body)
        if isinstance(message, Outputs):
            self._outputs(message)
        elif isinstance(message, PrefixNews):
            self.marks.apply(message)
        else:
            self._set_status(message)

    def _outputs(self, outputs: Outputs) -> None:
        submissions = self._submissions
        for id, cached in outputs.cached:
            if (submission := submissions.get(id)) is not None and (delta := submission._delta(id)) is not None:
                delta.cached = cached
        for id, positions in outputs.prompt_logprobs:
            if (submission := submissions.get(id)) is not None and (delta := submission._delta(id)) is not None:
                delta.prompt_logprobs += positions
        for id, token in zip(outputs.ids, outputs.tokens, strict=True):
            if (submission := submissions.get(id)) is not None and (delta := submission._delta(id)) is not None:
                delta.tokens.append(token)
                submission._hold(1)
        for id, logprobs in outputs.logprobs:
            if (submission := submissions.get(id)) is not None and (delta := submission._delta(id)) is not None:
                delta.logprobs.append(logprobs)
                submission._hold(1 + len(logprobs.top))
        for finish in outputs.finished:
            if (submission := submissions.pop(finish.id, None)) is not None:
                if (delta := submission._delta(finish.id)) is not None:
                    delta.finish = finish
                submission._index.pop(finish.id, None)
        for refusal in outputs.refused:
            if (submission := submissions.pop(refusal.id, None)) is not None:
                if (delta := submission._delta(refusal.id)) is not None:
                    delta.refusal = refusal
                submission._index.pop(refusal.id, None)


class _Connection(asyncio.Protocol):
    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it
        self._client._opened(self)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._reader.feed(data):
                self._client._received(body)
        except (FrameError, ValueError) as error:
            log.error("the engine sent what is not a message: %s", error)
            self.close()
            self._client._lost(self, "it sent what is not a message")

    def connection_lost(self, error: Exception | None) -> None:
        self._client._lost(self, str(error) if error else "it closed the connection")
        if not self.lost.done():
            self.lost.set_result(None)

    def write(self, frame: bytes) -> None:
        if self._transport is not None:
            self._transport.write(frame)

    @property
    def unsent(self) -> int:
        """Bytes written that the engine has not read yet, beyond the socket's own buffer."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
