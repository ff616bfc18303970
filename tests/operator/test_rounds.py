"""Rounds of passes, with a writer that only listens."""

from __future__ import annotations

import asyncio

import pytest
from tests.operator.fake_cluster import NAMESPACE, SETTINGS, FakeCluster

from arriero_operator.observe import Observed
from arriero_operator.runtime import rounds
from arriero_operator.runtime.writer import Outcome
from arriero_operator.writes import Write


class Listening:
    def __init__(self, expected: int) -> None:
        self.seen: list[str] = []
        self.expected, self.all = expected, asyncio.Event()

    async def carry_out(self, observed: Observed, writes: tuple[Write, ...]) -> Outcome:
        self.seen.append(observed.name)
        if len(set(self.seen)) == self.expected:
            self.all.set()
        return Outcome()


async def test_however_long_a_placement_takes_each_round_decides_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_ROUND_SECONDS", -1.0)  # its time is over before it begins
    cluster, writer = FakeCluster(), Listening(3)
    made = rounds.Rounds(SETTINGS, lambda: cluster.now)
    for name in ("one", "two", "three"):
        cluster.create(name)
        made.store.put(cluster.objects["LlamaDeployment", name])
        made.wake((NAMESPACE, name))
    running = asyncio.create_task(made.run(writer))  # type: ignore[arg-type]
    try:
        async with asyncio.timeout(20):
            await writer.all.wait()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert writer.seen[:3] == ["one", "two", "three"]
