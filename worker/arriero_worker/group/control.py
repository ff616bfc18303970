"""The control port of a pod: Status and health everywhere; on the leader's pod also Join, Run and Drain.

It lives in the pod's supervisor, which has no torch and no model to crash on: the membership outlives any rank, the
leader's included.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health_pb2_grpc

from arriero.inference.v1 import worker_pb2 as pb
from arriero.inference.v1 import worker_pb2_grpc
from arriero_plan.launch import Launch
from arriero_worker.group import membership
from arriero_worker.group.health import PodHealth
from arriero_worker.group.memory import PodMemory
from arriero_worker.group.ring import Ring, unpack_plan
from arriero_worker.group.wire import CHANNEL_OPTIONS, to_wire

log = logging.getLogger("arriero.control")

TICK = 0.05  # seconds between looks at silent and leaving members
_SILENCE = 5.0


class Control(worker_pb2_grpc.WorkerServicer):
    """Serves one pod. `memory` is the pod's shared memory; on the leader's pod the step plans are read from its
    ring.
    """

    def __init__(self, launch: Launch, pod: int, memory: PodMemory) -> None:
        self._launch = launch
        self._pod = pod
        self._memory = memory
        self._leader = 0 in launch.pods[pod].ranks
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._group = membership.Membership(launch.layout.world, launch.digest, _SILENCE)
        self._outbox: dict[int, queue.SimpleQueue[pb.JoinResponse | None]] = {}
        self._remote: dict[int, pb.RankStatus] = {}
        self._drain_asked = False
        self._stopped = threading.Event()
        world = launch.layout.world
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=2 * world + len(launch.pods) + 32, thread_name_prefix="control"),
            options=[*CHANNEL_OPTIONS, ("grpc.so_reuseport", 0)],
        )
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(PodHealth(launch, pod, self.status), self._server)
        self._ticker = threading.Thread(target=self._tick, name="membership", daemon=True)

    def start(self) -> None:
        """Raises OSError if the port is taken."""
        port = self._launch.pods[self._pod].control_port
        try:
            bound = self._server.add_insecure_port(f"{self._launch.bind_address}:{port}")
        except RuntimeError:
            bound = 0
        if bound != port:
            raise OSError(f"control port {port} is in use: another worker may be running here")
        self._server.start()
        self._ticker.start()

    def stop(self) -> None:
        self._stopped.set()
        with self._lock:
            for outbox in self._outbox.values():
                outbox.put(None)
            self._changed.notify_all()
        self._server.stop(grace=0.2).wait()

    @property
    def serving(self) -> bool:
        with self._lock:
            return self._group.serving

    def lost(self, rank: int, reason: str) -> None:
        """A local rank's process ended: known here before its stream breaks."""
        if self._leader:
            with self._lock:
                self._send(self._group.lost(rank, reason))

    # Join

    def Join(
        self, request_iterator: Iterator[pb.JoinRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.JoinResponse]:
        self._require_leader(context)
        first = next(iter(request_iterator), None)
        if first is None or first.WhichOneof("event") != "hello":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message of a Join must be a hello")
        assert first is not None
        hello = first.hello
        outbox: queue.SimpleQueue[pb.JoinResponse | None] = queue.SimpleQueue()
        with self._lock:
            try:
                commands = self._group.hello(hello.rank, hello.epoch, hello.launch_digest, time.monotonic())
            except membership.Refused as error:
                context.abort(grpc.StatusCode.ABORTED, str(error))
            old = self._outbox.get(hello.rank)
            if old is not None:
                old.put(None)
            self._send(commands)
            self._outbox[hello.rank] = outbox
        log.info("rank %d (process %d) joined", hello.rank, hello.pid)
        refusal: list[str] = []
        threading.Thread(
            target=self._listen,
            args=(hello.rank, request_iterator, outbox, refusal),
            name=f"join-{hello.rank}",
            daemon=True,
        ).start()
        while (response := outbox.get()) is not None:
            yield response
        if refusal:
            context.abort(grpc.StatusCode.ABORTED, refusal[0])

    def _listen(
        self,
        rank: int,
        requests: Iterator[pb.JoinRequest],
        outbox: queue.SimpleQueue[pb.JoinResponse | None],
        refusal: list[str],
    ) -> None:
        reason = f"the stream of rank {rank} broke"
        try:
            for request in requests:
                self._handle(rank, request)
        except membership.Refused as error:
            reason = str(error)
            refusal.append(reason)
            log.warning("refused: %s", error)
        except grpc.RpcError:
            pass
        except Exception as error:  # the stream of a dying process ends in ways grpc does not name
            if not self._stopped.is_set():
                reason = f"the stream of rank {rank} broke: {error!r}"
        outbox.put(None)
        with self._lock:
            if self._outbox.get(rank) is outbox:
                del self._outbox[rank]
                self._send(self._group.lost(rank, reason))

    def _handle(self, rank: int, request: pb.JoinRequest) -> None:
        now = time.monotonic()
        kind = request.WhichOneof("event")
        with self._lock:
            group = self._group
            group.heard(rank, now)
            if kind == "status":
                self._remote[rank] = request.status
                self._changed.notify_all()
            elif kind == "ready":
                self._send(group.ready(rank, request.ready.weights_digest, now))
            elif kind == "formed":
                self._send(group.formed(rank, request.formed.epoch, now))
                self._changed.notify_all()
            elif kind == "broken":
                self._send(group.broken(rank, request.broken.epoch, request.broken.reason, now))
            elif kind == "leave":
                log.info("rank %d wants to leave", rank)
                self._send(group.leave(rank, request.leave.grace_seconds, now))

    def _send(self, commands: list[membership.Command]) -> None:
        """Carry commands out. Called with the lock held."""
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
                outbox.put(message)
        for command in commands[:1]:
            if isinstance(command, membership.Abort):
                self._memory.abort_epoch(command.epoch)
                level = logging.INFO if command.expected or self._stopped.is_set() else logging.WARNING
                log.log(level, "epoch %d ended: %s", command.epoch, command.reason)
            elif isinstance(command, membership.Form):
                log.info("forming epoch %d", command.epoch)
        if commands:
            self._changed.notify_all()

    def _tell_draining(self) -> None:
        """Let the engine take new requests or not. Called with the lock held."""
        outbox = self._outbox.get(0)
        if outbox is not None:
            outbox.put(pb.JoinResponse(drain=pb.SetDraining(draining=self._drain_asked or self._group.leaving)))

    def _tick(self) -> None:
        leaving = False
        while not self._stopped.wait(TICK):
            with self._lock:
                running, waiting, *_, draining = self._memory.read_engine()
                idle = not running and not waiting and (bool(draining) or not self._group.serving)
                self._send(self._group.tick(time.monotonic(), idle))
                if leaving != self._group.leaving:
                    leaving = self._group.leaving
                    self._tell_draining()

    # Run

    def Run(self, request: pb.RunRequest, context: grpc.ServicerContext) -> Iterator[pb.RunResponse]:
        self._require_leader(context)
        with self._lock:
            if not self._group.active or request.epoch != self._group.epoch:
                context.abort(
                    grpc.StatusCode.ABORTED, f"epoch {request.epoch} is over, the group is at {self._group.epoch}"
                )
        if not 0 < request.pod < len(self._launch.pods):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"pod {request.pod} is not one that dials for plans")
        local = len(self._launch.pods[self._pod].ranks)
        reader = Ring(self._memory).reader(local + request.pod)
        context.add_callback(reader.close)

        def over() -> bool:
            return self._memory.aborted_epoch >= request.epoch or not context.is_active() or self._stopped.is_set()

        # The first answer says that nothing written from now on is missed.
        yield pb.RunResponse(epoch=request.epoch)
        while (message := reader.read(over)) is not None:
            epoch, step, plan = unpack_plan(message)
            if epoch == request.epoch:
                yield pb.RunResponse(epoch=epoch, step=step, plan=plan)
        reader.close()
        context.abort(grpc.StatusCode.ABORTED, f"epoch {request.epoch} ended")

    # Status, Drain

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> Iterator[pb.StatusResponse]:
        last: pb.StatusResponse | None = None
        while context.is_active() and not self._stopped.is_set():
            status = self.status()
            if status != last:
                yield status
                last = status
            if request.once:
                return
            with self._changed:
                self._changed.wait(0.25)

    def status(self) -> pb.StatusResponse:
        running, waiting, blocks, used, recoveries, run, draining = self._memory.read_engine()
        ranks = self._rank_statuses()
        phase = min((rank.phase for rank in ranks), default=pb.PHASE_STARTING)
        failed = next((rank for rank in ranks if rank.phase == pb.PHASE_FAILED), None)
        reason = ""
        if failed is not None:
            phase, reason = pb.PHASE_FAILED, failed.reason
        elif draining and phase == pb.PHASE_SERVING:
            phase, reason = pb.PHASE_DRAINING, "asked to take no new requests"
        return pb.StatusResponse(
            phase=phase,
            epoch=self._group.epoch if self._leader else max((rank.epoch for rank in ranks), default=0),
            ranks=ranks,
            running=running,
            waiting=waiting,
            kv_blocks=blocks,
            kv_blocks_used=used,
            recoveries=recoveries,
            reason=reason,
            run=str(run or ""),
        )

    def _rank_statuses(self) -> list[pb.RankStatus]:
        own = self._launch.pods[self._pod].ranks
        if not self._leader:
            read = [self._memory.read_rank(index, rank, self._pod) for index, rank in enumerate(own)]
            return [to_wire(status, in_phase) for status, _, in_phase in read]
        ranks = []
        with self._lock:
            for rank in range(self._launch.layout.world):
                told = self._remote.get(rank)
                gone = rank not in self._group.present and (told is None or told.phase != pb.PHASE_FAILED)
                pod = self._launch.pod_of(rank)
                ranks.append(
                    pb.RankStatus(rank=rank, pod=pod, phase=pb.PHASE_STARTING) if gone or told is None else told
                )
        return ranks

    def Drain(self, request: pb.DrainRequest, context: grpc.ServicerContext) -> Iterator[pb.DrainResponse]:
        self._require_leader(context)
        with self._lock:
            self._drain_asked = True
            self._tell_draining()
        limit = time.monotonic() + (request.timeout_seconds or self._launch.drain_seconds)
        last = -1
        while context.is_active():
            running, waiting, *_, draining = self._memory.read_engine()
            remaining = running + waiting
            if remaining != last and (draining or remaining):
                yield pb.DrainResponse(remaining=remaining)
                last = remaining
            if (draining and not remaining) or time.monotonic() >= limit or self._stopped.wait(TICK):
                return

    def _require_leader(self, context: grpc.ServicerContext) -> None:
        if not self._leader:
            leader = self._launch.pods[0]
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this pod is not the leader's; ask {leader.host}:{leader.control_port}",
            )
