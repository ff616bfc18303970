"""A control plane of its own for the operator's tests, and a proxy, a namespace and operators for each test."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.cluster import machine
from tests.cluster.cluster import keep_logs, start_cluster
from tests.cluster.conftest import (  # noqa: F401 - hooks of this room too
    FAILED,
    pytest_collection_modifyitems,
    pytest_runtest_makereport,
    unavailable,
)
from tests.cluster.processes import wait_until
from tests.cluster.traces import traces_of
from tests.operator.live.process import Operator
from tests.operator.live.proxy import ApiProxy
from tests.operator.live.world import LEASE, World, why_no_world

NODES, GPUS = 8, 64


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Without real nodes, whatever the machine has: nothing here runs in a container, and tests do it harm."""
    if lack := machine.why_no_control_plane() or machine.not_built("kwok") or why_no_world():
        unavailable(lack)
    cluster = start_cluster(0)
    made = World(cluster, tmp_path_factory.mktemp("operators"))
    try:
        made.prepare(NODES, GPUS)
        yield made
    finally:
        made.close()
        cluster.close()


@pytest.fixture
def proxy(world: World) -> Iterator[ApiProxy]:
    made = world.proxy()
    yield made
    made.close()


@pytest.fixture
def operators(world: World, proxy: ApiProxy, request: pytest.FixtureRequest) -> Iterator[Callable[..., Operator]]:
    """Starts an operator behind `proxy`, or behind the one given; all end with the test, and their lease with them."""
    started: list[Operator] = []

    def start(line: ApiProxy = proxy, **options: Any) -> Operator:
        started.append(world.start(line, **options))
        return started[-1]

    yield start
    for operator in started:
        operator.kill()
    if request.node.stash.get(FAILED, False):
        for operator in started[-3:]:
            request.node.add_report_section("teardown", operator.log.name, operator.words()[-8000:])
    if world.api.exists(LEASE):
        world.api.delete(LEASE)


@pytest.fixture
def operator(operators: Callable[..., Operator]) -> Operator:
    return operators()


@pytest.fixture
def spaces(world: World, request: pytest.FixtureRequest) -> Iterator[Callable[[], str]]:
    """Makes namespaces of the test's own, on their way out when the next test begins."""
    made: list[str] = []
    word = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower())[:30].strip("-")

    def make() -> str:
        digest = hashlib.sha256(f"{request.node.nodeid}{time.time_ns()}".encode()).hexdigest()[:8]
        world.api.create("/api/v1/namespaces", {"metadata": {"name": f"{word}-{digest}"}})
        made.append(f"{word}-{digest}")
        return made[-1]

    yield make
    if request.node.stash.get(FAILED, False):
        traces = {
            f"{number}-{file}": text
            for number, namespace in enumerate(made[:3])
            for file, text in traces_of(world.api, namespace).items()
            if not file.endswith(".log")  # simulated containers have none
        }
        request.node.add_report_section("teardown", "events", "\n".join(traces.values())[-12000:])
        print("kept in", keep_logs(world.cluster.layout, word, traces))
    for namespace in made:
        for o in world.list("llamadeployments", namespace):
            world.remove(namespace, o["metadata"]["name"])
        world.api.delete(f"/api/v1/namespaces/{namespace}")


@pytest.fixture
def space(world: World, spaces: Callable[[], str]) -> str:
    name = spaces()
    account = f"/api/v1/namespaces/{name}/serviceaccounts/default"  # without it no pod can be created
    wait_until(lambda: world.api.exists(account), f"service account of {name}")
    return name
