"""What a replica's prefix cache holds: the `Prefixes.Watch` stream of its gRPC port."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Protocol

import grpc
import grpc.aio

from arriero.inference.v1 import prefixes_pb2 as pb
from arriero.inference.v1 import prefixes_pb2_grpc
from arriero_router.core.replica import Endpoint
from arriero_router.endpoints.backoff import Backoff
from arriero_router.endpoints.channel import Security, describe, knock, open_channel

_CONNECT_SECONDS = 3.0
log = logging.getLogger("arriero.endpoints")


class OnMarks(Protocol):
    """Who wants to know which marks a replica holds."""

    def __call__(self, name: str, reset: bool, added: Sequence[int], removed: Sequence[int]) -> None:
        """reset: forget all marks of the replica first. Both sequences belong to the message: copy what is kept."""
        ...


class CacheFollower:
    """Tells the marks that one endpoint holds. When the stream breaks they are taken back at once: what the replica
    holds afterwards is unknown, and the new stream begins with all of it.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        on_marks: OnMarks,
        security: Security | None = None,
        waits: tuple[float, float] = (0.05, 1.0),
    ) -> None:
        """waits: the shortest and the longest between two tries, in seconds"""
        self._endpoint = endpoint
        self._on_marks = on_marks
        self._security = security
        self._backoff = Backoff(*waits)
        self._again = asyncio.Event()
        self._told = False
        self.idle = False
        """Whether the replica does not know the call, and nobody asks it any more."""

    def again(self) -> None:
        """Begin anew: the replica was lost sight of. A host that dies in silence leaves a stream that never ends."""
        self._again.set()

    async def run(self) -> None:
        """Follow the endpoint through its restarts until cancelled. A replica that does not know the call (another
        engine) is left alone until `again`.
        """
        while True:
            self._again.clear()
            known = await self._unless_again(self._watch())
            if self._told:
                self._told = False
                self._on_marks(self._endpoint.name, True, (), ())
            if known is False:
                self.idle = True
                await self._again.wait()
                self.idle = False
            else:
                await self._unless_again(asyncio.sleep(self._backoff.next(), True))

    async def _watch(self) -> bool:
        """One stream to its end; False: the replica does not know the call."""
        endpoint = self._endpoint
        try:
            await knock(endpoint.host, endpoint.grpc_port, _CONNECT_SECONDS)
        except OSError:
            return True
        async with open_channel(endpoint.host, endpoint.grpc_port, self._security) as channel:
            try:
                async for message in prefixes_pb2_grpc.PrefixesStub(channel).Watch(pb.WatchRequest()):
                    self._backoff.reset()
                    self._told = True
                    self._on_marks(endpoint.name, message.reset, message.added, message.removed)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    log.info("replica %s: does not tell what its prefix cache holds", endpoint.name)
                    return False
                log.debug("replica %s: prefix cache: %s", endpoint.name, describe(error))
        return True

    async def _unless_again(self, work: Coroutine[None, None, bool]) -> bool | None:
        """What `work` returns, or None if `again` cut it short."""
        task = asyncio.ensure_future(work)
        again = asyncio.ensure_future(self._again.wait())
        try:
            await asyncio.wait({task, again}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            again.cancel()
            task.cancel()
            await asyncio.gather(task, again, return_exceptions=True)
