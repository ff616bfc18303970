"""Once there is what is wanted, the operator reads and does not write."""

from __future__ import annotations

import time

import pytest
from tests.operator.live.process import Operator
from tests.operator.live.proxy import ApiProxy
from tests.operator.live.world import World, path_of

pytestmark = pytest.mark.cluster


def test_at_rest_nothing_is_written(world: World, proxy: ApiProxy, operator: Operator, space: str) -> None:
    world.deploy(space, replicas=2)
    world.wait_ready(space)
    world.wait_quiet(proxy)
    before = len(proxy.calls)
    passes = operator.metric("arriero_operator_passes_total")
    # A resync is a pass without a change: anything that wakes the operator and concerns no decision makes one.
    for number in range(2):
        resource = path_of("llamadeployments", space, "llama")
        world.api.patch(resource, {"metadata": {"annotations": {"example.com/touched": str(number)}}})
        for plural, name in world.children(space):
            change = {"metadata": {"annotations": {"example.com/touched": str(number)}}}
            world.api.patch(path_of(plural, space, name), change)
        world.wait_quiet(proxy)
    until = time.monotonic() + 10.0  # heartbeats of nodes, renewals of leases
    while operator.metric("arriero_operator_passes_total") < passes + 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert operator.metric("arriero_operator_passes_total") >= passes + 2
    assert not proxy.writes(space, before), proxy.counts(space, before)
