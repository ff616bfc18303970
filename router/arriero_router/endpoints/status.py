"""What a replica says of itself: the `Worker.Status` stream of its leader's pod."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Protocol

import grpc
import grpc.aio

from arriero.inference.v1 import worker_pb2 as pb
from arriero.inference.v1 import worker_pb2_grpc
from arriero_router.core.replica import Endpoint, Report
from arriero_router.endpoints.backoff import Backoff
from arriero_router.endpoints.channel import describe, knock, open_channel, unreachable
from arriero_router.endpoints.model import address

log = logging.getLogger("arriero.endpoints")

_NAMES = {number: name.removeprefix("PHASE_").lower() for name, number in pb.Phase.items()}


class Listener(Protocol):
    """Who wants to know how a replica is."""

    def told(self, name: str, report: Report) -> None:
        """The replica said this of itself."""
        ...

    def lost(self, name: str, reason: str) -> None:
        """Nothing is known of the replica until it is heard again."""
        ...


@dataclass(frozen=True, slots=True)
class StatusLimits:
    """Seconds."""

    silence: float = 2.0
    """A stream that has been quiet this long is checked: the replica is asked once more on the same connection."""
    answer: float = 3.0
    """How long that, connecting, or the first message may take. So a host that dies without a word is lost after
    silence + answer, and so is one whose supervisor hangs."""
    first_wait: float = 0.05
    longest_wait: float = 0.4
    """Before trying again; the longest bounds how late a replica started again is heard."""


def report_of(status: pb.StatusResponse) -> Report:
    """A replica is ready in phase Serving alone. One that re-forms its group after losing a rank goes on with the
    requests it has once it stands again, and would let new ones wait: they are better off elsewhere.
    """
    phase = status.phase
    name = _NAMES.get(phase, f"phase {phase}")
    return Report(
        ready=phase == pb.PHASE_SERVING,
        draining=phase == pb.PHASE_DRAINING,
        running=status.running,
        waiting=status.waiting,
        kv_used=min(1.0, status.kv_blocks_used / status.kv_blocks) if status.kv_blocks else 0.0,
        reason="" if phase == pb.PHASE_SERVING else f"{name}: {status.reason}" if status.reason else name,
        run=status.run,
    )


class StatusFollower:
    """Tells a listener each status of one endpoint, and each time it loses the endpoint."""

    def __init__(self, endpoint: Endpoint, listener: Listener, limits: StatusLimits | None = None) -> None:
        self._endpoint = endpoint
        self._listener = listener
        self._limits = limits or StatusLimits()
        self._backoff = Backoff(self._limits.first_wait, self._limits.longest_wait)
        self._where = address(endpoint.host, endpoint.control_port)
        self._lost = False

    async def run(self) -> None:
        """Follow the endpoint through its restarts until cancelled."""
        while True:
            reason = await self._follow()
            if not self._lost:
                self._lost = True
                log.warning("replica %s: lost sight of it at %s: %s", self._endpoint.name, self._where, reason)
                self._listener.lost(self._endpoint.name, reason)
            await asyncio.sleep(self._backoff.next())

    async def _follow(self) -> str:
        """Follow one stream to its end; returns why it ended."""
        limits = self._limits
        host, port = self._endpoint.host, self._endpoint.control_port
        try:
            await knock(host, port, limits.answer)
        except OSError as error:
            return unreachable(error)
        async with open_channel(host, port) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            call = stub.Status(pb.StatusRequest())
            heard = False
            message: asyncio.Future[pb.StatusResponse] | None = None
            try:
                while True:
                    message = message or asyncio.ensure_future(call.read())
                    # No time-out around the read itself: cancelling a read ends the call.
                    await asyncio.wait({message}, timeout=limits.silence if heard else limits.answer)
                    if message.done():
                        status = message.result()
                        message = None
                        if status is grpc.aio.EOF:
                            return "it ended the stream"
                        heard = True
                        self._told(status)
                    elif not heard:
                        return f"no word within {limits.answer:g} s"
                    elif not await self._alive(stub, message):
                        return f"silent for {limits.silence + limits.answer:g} s"
            except grpc.aio.AioRpcError as error:
                return describe(error)
            finally:
                call.cancel()
                if message is not None:
                    message.cancel()
                    await asyncio.gather(message, return_exceptions=True)

    async def _alive(self, stub: worker_pb2_grpc.WorkerStub, message: asyncio.Future[pb.StatusResponse]) -> bool:
        """Whether a quiet replica answers a question; a message on the stream is as good an answer."""
        question = stub.Status(pb.StatusRequest(once=True), timeout=self._limits.answer)
        answer = asyncio.ensure_future(question.read())
        try:
            await asyncio.wait({answer, message}, return_when=asyncio.FIRST_COMPLETED)
            return message.done() or not isinstance(answer.exception(), grpc.aio.AioRpcError)
        finally:
            question.cancel()
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)

    def _told(self, status: pb.StatusResponse) -> None:
        self._backoff.reset()
        report = report_of(status)
        if self._lost:
            self._lost = False
            log.info("replica %s: heard again (%s)", self._endpoint.name, report.reason or "serving")
        self._listener.told(self._endpoint.name, report)
