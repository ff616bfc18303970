"""A rank's side of the membership: it dials the leader's pod, tells its truth, and takes commands. One thread, for
the rank's life.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator

import grpc

from arriero.inference.v1 import worker_pb2 as pb
from arriero.inference.v1 import worker_pb2_grpc
from arriero_plan.launch import Launch
from arriero_worker.engine.messages import Phase, RankStatus
from arriero_worker.group.memory import PodMemory
from arriero_worker.group.wire import CHANNEL_OPTIONS, from_wire, to_wire

log = logging.getLogger("arriero.member")

_BEAT = 0.25  # seconds between statuses
_REDIAL = 0.1
_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Memory of this process, as the kernel counts it (proc(5), statm)."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE


class Truth:
    """The rank's status: written by its main thread, copied to the pod's memory and onto the stream."""

    def __init__(self, launch: Launch, rank: int, memory: PodMemory) -> None:
        self._memory = memory
        self._pod = launch.pod_of(rank)
        self._index = launch.pods[self._pod].ranks.index(rank)
        self._rank = rank
        self._since = time.monotonic()
        self.phase: Phase = "Starting"
        self.epoch = 0
        self.step = 0
        self.bytes_loaded = 0
        self.bytes_total = 0
        self.reason = ""
        self.memory_bytes: Callable[[], int] = resident_bytes
        self.changed = threading.Event()
        self.now()

    def enter(self, phase: Phase, reason: str = "") -> None:
        if phase != self.phase:
            self._since = time.monotonic()
        self.phase, self.reason = phase, reason
        self.changed.set()
        self.now()

    def now(self) -> pb.RankStatus:
        """Write the status to the pod's memory, and give it for the stream."""
        status = RankStatus(
            self._rank,
            self._pod,
            self.phase,
            self.epoch,
            self.step,
            self.bytes_loaded,
            self.bytes_total,
            self.memory_bytes(),
            self.reason,
        )
        self._memory.write_rank(self._index, status, self._since)
        return to_wire(status, time.monotonic() - self._since)


class Member:
    """`tell` is handed what the leader commands, and an AbortEpoch of its own making when the stream breaks under an
    epoch.
    """

    def __init__(
        self,
        launch: Launch,
        rank: int,
        memory: PodMemory,
        truth: Truth,
        tell: Callable[[pb.Form | pb.AbortEpoch | pb.Release | pb.SetDraining], None],
    ) -> None:
        self._launch, self._rank, self._memory, self._truth, self._tell = launch, rank, memory, truth, tell
        self._outbox: queue.SimpleQueue[pb.JoinRequest | None] = queue.SimpleQueue()
        self._ready = ""
        self._leaving: float | None = None
        self._stopped = False
        leader = launch.pods[0]
        self.leader_address = f"{leader.host}:{leader.control_port}"
        self._thread = threading.Thread(target=self._run, name="member", daemon=True)
        self._thread.start()

    def ready(self, weights_digest: str) -> None:
        """Say that the rank can be part of an epoch; said again by itself when the stream breaks while waiting."""
        self._ready = weights_digest
        self._outbox.put(pb.JoinRequest(ready=pb.Ready(weights_digest=weights_digest)))

    def formed(self, epoch: int) -> None:
        self._outbox.put(pb.JoinRequest(formed=pb.Formed(epoch=epoch)))

    def broken(self, epoch: int, reason: str) -> None:
        """The epoch is of no use to this rank: end it here at once, and for all through the leader."""
        self._memory.abort_epoch(epoch)
        self._outbox.put(pb.JoinRequest(broken=pb.Broken(epoch=epoch, reason=reason)))

    def leave(self, grace_seconds: float) -> None:
        """Ask to go. With no leader to ask, nothing can run any more and the release is at once."""
        self._leaving = time.monotonic() + grace_seconds
        self._outbox.put(pb.JoinRequest(leave=pb.Leave(grace_seconds=grace_seconds)))

    def stop(self) -> None:
        self._stopped = True
        self._outbox.put(None)
        self._thread.join(1.0)

    def follow(self, tell: Callable[[list[RankStatus]], None]) -> None:
        """Have every rank's status told, as the leader's pod knows them, at each change. For the leader itself."""

        def run() -> None:
            with grpc.insecure_channel(self.leader_address, options=CHANNEL_OPTIONS) as channel:
                while not self._stopped:
                    try:
                        for status in worker_pb2_grpc.WorkerStub(channel).Status(pb.StatusRequest()):
                            tell([from_wire(rank) for rank in status.ranks])
                    except grpc.RpcError:
                        time.sleep(_REDIAL)

        threading.Thread(target=run, name="follow", daemon=True).start()

    def _run(self) -> None:
        while not self._stopped:
            with grpc.insecure_channel(self.leader_address, options=CHANNEL_OPTIONS) as channel:
                try:
                    self._join(worker_pb2_grpc.WorkerStub(channel))
                except grpc.RpcError as error:
                    if error.code() == grpc.StatusCode.ABORTED:
                        log.warning("the leader refused rank %d: %s", self._rank, error.details())
            if self._truth.epoch > self._memory.aborted_epoch:
                self._memory.abort_epoch(self._truth.epoch)
                self._tell(pb.AbortEpoch(epoch=self._truth.epoch, reason="the stream to the leader broke"))
            if self._leaving is not None:
                self._tell(pb.Release())
                return
            time.sleep(_REDIAL)

    def _join(self, stub: worker_pb2_grpc.WorkerStub) -> None:
        while not self._outbox.empty():
            self._outbox.get()
        hello = pb.Hello(rank=self._rank, epoch=self._truth.epoch, launch_digest=self._launch.digest, pid=os.getpid())
        first = [pb.JoinRequest(hello=hello), pb.JoinRequest(status=self._truth.now())]
        if self._ready:
            first.append(pb.JoinRequest(ready=pb.Ready(weights_digest=self._ready)))
        beats = threading.Thread(target=self._beat, args=(self._outbox,), name="beats", daemon=True)
        beats.start()
        try:
            for response in stub.Join(self._requests(first, self._outbox)):
                self._take(response)
        finally:
            # The beats and the request iterator of this stream end; the next stream has an outbox of its own.
            self._outbox.put(None)
            self._outbox = queue.SimpleQueue()

    def _take(self, response: pb.JoinResponse) -> None:
        match response.WhichOneof("command"):
            case "form":
                self._ready = ""
                self._tell(response.form)
            case "abort":
                self._memory.abort_epoch(response.abort.epoch)
                self._tell(response.abort)
            case "release":
                self._tell(response.release)
            case "drain":
                self._tell(response.drain)

    @staticmethod
    def _requests(
        first: list[pb.JoinRequest], outbox: queue.SimpleQueue[pb.JoinRequest | None]
    ) -> Iterator[pb.JoinRequest]:
        yield from first
        while (request := outbox.get()) is not None:
            yield request

    def _beat(self, outbox: queue.SimpleQueue[pb.JoinRequest | None]) -> None:
        """Tell the status at every change and every quarter second, for as long as this stream lives."""
        while outbox is self._outbox and not self._stopped:
            self._truth.changed.wait(_BEAT)
            self._truth.changed.clear()
            outbox.put(pb.JoinRequest(status=self._truth.now()))
