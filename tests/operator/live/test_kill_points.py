"""The operator is killed after every single write that it makes, and started again: it comes to the same objects.

Two campaigns. In a chain of lives each operator makes one write and is dead before it hears that it was made. In the
fan, one deployment for each number n, nothing of the operator reaches a deployment after its n-th write; then it is
killed, and its successor goes on from all those states at once.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from tests.cluster.processes import wait_until
from tests.operator.live.process import Operator
from tests.operator.live.proxy import ApiProxy, Call, Cut, Forward, refusal, through
from tests.operator.live.world import World, differences

pytestmark = pytest.mark.cluster

Start = Callable[..., Operator]
IMAGE = {"workerImage": "arriero-worker:2"}
"""Another worker image: every group must be replaced by one of the new revision."""


class Plain:
    """One deployment's life without trouble: what there is in the end, and what was written for it."""

    def __init__(self, world: World, space: str) -> None:
        proxy = world.proxy()
        operator = world.start(proxy)
        try:
            world.deploy(space)
            world.wait_ready(space)
            world.wait_quiet(proxy)
            self.applied, self.apply_writes = world.snapshot(space), proxy.writes(space)
            operator.kill()
            operator = world.start(proxy, IMAGE)
            wait_until(lambda: runs(world, space, IMAGE["workerImage"]), "the update")
            world.wait_quiet(proxy)
            self.updated, self.update_writes = world.snapshot(space), proxy.writes(space)[len(self.apply_writes) :]
            world.remove(space)
            world.wait_gone(space)
            self.delete_writes = proxy.writes(space)[len(self.apply_writes) + len(self.update_writes) :]
        finally:
            operator.kill()
            proxy.close()


@pytest.fixture(scope="module")
def plain(world: World) -> Iterator[Plain]:
    space = "undisturbed"
    world.api.create("/api/v1/namespaces", {"metadata": {"name": space}})
    yield Plain(world, space)
    world.api.delete(f"/api/v1/namespaces/{space}")


class Chain:
    """Lives that end with their first write."""

    def __init__(self, proxy: ApiProxy, start: Start, space: str) -> None:
        self._start = start
        self._proxy = proxy
        self._space = space
        self._operator: Operator | None = None
        self._killed: list[Call] = []
        self._one = asyncio.Lock()

    async def fault(self, call: Call, forward: Forward) -> Any:
        """Writes go one by one, though the operator makes several at a time: the first is the life's only one."""
        if not call.writes or call.namespace != self._space:
            return await forward()
        async with self._one:
            operator = self._operator
            if operator is None or operator.poll() is not None:
                raise Cut
            answer = await forward()
            if not 200 <= call.status < 300:
                return answer
            operator.kill()
            self._killed.append(call)
            raise Cut

    def run(self, rests: Callable[[], bool], config: Any, most: int = 150) -> list[Call]:
        """Until `rests` and a life writes nothing for a while; after which writes it was killed."""
        self._killed = []
        self._proxy.fault = self.fault
        for _ in range(most):
            self._operator = self._start(config=config)
            rested = 0.0
            while self._operator.poll() is None and rested < 0.6:
                time.sleep(0.02)
                rested = rested + 0.02 if self._operator.leads and rests() else 0.0
            if self._operator.poll() is None:
                self._proxy.fault = through
                self._operator.kill()
                return self._killed
        raise AssertionError(f"no rest after {most} lives: {Counter(map(str, self._killed))}")


def targets(calls: Iterable[Call]) -> set[str]:
    """What was written, but for the status and events: how many of them there are is a matter of time."""
    words = {re.sub(r"-[0-9a-f]{10}$", "", str(call)) for call in calls}
    return {word for word in words if not word.startswith(("POST events", "PATCH llamadeployments"))}


def test_an_operator_that_dies_with_each_write_gets_there(
    world: World, plain: Plain, proxy: ApiProxy, operators: Start, spaces: Callable[[], str]
) -> None:
    began = time.monotonic()
    space = spaces()
    chain = Chain(proxy, operators, space)

    world.deploy(space)
    apply = chain.run(lambda: runs(world, space, "arriero-worker:1"), {})
    assert not differences(plain.applied, world.snapshot(space))
    update = chain.run(lambda: runs(world, space, IMAGE["workerImage"]), IMAGE)
    assert not differences(plain.updated, world.snapshot(space))
    world.remove(space)
    delete = chain.run(lambda: not world.children(space), IMAGE)
    world.wait_gone(space)
    print(
        f"{len(apply)} + {len(update)} + {len(delete)} kill points (apply, update, delete) in one chain of lives, "
        f"{time.monotonic() - began:.1f} s; undisturbed {len(plain.apply_writes)} + {len(plain.update_writes)} + "
        f"{len(plain.delete_writes)} writes"
    )
    assert targets(plain.apply_writes) == targets(apply), "each write was a kill point"
    assert targets(plain.update_writes) == targets(update)


