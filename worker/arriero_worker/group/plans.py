"""How step plans reach a rank in one epoch: written once by the leader, through its pod's ring, over one gRPC stream
per other pod, through that pod's ring.

Ring readers are numbered: a pod's local ranks first, then (on the leader's pod) one per other pod.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
import msgspec

from arriero.inference.v1 import worker_pb2 as pb
from arriero.inference.v1 import worker_pb2_grpc
from arriero_plan.launch import Launch
from arriero_worker.engine.step import StepPlan
from arriero_worker.group.comm import GroupAborted
from arriero_worker.group.memory import PodMemory
from arriero_worker.group.ring import Ring, pack_plan, unpack_plan
from arriero_worker.group.wire import CHANNEL_OPTIONS

_decoder = msgspec.msgpack.Decoder(StepPlan)
_encoder = msgspec.msgpack.Encoder()


class PlanSender:
    """The leader's end."""

    def __init__(self, launch: Launch, memory: PodMemory, epoch: int) -> None:
        self._epoch, self._memory = epoch, memory
        readers = len(launch.pods[0].ranks) + len(launch.pods)
        self._writer = Ring(memory).writer(readers) if launch.layout.world > 1 else None

    def send(self, plan: StepPlan) -> None:
        """Nothing happens once the epoch is over: its end reaches the caller by another way."""
        if self._writer is not None:
            message = pack_plan(self._epoch, plan.step, _encoder.encode(plan))
            self._writer.write(message, lambda: self._memory.aborted_epoch >= self._epoch)


class RingPlans:
    """A rank that is not its pod's first, or is on the leader's pod."""

    def __init__(self, memory: PodMemory, index: int, epoch: int) -> None:
        self._memory, self._epoch = memory, epoch
        self._reader = Ring(memory).reader(index)

    def __iter__(self) -> Iterator[StepPlan]:
        """Raises GroupAborted when the epoch ends."""
        while (message := self._reader.read(lambda: self._memory.aborted_epoch >= self._epoch)) is not None:
            epoch, _, plan = unpack_plan(message)
            if epoch == self._epoch:  # what an older epoch left behind is refused
                yield _decoder.decode(plan)
        raise GroupAborted(f"epoch {self._epoch} ended")

    def close(self) -> None:
        self._reader.close()


class DialledPlans:
    """The first rank of another pod: it dials the leader and hands the plans on inside its pod."""

    def __init__(self, launch: Launch, pod: int, memory: PodMemory, epoch: int) -> None:
        """Returns once the leader has confirmed that no plan will be missed. Raises GroupAborted."""
        leader = launch.pods[0]
        self._memory, self._epoch = memory, epoch
        local = len(launch.pods[pod].ranks)
        self._writer = Ring(memory).writer(local) if local > 1 else None
        self._channel = grpc.insecure_channel(f"{leader.host}:{leader.control_port}", options=CHANNEL_OPTIONS)
        self._call = worker_pb2_grpc.WorkerStub(self._channel).Run(pb.RunRequest(epoch=epoch, pod=pod))
        threading.Thread(target=self._watch, name="plans-watch", daemon=True).start()
        self._next()

    def _over(self) -> bool:
        return self._memory.aborted_epoch >= self._epoch

    def _watch(self) -> None:
        """A stream that still stands when the epoch ends here is closed, which wakes the reader."""
        done = threading.Event()
        if not self._call.add_callback(done.set):
            return
        while not done.wait(0.05):
            if self._over():
                self._call.cancel()
                return

    def _next(self) -> pb.RunResponse:
        try:
            response: pb.RunResponse = next(self._call)
        except (grpc.RpcError, StopIteration) as error:
            raise GroupAborted(f"epoch {self._epoch}: the plan stream ended") from error
        if response.epoch != self._epoch:
            raise GroupAborted(f"a plan of epoch {response.epoch} came in epoch {self._epoch}")
        return response

    def __iter__(self) -> Iterator[StepPlan]:
        """Raises GroupAborted when the epoch ends."""
        while True:
            response = self._next()
            if self._writer is not None:
                self._writer.write(pack_plan(response.epoch, response.step, response.plan), self._over)
            yield _decoder.decode(response.plan)

    def close(self) -> None:
        self._call.cancel()
        self._channel.close()


def open_plans(launch: Launch, rank: int, memory: PodMemory, epoch: int) -> RingPlans | DialledPlans:
    """The source of plans of a rank other than the leader."""
    pod = launch.pod_of(rank)
    index = launch.pods[pod].ranks.index(rank)
    return DialledPlans(launch, pod, memory, epoch) if pod and index == 0 else RingPlans(memory, index, epoch)
