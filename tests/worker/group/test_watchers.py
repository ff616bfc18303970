"""Those who watch a pod's status: hundreds at once, slow ones, ones that leave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest
from tests.worker.group.test_control import Joined, Pod, form, pods

from arriero.inference.v1 import worker_pb2 as pb
from arriero.inference.v1 import worker_pb2_grpc
from arriero_worker.group.board import TOLD_SECONDS, Board

__all__ = ["pods"]
WATCHERS = 300


class Watcher:
    """Takes every status; `phase` is of the last."""

    def __init__(self, stub: worker_pb2_grpc.WorkerStub) -> None:
        self.call = stub.Status(pb.StatusRequest(), timeout=60)  # type: ignore[attr-defined]
        self.phase: int = pb.PHASE_UNSPECIFIED
        self.task = asyncio.create_task(self._run())
        self._next: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def _run(self) -> None:
        async for status in self.call:
            self.phase = status.phase
            self._next.set_result(None)
            self._next = asyncio.get_running_loop().create_future()

    def changed(self) -> asyncio.Future[None]:
        """Done when the next status has come."""
        return self._next


@asynccontextmanager
async def watching(pod: Pod, count: int) -> AsyncIterator[list[Watcher]]:
    target = f"127.0.0.1:{pod.launch.pods[0].control_port}"
    async with grpc.aio.insecure_channel(target) as channel:
        watchers = [Watcher(worker_pb2_grpc.WorkerStub(channel)) for _ in range(count)]
        try:
            yield watchers
        finally:
            for watcher in watchers:
                watcher.task.cancel()
            await asyncio.gather(*(watcher.task for watcher in watchers), return_exceptions=True)


async def until(watchers: list[Watcher], phase: int) -> None:
    async with asyncio.timeout(30):
        while any(watcher.phase != phase for watcher in watchers):
            await asyncio.wait([watcher.changed() for watcher in watchers if watcher.phase != phase][:1])


async def test_watchers_cost_no_threads_and_all_hear_of_a_loss(pods: list[Pod]) -> None:
    ranks = await asyncio.to_thread(form, pods)
    for rank in range(2):
        ranks[rank].say(status=pb.RankStatus(rank=rank, phase=pb.PHASE_SERVING, epoch=1))
    async with watching(pods[0], 1) as first:
        await until(first, pb.PHASE_SERVING)
        before = threading.active_count()
        async with watching(pods[0], WATCHERS) as watchers:
            await until(watchers, pb.PHASE_SERVING)
            assert threading.active_count() <= before + 1
            pods[0].control.lost(1, "a test")
            await until(watchers, pb.PHASE_STARTING)
            ranks[0].say(ready=pb.Ready(weights_digest="w"))
            answer = await asyncio.to_thread(ranks[0].hear)
            assert answer.abort.epoch == 1, "a rank is heard among so many"
            successor = Joined(pods[0], 1)
            successor.say(ready=pb.Ready(weights_digest="w"))
            assert (await asyncio.to_thread(successor.hear)).form.epoch == 2


def status(step: int, phase: int = pb.PHASE_SERVING) -> pb.StatusResponse:
    return pb.StatusResponse(phase=phase, epoch=step)  # type: ignore[arg-type]


async def test_numbers_wait_and_news_does_not() -> None:
    board, loop = Board(), asyncio.get_running_loop()
    board.post(status(1), now=True)
    watch = board.watch()
    assert await watch.next() == status(1), "the first one at once"
    began = loop.time()
    board.post(status(2), now=False)
    board.post(status(3), now=False)
    assert await watch.next() == status(3), "what came between is not told"
    assert loop.time() - began >= 0.7 * TOLD_SECONDS
    next_one = asyncio.create_task(watch.next())
    await asyncio.sleep(0)
    began = loop.time()
    board.post(status(4, pb.PHASE_FAILED), now=True)
    assert await next_one == status(4, pb.PHASE_FAILED)
    assert loop.time() - began < 0.5 * TOLD_SECONDS


async def test_news_while_a_watcher_is_busy_is_told_at_once() -> None:
    board, loop = Board(), asyncio.get_running_loop()
    board.post(status(1), now=True)
    watch = board.watch()
    await watch.next()
    board.post(status(2), now=True)
    board.post(status(3), now=False)
    began = loop.time()
    assert await watch.next() == status(3)
    assert loop.time() - began < 0.5 * TOLD_SECONDS


async def test_a_watcher_that_leaves_takes_nothing_from_the_others() -> None:
    board = Board()
    board.post(status(1), now=True)
    watches = [board.watch() for _ in range(3)]
    for watch in watches:
        await watch.next()
    waiting = [asyncio.create_task(watch.next()) for watch in watches]
    await asyncio.sleep(0)
    waiting[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting[0]
    board.post(status(2), now=True)
    assert [await task for task in waiting[1:]] == [status(2), status(2)]


async def test_a_closed_board_ends_all_watches() -> None:
    board = Board()
    board.post(status(1), now=True)
    watch = board.watch()
    await watch.next()
    waiting = asyncio.create_task(watch.next())
    await asyncio.sleep(0)
    board.close()
    assert await waiting is None
    assert await board.watch().next() is None
