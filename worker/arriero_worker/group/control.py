"""The control port of a pod: Status and health everywhere; on the leader's pod also Join, Run and Drain.

It lives in the pod's supervisor, which has no torch and no model to crash on: the membership outlives any rank, the
leader's included. One event loop, in a thread of its own, has all of it, so a call that waits (there are hundreds:
routers and operators watch Status) costs a coroutine. Only a stream of plans has a thread: the ring that they come
through is waited on with a futex.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc

from arriero.inference.v1 import worker_pb2 as pb
from arriero.inference.v1 import worker_pb2_grpc
from arriero_plan.launch import Launch
from arriero_worker.group import membership
from arriero_worker.group.board import Board
from arriero_worker.group.health import PodHealth
from arriero_worker.group.loop import LoopThread
from arriero_worker.group.memory import PodMemory
from arriero_worker.group.ring import Ring, unpack_plan
from arriero_worker.group.wire import CHANNEL_OPTIONS, to_wire

log = logging.getLogger("arriero.control")

TICK = 0.05  # seconds between looks at silent and leaving members, and at what the engine wrote
_SILENCE = 5.0
_GRACE = 0.2

_Outbox = asyncio.Queue[pb.JoinResponse | None]


class Control(worker_pb2_grpc.WorkerServicer):
    """Serves one pod. `memory` is the pod's shared memory; on the leader's pod the step plans are read from its
    ring. `start`, `stop` and `lost` are for the supervisor's main thread, everything else runs on the loop.
    """

    def __init__(self, launch: Launch, pod: int, memory: PodMemory) -> None:
        self._launch = launch
        self._pod = pod
        self._memory = memory
        self._leader = 0 in launch.pods[pod].ranks
        self._group = membership.Membership(launch.layout.world, launch.digest, _SILENCE)
        self._outbox: dict[int, _Outbox] = {}
        self._remote: dict[int, pb.RankStatus] = {}
        self._board = Board()
        self._drain_asked = False
        self._stopped = False
        self._thread: LoopThread | None = None
        self._server: grpc.aio.Server | None = None
        self._ticking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Raises OSError if the port is taken."""
        self._thread = LoopThread("control")
        self._thread.run(self._open())

    def stop(self) -> None:
        if self._thread is not None:
            self._thread.run(self._close())
            self._thread.stop()
            self._thread = None

    def lost(self, rank: int, reason: str) -> None:
        """A local rank's process ended: known here before its stream breaks."""
        if self._leader and self._thread is not None:
            self._thread.call(self._lost, rank, reason)

    async def _open(self) -> None:
        self._server = server = grpc.aio.server(options=[*CHANNEL_OPTIONS, ("grpc.so_reuseport", 0)])
        worker_pb2_grpc.add_WorkerServicer_to_server(self, server)
        health_pb2_grpc.add_HealthServicer_to_server(PodHealth(self._launch, self._pod, self.status), server)
        port = self._launch.pods[self._pod].control_port
        try:
            bound = server.add_insecure_port(f"{self._launch.bind_address}:{port}")
        except RuntimeError:
            bound = 0
        if bound != port:
            raise OSError(f"control port {port} is in use: another worker may be running here")
        await server.start()
        self._ticking = asyncio.create_task(self._tick())

    async def _close(self) -> None:
        self._stopped = True
        self._board.close()
        for outbox in self._outbox.values():
            outbox.put_nowait(None)
        if self._ticking is not None:
            self._ticking.cancel()
        if self._server is not None:
            await self._server.stop(_GRACE)

    # Join

    async def Join(self, request_iterator: AsyncIterator[pb.JoinRequest], context: Any) -> None:
        await self._require_leader(context)
        requests = aiter(request_iterator)
        first = await anext(requests, None)
        if first is None or first.WhichOneof("event") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message of a Join must be a hello")
        assert first is not None
        hello = first.hello
        try:
            commands = self._group.hello(hello.rank, hello.epoch, hello.launch_digest, time.monotonic())
        except membership.Refused as error:
            await context.abort(grpc.StatusCode.ABORTED, str(error))
        rank, outbox = hello.rank, _Outbox()
        old = self._outbox.get(rank)
        if old is not None:
            old.put_nowait(None)
        self._send(commands)
        self._outbox[rank] = outbox
        log.info("rank %d (process %d) joined", rank, hello.pid)
        reason = f"the stream of rank {rank} broke"
        refusal = ""
        writing = asyncio.create_task(self._write(outbox, context))
        reading = asyncio.create_task(self._listen(rank, requests))
        try:
            await asyncio.wait((writing, reading), return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                failure = reading.exception()
                if isinstance(failure, membership.Refused):
                    reason = refusal = str(failure)
                    log.warning("refused: %s", refusal)
                elif failure is not None and not self._stopped:
                    # The stream of a dying process ends in ways grpc does not name.
                    reason = f"{reason}: {failure!r}"
        finally:
            # Also when the call is cancelled, which is how a killed rank shows.
            for task in (writing, reading):
                task.cancel()
            if self._outbox.get(rank) is outbox:
                del self._outbox[rank]
                self._lost(rank, reason)
            await asyncio.gather(writing, reading, return_exceptions=True)
        if refusal:
            await context.abort(grpc.StatusCode.ABORTED, refusal)

    async def _write(self, outbox: _Outbox, context: Any) -> None:
        while (response := await outbox.get()) is not None:
            await context.write(response)

    async def _listen(self, rank: int, requests: AsyncIterator[pb.JoinRequest]) -> None:
        """Raises Refused."""
        async for request in requests:
            self._handle(rank, request)

    def _handle(self, rank: int, request: pb.JoinRequest) -> None:
        now = time.monotonic()
        group = self._group
        group.heard(rank, now)
        match request.WhichOneof("event"):
            case "status":
                before = self._remote.get(rank)
                self._remote[rank] = request.status
                if before is None or (before.phase, before.epoch) != (request.status.phase, request.status.epoch):
                    self._post(now=True)
            case "ready":
                self._send(group.ready(rank, request.ready.weights_digest, now))
            case "formed":
                self._send(group.formed(rank, request.formed.epoch, now))
                self._post(now=True)
            case "broken":
                self._send(group.broken(rank, request.broken.epoch, request.broken.reason, now))
            case "leave":
                log.info("rank %d wants to leave", rank)
                self._send(group.leave(rank, request.leave.grace_seconds, now))

    def _lost(self, rank: int, reason: str) -> None:
        self._send(self._group.lost(rank, reason))
        self._post(now=True)

    def _send(self, commands: list[membership.Command]) -> None:
        """Carry commands out."""
        for command in commands:
            message = pb.JoinResponse()
            match command:
                case membership.Form(rank, epoch):
                    pod = self._launch.pods[0]
                    message.form.CopyFrom(pb.Form(epoch=epoch, store=f"{pod.host}:{pod.store_port}"))
                case membership.Abort(rank, epoch, reason):
                    message.abort.CopyFrom(pb.AbortEpoch(epoch=epoch, reason=reason))
                case membership.Release(rank):
                    message.release.CopyFrom(pb.Release())
            outbox = self._outbox.get(rank)
            if outbox is not None:
                outbox.put_nowait(message)
        for command in commands[:1]:
            if isinstance(command, membership.Abort):
                self._memory.abort_epoch(command.epoch)
                level = logging.INFO if command.expected or self._stopped else logging.WARNING
                log.log(level, "epoch %d ended: %s", command.epoch, command.reason)
            elif isinstance(command, membership.Form):
                log.info("forming epoch %d", command.epoch)
        if commands:
            self._post(now=True)

    def _tell_draining(self) -> None:
        """Let the engine take new requests or not."""
        outbox = self._outbox.get(0)
        if outbox is not None:
            outbox.put_nowait(pb.JoinResponse(drain=pb.SetDraining(draining=self._drain_asked or self._group.leaving)))

    async def _tick(self) -> None:
        leaving, seen = False, (0, 0)
        while True:
            await asyncio.sleep(TICK)
            try:
                engine = self._memory.read_engine()
                idle = not engine.running and not engine.waiting and (bool(engine.draining) or not self._group.serving)
                self._send(self._group.tick(time.monotonic(), idle))
                if leaving != self._group.leaving:
                    leaving = self._group.leaving
                    self._tell_draining()
                self._post(now=seen != (engine.run, engine.draining))
                seen = engine.run, engine.draining
            except Exception:
                log.exception("a look at the group failed")

    # Run

    async def Run(self, request: pb.RunRequest, context: Any) -> None:
        await self._require_leader(context)
        epoch = request.epoch
        if not self._group.active or epoch != self._group.epoch:
            await context.abort(grpc.StatusCode.ABORTED, f"epoch {epoch} is over, the group is at {self._group.epoch}")
        if not 0 < request.pod < len(self._launch.pods):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"pod {request.pod} is not one that dials for plans")
        local = len(self._launch.pods[self._pod].ranks)
        reader = Ring(self._memory).reader(local + request.pod)
        over = threading.Event()
        plans: asyncio.Queue[pb.RunResponse | None] = asyncio.Queue()
        thread = self._thread
        assert thread is not None

        def stopped() -> bool:
            return self._memory.aborted_epoch >= epoch or over.is_set()

        def forward() -> None:
            while (message := reader.read(stopped)) is not None:
                of, step, plan = unpack_plan(message)
                if of == epoch:
                    thread.call(plans.put_nowait, pb.RunResponse(epoch=of, step=step, plan=plan))
            reader.close()
            thread.call(plans.put_nowait, None)

        threading.Thread(target=forward, name=f"plans-{request.pod}", daemon=True).start()
        try:
            # The first answer says that nothing written from now on is missed.
            await context.write(pb.RunResponse(epoch=epoch))
            while (response := await plans.get()) is not None:
                await context.write(response)
        finally:
            over.set()
        await context.abort(grpc.StatusCode.ABORTED, f"epoch {epoch} ended")

    # Status, Drain

    async def Status(self, request: pb.StatusRequest, context: Any) -> None:
        self._post()
        watch = self._board.watch()
        while (status := await watch.next()) is not None:
            await context.write(status)
            if request.once:
                return

    def _post(self, *, now: bool = False) -> None:
        self._board.post(self.status(), now=now)

    def status(self) -> pb.StatusResponse:
        engine = self._memory.read_engine()
        ranks = self._rank_statuses()
        phase = min((rank.phase for rank in ranks), default=pb.PHASE_STARTING)
        failed = next((rank for rank in ranks if rank.phase == pb.PHASE_FAILED), None)
        reason = ""
        if failed is not None:
            phase, reason = pb.PHASE_FAILED, failed.reason
        elif engine.draining and phase == pb.PHASE_SERVING:
            phase, reason = pb.PHASE_DRAINING, "asked to take no new requests"
        return pb.StatusResponse(
            phase=phase,
            epoch=self._group.epoch if self._leader else max((rank.epoch for rank in ranks), default=0),
            ranks=ranks,
            running=engine.running,
            waiting=engine.waiting,
            kv_blocks=engine.kv_blocks,
            kv_blocks_used=engine.kv_blocks_used,
            recoveries=engine.recoveries,
            reason=reason,
            run=str(engine.run or ""),
            tokens_per_second=engine.tokens_per_second,
        )

    def _rank_statuses(self) -> list[pb.RankStatus]:
        own = self._launch.pods[self._pod].ranks
        if not self._leader:
            read = [self._memory.read_rank(index, rank, self._pod) for index, rank in enumerate(own)]
            return [to_wire(status, in_phase) for status, _, in_phase in read]
        ranks = []
        for rank in range(self._launch.layout.world):
            told = self._remote.get(rank)
            gone = rank not in self._group.present and (told is None or told.phase != pb.PHASE_FAILED)
            pod = self._launch.pod_of(rank)
            ranks.append(pb.RankStatus(rank=rank, pod=pod, phase=pb.PHASE_STARTING) if gone or told is None else told)
        return ranks

    async def Drain(self, request: pb.DrainRequest, context: Any) -> None:
        await self._require_leader(context)
        self._drain_asked = True
        self._tell_draining()
        limit = time.monotonic() + (request.timeout_seconds or self._launch.drain_seconds)
        last = -1
        while True:
            engine = self._memory.read_engine()
            remaining = engine.running + engine.waiting
            if remaining != last and (engine.draining or remaining):
                await context.write(pb.DrainResponse(remaining=remaining))
                last = remaining
            if (engine.draining and not remaining) or time.monotonic() >= limit or self._stopped:
                return
            await asyncio.sleep(TICK)

    async def _require_leader(self, context: Any) -> None:
        if not self._leader:
            leader = self._launch.pods[0]
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this pod is not the leader's; ask {leader.host}:{leader.control_port}",
            )
