"""The gRPC service that tells routers which prefixes the replica's KV cache holds: arriero.inference.v1.Prefixes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import grpc

from arriero.inference.v1 import prefixes_pb2 as pb
from arriero_faces.http.errors import HttpError
from arriero_worker.front.grpc_calls import CODES, abort, parsed, write
from arriero_worker.front.marks import Change, Watcher
from arriero_worker.front.service import Service

log = logging.getLogger("arriero.grpc")

SERVICE = "arriero.inference.v1.Prefixes"
MESSAGE = 100_000
"""Marks in one message at most: 0.8 MB, of the 4 MiB that gRPC clients take by default."""

_PAUSE = 0.05  # seconds between two changes told to one watcher


class Prefixes:
    """Its calls are no requests: a drain does not wait for them."""

    def __init__(self, service: Service, stall_seconds: float) -> None:
        self._service = service
        self._feed = service.client.marks
        self._stall = stall_seconds

    def handler(self) -> Any:
        method = grpc.unary_stream_rpc_method_handler(
            self.Watch, response_serializer=pb.WatchResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"Watch": method})

    async def Watch(self, data: bytes, context: Any) -> None:
        status = "CANCELLED"
        watcher = self._feed.watch()
        try:
            parsed(pb.WatchRequest, data)
            await self._tell(watcher, context)
        except HttpError as error:
            status = CODES[error.status].name
            await abort(context, error)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception:
            status = "INTERNAL"
            log.exception("failed on Watch")
            await abort(context, HttpError(500, "the server failed on this request"))
        finally:
            self._feed.leave(watcher)
            self._service.metrics.request("grpc", "Watch", status)

    async def _tell(self, watcher: Watcher, context: Any) -> None:
        while True:
            await watcher.news.wait()
            for response in responses(watcher.take()):
                await write(context, response, self._stall)
            await asyncio.sleep(_PAUSE)


def responses(change: Change) -> Iterator[pb.WatchResponse]:
    """A change in messages of bounded size; only the first may be a reset."""
    yield pb.WatchResponse(
        reset=change.reset, added=change.added[:MESSAGE], removed=change.removed[:MESSAGE], run=change.run
    )
    for start in range(MESSAGE, max(len(change.added), len(change.removed)), MESSAGE):
        end = start + MESSAGE
        yield pb.WatchResponse(added=change.added[start:end], removed=change.removed[start:end], run=change.run)