class Fan:
    """Lets so many writes through to each namespace, and no more; whether the last was made, nobody hears."""

    def __init__(self, limits: dict[str, int]) -> None:
        self.made: Counter[str] = Counter()
        self._limits = limits

    async def fault(self, call: Call, forward: Forward) -> Any:
        limit = self._limits.get(call.namespace)
        if not call.writes or limit is None:
            return await forward()
        if self.made[call.namespace] >= limit:
            return refusal(503, "ServiceUnavailable")
        self.made[call.namespace] += 1
        answer = await forward()
        if call.status >= 300:
            self.made[call.namespace] -= 1
        elif self.made[call.namespace] >= limit:
            raise Cut
        return answer

    @property
    def reached(self) -> set[str]:
        return {space for space, limit in self._limits.items() if self.made[space] >= limit}


def test_from_every_state_that_a_killed_operator_leaves_its_successor_gets_there(
    world: World, plain: Plain, proxy: ApiProxy, operators: Start, spaces: Callable[[], str], campaign: int
) -> None:
    began = time.monotonic()
    limits = {spaces(): number for number in range(1, len(plain.apply_writes) + 1)}
    abandoned = {spaces(): number for number in range(1, len(plain.apply_writes) + 1, 3)}
    for space in (*limits, *abandoned):
        world.deploy(space)

    fan = Fan(limits | abandoned)
    proxy.fault = fan.fault
    _run(world, operators(), fan, [*limits, *abandoned])
    applied = len(fan.reached & limits.keys())
    for space in abandoned:  # deleted while nobody is there to see it
        world.remove(space, policy="Foreground" if abandoned[space] % 2 else "Background")
    proxy.fault = through
    operator = operators()
    world.wait_ready(*limits)
    world.wait_gone(*abandoned)
    world.wait_quiet(proxy)
    for space, number in limits.items():
        assert not differences(plain.applied, world.snapshot(space)), f"killed after write {number} of the apply"
    print(f"apply: {applied} kill points, deleted half-made: {len(abandoned)}, {time.monotonic() - began:.1f} s")

    # The chain has been at every point of the update already: every second one here, each with --campaign 2.
    points = range(1, len(plain.update_writes) + 1, 2 if campaign == 1 else 1)
    rest = [*limits][len(points) :]
    for space in rest:
        world.remove(space)
    world.wait_gone(*rest)
    operator.kill()
    limits = dict(zip(limits, points, strict=False))
    fan = Fan(limits)
    proxy.fault = fan.fault
    _run(world, operators(config=IMAGE), fan, [*limits], IMAGE["workerImage"])
    updated = len(fan.reached)
    proxy.fault = through
    operator = operators(config=IMAGE)
    wait_until(lambda: all(runs(world, space, IMAGE["workerImage"]) for space in limits), "the update", 120.0)
    world.wait_ready(*limits)
    world.wait_quiet(proxy)
    for space, number in limits.items():
        assert not differences(plain.updated, world.snapshot(space)), f"killed after write {number} of the update"
    print(f"update: {updated} kill points, {time.monotonic() - began:.1f} s")

    before = len(proxy.calls)
    for number, space in enumerate(fan.made):
        world.remove(space, policy=("Background", "Foreground")[number % 2])
        if number == len(fan.made) // 2:
            operator.kill()
            operator = operators(config=IMAGE)
    world.wait_gone(*fan.made)
    written = sum(len(proxy.writes(space, before)) for space in fan.made)
    print(f"delete: {written} writes of the operator in {len(fan.made)} deletions, {time.monotonic() - began:.1f} s")
    assert applied >= len(plain.apply_writes) - 3
    assert updated >= len(points) - 3


def _run(world: World, operator: Operator, fan: Fan, spaces: list[str], image: str = "arriero-worker:1") -> None:
    """Until each namespace has had its writes, or all that it needs; then kill."""

    def over() -> bool:
        rest = set(spaces) - fan.reached
        return all(runs(world, space, image) for space in rest)

    wait_until(over, "the last write of each deployment", 120.0)
    operator.kill()


def runs(world: World, space: str, image: str) -> bool:
    """Whether it serves, with this image in all its workers and no other."""
    workers = [pod for pod in world.list("pods", space) if pod["metadata"]["labels"].get("serving.arriero.dev/group")]
    images = {pod["spec"]["containers"][0]["image"] for pod in workers}
    return world.status(space).get("phase") == "Ready" and images == {image}
