"""Following Prefixes.Watch: the router's marks of a replica are its own, or none."""

from __future__ import annotations

from tests.router.endpoints.fakes import Told, replica, running, until, wire

from arriero_router.core.replica import Endpoint
from arriero_router.endpoints.cache import CacheFollower


def endpoint(port: int) -> Endpoint:
    return Endpoint(name="a", host="127.0.0.1", http_port=1, grpc_port=port)


async def test_the_whole_set_first_and_then_what_changes() -> None:
    told = Told()
    async with replica() as server:
        server.held = [1, 2**64 - 1]
        async with running(CacheFollower(endpoint(server.port), told.on_marks).run()):
            await told.until(lambda: told.marks.get("a") == {1, 2**64 - 1})
            await server.delta(added=[3])
            await server.delta(added=[4], removed=[1])
            await told.until(lambda: told.marks["a"] == {2**64 - 1, 3, 4})
            await server.delta(added=[9], reset=True)
            await told.until(lambda: told.marks["a"] == {9})
    assert told.events[0] == ("marks", "a", True, (1, 2**64 - 1), ())


async def test_marks_are_taken_back_when_the_stream_breaks_and_come_anew() -> None:
    told = Told()
    async with replica() as server:
        server.held = [1, 2]
        async with running(CacheFollower(endpoint(server.port), told.on_marks).run()):
            await told.until(lambda: told.marks.get("a") == {1, 2})
            await server.stop()
            await told.until(lambda: told.marks["a"] == set())
            assert told.events[-1] == ("marks", "a", True, (), ())
            server.held = [3]
            await server.start()
            await told.until(lambda: told.marks["a"] == {3})
    assert len([event for event in told.events if event[3:] == ((), ())]) == 1, "taken back once"


async def test_a_replica_without_watch_is_left_alone_until_again() -> None:
    told = Told()
    async with replica(prefixes=False) as server:
        follower = CacheFollower(endpoint(server.port), told.on_marks)
        async with running(follower.run()):
            await until(lambda: follower.idle)
            server._prefixes = True
            await server.stop()
            server.held = [5]
            await server.start()
            assert follower.idle
            follower.again()
            await told.until(lambda: told.marks.get("a") == {5})
    assert told.events == [("marks", "a", True, (5,), ())]


async def test_again_ends_a_stream_that_would_never_end() -> None:
    told = Told()
    async with replica() as server, wire(server.port) as line:
        server.held = [1]
        follower = CacheFollower(endpoint(line.port), told.on_marks)
        async with running(follower.run()):
            await told.until(lambda: told.marks.get("a") == {1})
            line.freeze()
            server.held = [2]
            follower.again()
            await told.until(lambda: told.marks["a"] == set())
            line.thaw()
            await told.until(lambda: told.marks["a"] == {2})
    assert server.watched >= 2
