"""An API server that is away, forgets, refuses, or is slow: the operator waits it out and misses nothing."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from tests.cluster.processes import Program, wait_until
from tests.operator.live.process import Operator
from tests.operator.live.proxy import ApiProxy, Call, Cut, Forward, refusal, through
from tests.operator.live.world import World, meanwhile, path_of

pytestmark = pytest.mark.cluster

Start = Callable[..., Operator]
AWAY = 5.0
"""Seconds that the API server cannot be reached; --campaign 12 makes it a minute. A lease lasts 10 s without it."""


async def away(_: Call, __: Forward) -> Any:
    raise Cut


class Three:
    """Three deployments that serve, and what users do to them while the operator cannot see it."""

    def __init__(self, world: World, proxy: ApiProxy, spaces: Callable[[], str]) -> None:
        self._world = world
        self.deleted, self.edited, self.scaled = spaces(), spaces(), spaces()
        for space in (self.deleted, self.edited, self.scaled):
            world.deploy(space)
        world.wait_ready(self.deleted, self.edited, self.scaled)
        world.wait_quiet(proxy)
        self._before = world.snapshot(self.edited)

    def change(self) -> None:
        api, edited = self._world.api, self.edited
        self._world.remove(self.deleted)
        api.delete(path_of("services", edited, "llama-router"))
        api.patch(path_of("deployments", edited, "llama-router"), {"spec": {"replicas": 3}})
        api.delete(path_of("pods", edited, "llama-0-1"), gracePeriodSeconds="0")
        self._world.edit(self.scaled, replicas=2)

    def wait(self) -> None:
        """All is as it should be."""
        world = self._world
        world.wait_gone(self.deleted)
        world.wait_same(self.edited, self._before)
        wait_until(lambda: world.status(self.scaled).get("ready") == "2/2", "the replica that was asked for")
        world.wait_ready(self.edited, self.scaled)


def test_what_happened_while_the_api_server_was_away_is_made_good(
    world: World, proxy: ApiProxy, operator: Operator, spaces: Callable[[], str], campaign: int
) -> None:
    three = Three(world, proxy, spaces)
    proxy.fault = away
    proxy.cut()
    three.change()
    time.sleep(AWAY * campaign)
    assert operator.poll() is None
    assert operator.health("live")[0] == 200, "restarting it would help nobody"
    assert operator.health("ready")[0] == 503
    proxy.fault = through
    began = time.monotonic()
    three.wait()
    print(f"unreachable for {AWAY * campaign:g} s: all made good {time.monotonic() - began:.1f} s after its return")
    wait_until(lambda: operator.health("ready")[0] == 200, "an operator that sees everything")


@pytest.mark.parametrize("victim", ["etcd", "kube-apiserver"])
def test_the_control_plane_restarts_and_the_operator_goes_on(
    world: World, proxy: ApiProxy, operator: Operator, spaces: Callable[[], str], victim: str
) -> None:
    three = Three(world, proxy, spaces)
    program: Program = next(p for p in world.cluster.control_plane.programs if p.name == victim)
    program.kill()
    wait_until(lambda: not world.api.is_ready(), "an API server that is not ready", 20.0)
    program.start()
    world.cluster.wait_for_api()
    three.change()
    began = time.monotonic()
    with meanwhile(lambda: world.play_kubelets(three.edited, three.scaled), every=0.5):
        three.wait()
    print(f"{victim} restarted: all well {time.monotonic() - began:.1f} s after")
    assert operator.poll() is None


class Gap:
    """Watches that end, and cannot go on from where they were: what happened meanwhile, no event will ever tell."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.until = float("inf")
        self.gone: Counter[str] = Counter()

    async def fault(self, call: Call, forward: Forward) -> Any:
        if not call.watch and not (call.method == "GET" and not call.name):
            return await forward()
        await self.open.wait()
        if not call.watch or call.at > self.until:
            return await forward()
        self.gone[call.plural] += 1
        if len(call.plural) % 2 and call.plural != "llamadeployments":
            return refusal(410, "Expired", "too old resource version")
        status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
        return web.json_response({"type": "ERROR", "object": status})


