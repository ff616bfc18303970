"""Followers come and go with their endpoints."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from tests.router.endpoints.fakes import Replica, Told, replica, until, wire
from tests.router.endpoints.test_probe import BRISK, OK, health

from arriero_router.core.replica import Endpoint, Report
from arriero_router.endpoints.followers import Followers
from arriero_router.endpoints.probe import ProbeLimits
from arriero_router.endpoints.status import StatusLimits


def endpoint(name: str, server: Replica, **fields: int) -> Endpoint:
    return Endpoint(name=name, host="127.0.0.1", http_port=1, grpc_port=server.port, control_port=server.port, **fields)


async def test_endpoints_are_followed_while_they_are_there() -> None:
    told = Told()
    followers = Followers(told, told.on_marks)
    async with replica() as one, replica() as two:
        one.held, two.held = [1], [2]
        a, b = endpoint("a", one), endpoint("b", two)
        followers.set_endpoints([a])
        await told.until(lambda: told.ready("a") and told.marks.get("a") == {1})
        followers.set_endpoints([a, b])
        await told.until(lambda: told.ready("b") and told.marks.get("b") == {2})
        assert one.watched == 1, "who stays is not disturbed"
        followers.set_endpoints([b])
        seen = [event for event in told.events if event[1] == "a"]
        await one.set(running=1)
        await one.stop()
        await two.set(running=2)
        await told.until(lambda: told.reports["b"].running == 2)
        assert [event for event in told.events if event[1] == "a"] == seen, "nothing is told of who is gone"
        await followers.close()
        count = len(told.events)
        await two.stop()
    assert len(told.events) == count


async def test_one_that_leaves_is_followed_on() -> None:
    told = Told()
    followers = Followers(told)
    async with replica() as server:
        followers.set_endpoints([endpoint("a", server)])
        await told.until(lambda: told.ready("a"))
        followers.set_endpoints([replace(endpoint("a", server), terminating=True)])
        await server.set(running=1)
        await told.until(lambda: told.reports["a"].running == 1)
        await followers.close()
    assert told.losses == []
    assert server.watched == 0, "nobody wanted marks"


async def test_one_that_moved_is_followed_to_its_new_address() -> None:
    told = Told()
    followers = Followers(told, told.on_marks)
    async with replica() as old, replica() as new:
        await new.set(run="2")
        new.held = [7]
        followers.set_endpoints([endpoint("a", old)])
        await told.until(lambda: told.ready("a"))
        followers.set_endpoints([endpoint("a", new)])
        await told.until(lambda: told.reports["a"].run == "2" and told.marks.get("a") == {7})
        await followers.close()
    assert told.losses == []


async def test_without_a_control_port_an_endpoint_is_probed() -> None:
    told = Told()
    followers = Followers(told, probe=BRISK)
    async with health(lambda path: OK) as server:
        followers.set_endpoints([Endpoint(name="a", host="127.0.0.1", http_port=server.port)])
        await told.until(lambda: told.reports.get("a") == Report(ready=True))
        await followers.close()


async def test_a_lost_replica_is_asked_for_its_cache_anew() -> None:
    told = Told()
    followers = Followers(told, told.on_marks, status=StatusLimits(silence=0.2, answer=0.5))
    async with replica() as server, wire(server.port) as line:
        server.held = [1]
        there = replace(endpoint("a", server), grpc_port=line.port, control_port=line.port)
        followers.set_endpoints([there])
        await told.until(lambda: told.ready("a") and told.marks.get("a") == {1})
        line.freeze()
        await told.until(lambda: told.losses and told.marks["a"] == set())
        server.held = [2]
        line.thaw()
        await told.until(lambda: told.ready("a") and told.marks["a"] == {2})
        await followers.close()


async def test_a_listener_that_fails_is_reported_and_told_again(caplog: pytest.LogCaptureFixture) -> None:
    class Clumsy(Told):
        def told(self, name: str, report: Report) -> None:
            super().told(name, report)
            if len(self.events) == 1:
                raise RuntimeError("dropped it")

    told = Clumsy()
    followers = Followers(told)
    async with replica() as server:
        followers.set_endpoints([endpoint("a", server)])
        await told.until(lambda: len(told.events) == 2)
        await followers.close()
    assert "a follower failed" in caplog.text


async def test_closing_leaves_no_task_behind() -> None:
    told = Told()
    before = asyncio.all_tasks()
    followers = Followers(told, told.on_marks, probe=ProbeLimits())
    async with replica() as server:
        followers.set_endpoints(
            [endpoint(f"r{i}", server) for i in range(4)]
            + [Endpoint(name=f"gone{i}", host="127.0.0.1", http_port=9, grpc_port=9, control_port=9) for i in range(2)]
        )
        await until(lambda: sum(told.ready(f"r{i}") for i in range(4)) == 4)
        await followers.close()
    await until(lambda: asyncio.all_tasks() <= before)
