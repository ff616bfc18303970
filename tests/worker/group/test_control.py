"""The control port: what ranks, operators and latecomers are told, over real gRPC."""

import os
import queue
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from tests.worker.group.groups import free_port, launch_of

from arriero.inference.v1 import worker_pb2 as pb
from arriero.inference.v1 import worker_pb2_grpc
from arriero_plan.launch import Launch
from arriero_worker.group.control import Control
from arriero_worker.group.memory import PodMemory
from arriero_worker.group.ring import Ring, pack_plan


class Pod:
    def __init__(self, launch: Launch, index: int) -> None:
        self.launch = launch
        self.fd = PodMemory.create("test")
        self.memory = PodMemory(PodMemory.path_of(self.fd), len(launch.pods[index].ranks))
        self.control = Control(launch, index, self.memory)
        self.control.start()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{launch.pods[index].control_port}")
        self.stub = worker_pb2_grpc.WorkerStub(self.channel)

    def close(self) -> None:
        self.channel.close()
        self.control.stop()
        os.close(self.fd)


class Joined:
    """A rank's stream, driven by hand."""

    def __init__(self, pod: Pod, rank: int, epoch: int = 0, digest: str | None = None) -> None:
        self.outbox: queue.SimpleQueue[pb.JoinRequest | None] = queue.SimpleQueue()
        hello = pb.Hello(rank=rank, epoch=epoch, launch_digest=digest or pod.launch.digest, pid=1)
        self.outbox.put(pb.JoinRequest(hello=hello))
        self.call = pod.stub.Join(iter(self.outbox.get, None), timeout=30)

    def say(self, **event: Any) -> None:
        self.outbox.put(pb.JoinRequest(**event))

    def hear(self) -> pb.JoinResponse:
        return next(self.call)


@pytest.fixture
def pods() -> Iterator[list[Pod]]:
    store = free_port()
    launch = launch_of(
        tensor=1, pipeline=2, ranks_per_pod=1, control_ports=[free_port(), free_port()], store_port=store
    )
    both = [Pod(launch, 0), Pod(launch, 1)]
    yield both
    for pod in both:
        pod.close()


def form(pods: list[Pod]) -> list[Joined]:
    ranks = [Joined(pods[0], rank) for rank in range(2)]
    for rank in ranks:
        rank.say(ready=pb.Ready(weights_digest="w"))
    for rank in ranks:
        assert rank.hear().form.epoch == 1
        rank.say(formed=pb.Formed(epoch=1))
    return ranks


def test_a_broken_stream_is_a_lost_rank_and_its_successor_forms_the_next_epoch(pods: list[Pod]) -> None:
    ranks = form(pods)
    ranks[1].call.cancel()
    answer = ranks[0].hear()
    assert answer.abort.epoch == 1
    assert pods[0].memory.aborted_epoch == 1
    ranks[0].say(ready=pb.Ready(weights_digest="w"))
    successor = Joined(pods[0], 1)
    successor.say(ready=pb.Ready(weights_digest="w"))
    assert ranks[0].hear().form.epoch == 2
    assert successor.hear().form.epoch == 2


def test_plans_reach_a_dialled_pod_from_the_first_on_and_the_stream_ends_with_its_epoch(pods: list[Pod]) -> None:
    ranks = form(pods)
    run = pods[0].stub.Run(pb.RunRequest(epoch=1, pod=1), timeout=30)
    assert next(run) == pb.RunResponse(epoch=1)
    writer = Ring(pods[0].memory).writer(3)
    writer.write(pack_plan(0, 7, b"of an older epoch"), lambda: False)
    writer.write(pack_plan(1, 8, b"plan"), lambda: False)
    assert next(run) == pb.RunResponse(epoch=1, step=8, plan=b"plan")
    ranks[1].say(broken=pb.Broken(epoch=1, reason="a test"))
    with pytest.raises(grpc.RpcError) as error:
        next(run)
    assert error.value.code() == grpc.StatusCode.ABORTED


@pytest.mark.parametrize("epoch", [0, 2])
def test_plans_of_an_epoch_that_is_not_are_refused(pods: list[Pod], epoch: int) -> None:
    ranks = form(pods)
    with pytest.raises(grpc.RpcError, match=f"epoch {epoch} is over, the group is at 1") as error:
        next(pods[0].stub.Run(pb.RunRequest(epoch=epoch, pod=1), timeout=30))
    assert error.value.code() == grpc.StatusCode.ABORTED
    del ranks