def test_deletions_in_a_gap_that_no_watch_bridges_are_noticed(
    world: World, proxy: ApiProxy, operator: Operator, spaces: Callable[[], str]
) -> None:
    three = Three(world, proxy, spaces)
    gap = Gap()
    proxy.fault = gap.fault
    proxy.cut()
    three.change()
    world.wait_gone(three.deleted)
    time.sleep(1.0)
    gap.until = time.monotonic()
    proxy.call_soon(gap.open.set)
    three.wait()
    print(f"410 Gone: {dict(gap.gone)}")
    assert gap.gone["services"]
    assert operator.poll() is None
    world.wait_quiet(proxy)
    assert not world.children(three.deleted), "what is gone is not made again"
    gone = f'namespace="{three.deleted}"'
    wait_until(lambda: operator.metric("arriero_deployment_phase", gone) == 0.0, "end of the series of what is gone")


@pytest.mark.parametrize("trouble", ["refusals", "slowness"])
def test_refusals_and_slowness_only_cost_time(
    world: World, proxy: ApiProxy, operators: Start, spaces: Callable[[], str], trouble: str, seed: int
) -> None:
    chance = random.Random(seed)
    operator = operators()
    plain, space = spaces(), spaces()
    world.deploy(plain, replicas=2)
    world.wait_ready(plain)
    world.edit(plain, engine={"maxRunning": 64})
    wait_until(lambda: world.status(plain).get("phase") != "Ready", "the beginning of the update")
    world.wait_ready(plain)
    world.wait_quiet(proxy)
    told: Counter[int] = Counter()

    async def fault(call: Call, forward: Forward) -> Any:
        if call.plural == "leases":
            return await forward()
        if trouble == "slowness":
            await asyncio.sleep(chance.uniform(0.1, 0.6))
            return await forward()
        status = chance.choice((409, 429, 500, 503, 0)) if chance.random() < 0.25 else 200
        told[status] += 1
        match status:
            case 200:
                return await forward()
            case 0:
                if chance.random() < 0.5:
                    await forward()
                raise Cut
            case 409:
                return refusal(409, "Conflict", "the object has been modified; please apply your changes again")
            case 429:
                return refusal(429, "TooManyRequests", **{"Retry-After": "1"})
        return refusal(status, "InternalError")

    proxy.fault = fault
    proxy.cut()
    began = time.monotonic()
    world.deploy(space, replicas=2)
    world.wait_ready(space, timeout=120.0)
    world.edit(space, engine={"maxRunning": 64})
    wait_until(lambda: world.status(space).get("phase") != "Ready", "the beginning of the update", 60.0)
    world.wait_ready(space, timeout=120.0)
    proxy.fault = through
    print(f"{trouble}: applied and updated in {time.monotonic() - began:.1f} s: {dict(told)}")
    world.wait_ready(space)
    world.wait_quiet(proxy, 2.0)
    found = Counter(key[0] for key in world.snapshot(space))
    assert found == Counter(key[0] for key in world.snapshot(plain))
    assert "Traceback" not in operator.words()
    assert operator.poll() is None


def test_a_token_that_expires_is_read_anew(world: World, proxy: ApiProxy, operators: Start, space: str) -> None:
    """In a pod the kubelet renews the token on disk."""
    first, second = world.token(), world.token()
    folder = world.account_folder(proxy, first)
    operator = operators(account=folder)
    world.deploy(space)
    world.wait_ready(space)
    refused = 0

    async def fault(call: Call, forward: Forward) -> Any:
        nonlocal refused
        if call.token == first:
            refused += 1
            return refusal(401, "Unauthorized", "Unauthorized")
        return await forward()

    (folder / "token").write_text(second)
    proxy.fault = fault
    proxy.cut()
    began = time.monotonic()
    world.edit(space, replicas=2)
    wait_until(lambda: world.status(space).get("ready") == "2/2", "the second replica", 40.0)
    print(f"{refused} calls were refused; served again {time.monotonic() - began:.1f} s after the token expired")
    assert refused
    assert operator.poll() is None
