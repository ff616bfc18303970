"""The data plane between real processes: what every collective computes, and how the end of an epoch reaches those
who wait in it.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.worker.group.groups import launch_of

from arriero_plan.launch import Launch
from arriero_worker.group.comm import GroupAborted
from arriero_worker.group.data import GroupData
from arriero_worker.group.memory import SLOT_BYTES, PodMemory

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["arriero_worker.group.data"])


def rank_main(group: Launch, rank: int, memory: str, epoch: int, body: Callable[..., Any], pipe: Connection) -> None:
    torch.set_num_threads(1)
    pod = group.pods[group.pod_of(rank)]
    store = dist.TCPStore("127.0.0.1", pod.store_port, None, rank == 0, wait_for_workers=False)
    data = GroupData(group, rank, epoch, store, PodMemory(memory, len(pod.ranks)))
    try:
        pipe.send(body(data, rank, pipe))
    except GroupAborted as error:
        pipe.send(error)
    pipe.recv()  # the store lives in rank 0: stay until told


class Ranks:
    """All ranks of a group as processes running `body(data, rank, pipe)`."""

    def __init__(self, group: Launch, body: Callable[..., Any]) -> None:
        self.memories = [PodMemory.create("test") for _ in group.pods]
        self.pipes, self.processes = [], []
        for rank in range(group.layout.world):
            here, there = context.Pipe()
            path = PodMemory.path_of(self.memories[group.pod_of(rank)])
            process = context.Process(target=rank_main, args=(group, rank, path, 1, body, there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def answer(self, rank: int) -> Any:
        assert self.pipes[rank].poll(60), f"rank {rank} does not answer"
        return self.pipes[rank].recv()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for fd in self.memories:
            os.close(fd)


@pytest.fixture
def start() -> Any:
    started: list[Ranks] = []

    def make(group: Launch, body: Callable[..., Any]) -> Ranks:
        started.append(Ranks(group, body))
        return started[-1]

    yield make
    for ranks in started:
        ranks.end()


def part(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(rank)).to(dtype)


def collect(data: GroupData, rank: int, pipe: Connection) -> list[bytes]:
    answers = []
    for size in (1, 7, 2048, SLOT_BYTES // 4 + 5):
        for dtype in (torch.float32, torch.bfloat16):
            answers.append(data.all_reduce(part(rank, size, dtype)))
    answers.append(data.all_gather(part(rank, 15, torch.float32).view(5, 3)))
    answers.append(data.all_gather(part(rank, 3 * 400_000, torch.float32).view(3, 400_000)))
    return [answer.contiguous().view(torch.uint8).numpy().tobytes() for answer in answers]


@pytest.mark.parametrize(("tensor", "per_pod"), [(2, 2), (4, 4), (2, 1)])
def test_every_rank_gets_the_same_sum_in_rank_order(start: Any, tensor: int, per_pod: int) -> None:
    ranks = start(launch_of(tensor=tensor, pipeline=1, ranks_per_pod=per_pod), collect)
    answers = [ranks.answer(rank) for rank in range(tensor)]
    expected = []
    for size in (1, 7, 2048, SLOT_BYTES // 4 + 5):
        for dtype in (torch.float32, torch.bfloat16):
            total = torch.zeros(size)
            for rank in range(tensor):
                total = total + part(rank, size, dtype).float()
            expected.append(total.to(dtype))
    expected.append(torch.cat([part(r, 15, torch.float32).view(5, 3) for r in range(tensor)], dim=-1))
    expected.append(torch.cat([part(r, 1_200_000, torch.float32).view(3, 400_000) for r in range(tensor)], dim=-1))
    for rank in range(tensor):
        for index, tensor_expected in enumerate(expected):
            assert answers[rank][index] == tensor_expected.contiguous().view(torch.uint8).numpy().tobytes(), (
                rank,
                index,
            )


def pass_on(data: GroupData, rank: int, pipe: Connection) -> list[float]:
    """Twelve steps through three stages, results back to the first, which does not wait for them before sending on."""
    stage, seen = rank, []
    for step in range(12):
        x = torch.full((step + 1, 2), float(step), dtype=torch.bfloat16)
        if stage > 0:
            data.recv(x.zero_())
        if stage < 2:
            data.send(x + 1)
        else:
            data.send_results([x.float(), torch.empty(0), torch.tensor([step])])
    if stage == 0:
        for step in range(12):
            x, number = torch.empty(step + 1, 2), torch.empty(1, dtype=torch.int64)
            data.recv_results([x, torch.empty(0), number])
            assert (x == step + 2).all()
            seen.append(number.item())
    return seen


def test_hidden_states_go_down_and_results_come_back_in_order(start: Any) -> None:
    ranks = start(launch_of(tensor=1, pipeline=3, ranks_per_pod=1), pass_on)
    assert ranks.answer(0) == list(range(12))
    assert ranks.answer(1) == ranks.answer(2) == []


def wait_for_ever(data: GroupData, rank: int, pipe: Connection) -> None:
    pipe.send("waiting")
    if rank == 0:
        data.recv_results([torch.empty(3)])
    else:
        pipe.recv()


def test_a_killed_rank_ends_waits_on_its_connections(start: Any) -> None:
    group = launch_of(tensor=1, pipeline=2, ranks_per_pod=1)
    ranks = start(group, wait_for_ever)
    assert [ranks.answer(rank) for rank in range(2)] == ["waiting"] * 2
    os.kill(ranks.processes[1].pid, signal.SIGKILL)
    assert isinstance(ranks.answer(0), GroupAborted)


def reduce_alone(data: GroupData, rank: int, pipe: Connection) -> None:
    pipe.send("waiting")
    if rank == 0:
        data.all_reduce(torch.ones(4))
    else:
        pipe.recv()


def test_the_abort_word_ends_waits_in_shared_memory(start: Any) -> None:
    ranks = start(launch_of(tensor=2, pipeline=1, ranks_per_pod=2), reduce_alone)
    assert [ranks.answer(rank) for rank in range(2)] == ["waiting"] * 2
    PodMemory(PodMemory.path_of(ranks.memories[0]), 2).abort_epoch(1)
    assert isinstance(ranks.answer(0), GroupAborted)
