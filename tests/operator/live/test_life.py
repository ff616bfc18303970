"""One deployment's life on a real API server: applied, served, at rest, deleted."""

from __future__ import annotations

import time

import pytest
from tests.operator.live.process import Operator
from tests.operator.live.proxy import ApiProxy
from tests.operator.live.world import World

pytestmark = pytest.mark.cluster


def test_applied_it_comes_to_serve_and_deleted_it_leaves_nothing(
    world: World, proxy: ApiProxy, operator: Operator, space: str
) -> None:
    began = time.monotonic()
    world.deploy(space, replicas=2)
    world.wait_ready(space)
    print(f"ready {time.monotonic() - began:.1f} s after it was applied: {dict(proxy.counts(space))}")
    status = world.status(space)
    assert (status["ready"], status["plan"]["layout"], status["replicas"]) == ("2/2", "TP1xPP2", 2)
    assert len(world.list("pods", space, deployment="llama")) == 5, "two groups of two, and a router"
    world.remove(space)
    world.wait_gone(space)