def test_a_rank_that_speaks_of_an_old_epoch_is_refused_and_counts_as_lost(pods: list[Pod]) -> None:
    ranks = form(pods)
    for turn in (2, 3):
        ranks[0].say(broken=pb.Broken(epoch=turn - 1, reason="again"))
        for rank in ranks:
            assert rank.hear().abort.epoch == turn - 1
            rank.say(ready=pb.Ready(weights_digest="w"))
        for rank in ranks:
            assert rank.hear().form.epoch == turn
    ranks[1].say(formed=pb.Formed(epoch=1))
    with pytest.raises(grpc.RpcError, match="speaks of epoch 1") as error:
        ranks[1].hear()
    assert error.value.code() == grpc.StatusCode.ABORTED
    assert ranks[0].hear().abort.epoch == 3


def test_another_launch_file_is_refused(pods: list[Pod]) -> None:
    with pytest.raises(grpc.RpcError, match="launch file") as error:
        Joined(pods[0], 1, digest="other").hear()
    assert error.value.code() == grpc.StatusCode.ABORTED


def test_only_the_leaders_pod_answers_join_run_and_drain(pods: list[Pod]) -> None:
    other = pods[1]
    calls = [
        Joined(other, 1).call,
        other.stub.Run(pb.RunRequest(epoch=1, pod=1), timeout=30),
        other.stub.Drain(pb.DrainRequest(), timeout=30),
    ]
    for call in calls:
        with pytest.raises(grpc.RpcError, match="not the leader's") as error:
            next(call)
        assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_status_tells_every_ranks_truth(pods: list[Pod]) -> None:
    ranks = form(pods)
    stream = pods[0].stub.Status(pb.StatusRequest(), timeout=30)
    first = next(stream)
    assert (first.phase, first.run) == (pb.PHASE_STARTING, "")
    numbers = {"running": 3, "waiting": 2, "kv_blocks": 10, "kv_blocks_used": 4, "recoveries": 0, "run": 2**60 + 7}
    pods[0].memory.write_engine(**numbers, draining=False, tokens_per_second=12.5)
    loading = pb.RankStatus(rank=1, pod=1, phase=pb.PHASE_LOADING, bytes_loaded=5, bytes_total=9)
    ranks[0].say(status=pb.RankStatus(rank=0, pod=0, phase=pb.PHASE_SERVING, epoch=1, step=12))
    ranks[1].say(status=loading)
    status = next(s for s in stream if s.phase == pb.PHASE_LOADING)
    assert [rank.phase for rank in status.ranks] == [pb.PHASE_SERVING, pb.PHASE_LOADING]
    assert status.ranks[1] == loading
    assert (status.running, status.waiting, status.kv_blocks, status.kv_blocks_used) == (3, 2, 10, 4)
    assert (status.run, status.tokens_per_second) == (str(2**60 + 7), 12.5)
    ranks[1].say(status=pb.RankStatus(rank=1, pod=1, phase=pb.PHASE_FAILED, reason="model.safetensors is truncated"))
    status = next(s for s in stream if s.phase == pb.PHASE_FAILED)
    assert status.reason == "model.safetensors is truncated"


def test_drain_tells_the_leaders_rank_and_ends_when_nothing_is_left(pods: list[Pod]) -> None:
    ranks = form(pods)
    memory = pods[0].memory
    memory.write_engine(running=2, waiting=1, kv_blocks=10, kv_blocks_used=4, recoveries=0, draining=False)
    drain = pods[0].stub.Drain(pb.DrainRequest(), timeout=30)
    assert next(drain).remaining == 3
    assert ranks[0].hear().drain.draining
    memory.write_engine(running=0, waiting=0, kv_blocks=10, kv_blocks_used=0, recoveries=0, draining=True)
    assert [answer.remaining for answer in drain] == [0]


def test_a_rank_may_leave_once_the_engine_drained_and_the_engine_takes_requests_again(pods: list[Pod]) -> None:
    ranks = form(pods)
    memory = pods[0].memory
    memory.write_engine(running=1, waiting=0, kv_blocks=10, kv_blocks_used=4, recoveries=0, draining=False)
    ranks[1].say(leave=pb.Leave(grace_seconds=60))
    assert ranks[0].hear().drain.draining
    memory.write_engine(running=0, waiting=0, kv_blocks=10, kv_blocks_used=0, recoveries=0, draining=True)
    assert ranks[1].hear().HasField("release")
    ranks[1].outbox.put(None)
    answers = [ranks[0].hear(), ranks[0].hear()]
    assert any(answer.abort.epoch == 1 for answer in answers)
    assert any(answer.HasField("drain") and not answer.drain.draining for answer in answers)


def test_a_taken_control_port_is_one_sentence(pods: list[Pod]) -> None:
    with pytest.raises(OSError, match="in use"):
        Pod(pods[0].launch, 0)
