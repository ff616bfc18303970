"""Which replicas may take a request, under a virtual clock."""

from __future__ import annotations

import pytest

from arriero_router.core.pool import SHUN, Pool, PoolSettings
from arriero_router.core.replica import Endpoint, Replica, Report


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Place:
    """A pool with what it told."""

    def __init__(self, *names: str, **settings: float) -> None:
        self.clock = Clock()
        self.changes = 0
        self.gone: list[str] = []
        self.pool = Pool(
            PoolSettings(**settings),  # type: ignore[arg-type]
            self.clock,
            self._changed,
            lambda replica: self.gone.append(replica.name),
        )
        self.pool.set_endpoints([endpoint(name) for name in names])
        for name in names:
            self.ready(name)

    def _changed(self) -> None:
        self.changes += 1

    def ready(self, name: str, **fields: object) -> None:
        self.pool.told(name, Report(ready=True, **fields))  # type: ignore[arg-type]

    def usable(self, *avoid: str) -> str:
        return "".join(replica.name for replica in self.pool.candidates(set(avoid))[0])

    def shares(self) -> list[float]:
        return [round(share, 3) for share in self.pool.candidates(set())[1]]

    def of(self, name: str) -> Replica:
        replica = self.pool.get(name)
        assert replica is not None
        return replica


def endpoint(name: str, port: int = 8000, terminating: bool = False) -> Endpoint:
    return Endpoint(name, "h", port, terminating=terminating)


def test_a_replica_takes_requests_when_it_says_so() -> None:
    place = Place()
    place.pool.set_endpoints([endpoint("a"), endpoint("b")])
    assert place.usable() == ""
    place.ready("b")
    assert (place.usable(), place.pool.ready) == ("b", 1)
    place.pool.told("b", Report(ready=True, draining=True))
    assert place.usable() == ""
    place.ready("b")
    place.pool.lost("b", "silent")
    assert (place.usable(), place.of("b").report.reason) == ("", "silent")
    place.pool.told("c", Report(ready=True))
    assert place.usable() == "", "nobody knows c"


def test_one_that_is_asked_to_leave_takes_nothing_new() -> None:
    place = Place("a", "b")
    place.pool.set_endpoints([endpoint("a", terminating=True), endpoint("b")])
    assert place.usable() == "b"
    assert place.gone == [], "it is still there"
    place.pool.set_endpoints([endpoint("a"), endpoint("b")])
    assert place.usable() == "ab"


def test_counts_outlive_reports_and_the_list() -> None:
    place = Place("a")
    replica = place.of("a")
    place.pool.acquire(replica, 100)
    place.pool.acquire(replica, 50)
    place.pool.first_token(replica, 100)
    place.ready("a", running=7)
    place.pool.lost("a", "x")
    place.pool.set_endpoints([endpoint("a"), endpoint("b")])
    assert (replica.in_flight, replica.pending) == (2, 50)
    place.pool.set_endpoints([endpoint("b")])
    place.pool.release(replica, 0)
    place.pool.release(replica, 50)
    assert (replica.in_flight, replica.pending) == (0, 0)
    assert place.gone == ["a"]


def test_another_address_is_another_replica() -> None:
    place = Place("a")
    old = place.of("a")
    place.pool.acquire(old, 0)
    place.pool.set_endpoints([endpoint("a", port=8001)])
    new = place.of("a")
    assert new is not old
    assert (new.in_flight, place.usable(), place.gone) == (0, "", ["a"])
    place.pool.release(old, 0)
    assert new.in_flight == 0


def test_slots_are_small_and_never_shared() -> None:
    place = Place()
    for names in ("abc", "bcd", "d", "defg", "", "xyz"):
        place.pool.set_endpoints([endpoint(name) for name in names])
        slots = [replica.slot for replica in place.pool.replicas]
        assert len(set(slots)) == len(slots)
        assert all(slot <= 2 * 4 for slot in slots)


def test_others_are_what_the_last_report_counts_beyond_our_own() -> None:
    place = Place("a")
    replica = place.of("a")
    place.pool.acquire(replica, 0)
    place.ready("a", running=3, waiting=2)
    assert replica.others == 4
    place.pool.acquire(replica, 0)
    assert replica.others == 4, "until it reports again"
    place.ready("a", running=1)
    assert replica.others == 0


def test_slow_start_raises_the_share_of_a_newcomer() -> None:
    place = Place("a", slow_start=10)
    place.clock.now += 20
    assert place.shares() == [1.0]
    place.pool.set_endpoints([endpoint("a"), endpoint("b")])
    place.ready("b")
    assert place.shares() == [1.0, 0.1]
    place.clock.now += 5
    assert place.shares() == [1.0, 0.55]
    place.clock.now += 5
    assert place.shares() == [1.0, 1.0]
    place.pool.lost("b", "")
    place.ready("b")
    assert place.shares() == [1.0, 0.1], "it starts anew"


def test_replicas_that_start_together_share_alike() -> None:
    place = Place("a", "b", slow_start=10)
    assert place.shares() == [1.0, 1.0]
    place.clock.now += 3
    assert place.shares() == [1.0, 1.0]


def test_no_more_in_flight_than_allowed() -> None:
    place = Place("a", "b", max_in_flight=2)
    for _ in range(2):
        place.pool.acquire(place.of("a"), 0)
    assert place.usable() == "b"
    for _ in range(2):
        place.pool.acquire(place.of("b"), 0)
    assert place.usable() == ""
    place.pool.release(place.of("a"), 0)
    assert place.usable() == "a"


def test_a_newcomer_takes_at_least_one_under_a_limit() -> None:
    place = Place("a", slow_start=10, max_in_flight=4)
    place.clock.now += 20
    place.pool.set_endpoints([endpoint("a"), endpoint("b")])
    place.ready("b")
    assert place.usable() == "ab"
    place.pool.acquire(place.of("b"), 0)
    assert place.usable() == "a"
    place.clock.now += 5
    assert place.usable() == "ab", "0.55 of 4"


def test_replicas_to_avoid_are_taken_only_where_there_is_no_other() -> None:
    place = Place("a", "b", "c")
    assert place.usable("a", "c") == "b"
    assert place.usable("a", "b", "c") == "abc"
    assert place.usable("x") == "abc"


def test_one_that_keeps_failing_is_left_out_for_longer_each_time() -> None:
    place = Place("a", "b", eject_after=3, eject_base=1, eject_max=4)
    for length in (1, 2, 4, 4):
        for _ in range(3):
            assert place.usable() == "ab"
            place.pool.failed(place.of("a"))
        assert place.usable() == "b"
        place.clock.now += length - 0.01
        assert place.usable() == "b"
        place.clock.now += 0.01
    assert place.pool.ejections == 4
    place.pool.succeeded(place.of("a"))
    for _ in range(3):
        place.pool.failed(place.of("a"))
    place.clock.now += 1
    assert place.usable() == "ab", "a success in between began the count anew"


def test_only_failures_in_a_row_count() -> None:
    place = Place("a", "b", eject_after=3)
    for _ in range(20):
        place.pool.failed(place.of("a"))
        place.pool.failed(place.of("a"))
        place.pool.succeeded(place.of("a"))
    assert place.usable() == "ab"


def test_the_last_one_is_never_ejected() -> None:
    place = Place("a", "b", eject_after=2)
    place.pool.lost("b", "gone")
    for _ in range(5000):
        place.pool.failed(place.of("a"))
        assert place.usable() == "a"
    assert place.pool.ejections == 0


def test_of_two_that_fail_one_stays() -> None:
    place = Place("a", "b", eject_after=2, eject_max=1)
    for _ in range(5000):
        for name in "ab":
            place.pool.failed(place.of(name))
            assert place.usable() != ""
        place.clock.now += 0.3


def test_an_ejected_one_serves_where_it_is_the_last() -> None:
    place = Place("a", "b", eject_after=1, eject_base=60)
    place.pool.failed(place.of("a"))
    assert place.usable() == "b"
    place.pool.lost("b", "")
    assert place.usable() == "a"
    place.ready("b")
    assert place.usable() == "b"


def test_ejection_may_be_off() -> None:
    place = Place("a", "b", eject_after=0)
    for _ in range(50):
        place.pool.failed(place.of("a"))
    assert place.usable() == "ab"


def test_one_that_was_started_again_has_a_clean_record() -> None:
    place = Place("a", "b", eject_after=1, eject_base=60)
    place.ready("a", run="1")
    place.pool.failed(place.of("a"))
    assert place.usable() == "b"
    place.pool.lost("a", "")
    place.ready("a", run="2")
    assert place.usable() == "ab"


def test_one_that_broke_off_gets_nothing_for_a_moment() -> None:
    place = Place("a", "b")
    place.pool.shun(place.of("a"))
    assert place.usable() == "b"
    place.pool.shun(place.of("b"))
    assert place.usable() == "", "not even the last one"
    place.clock.now += SHUN
    assert place.usable() == "ab"


@pytest.mark.parametrize("trips", [100, 5000])
def test_any_number_of_ejections_can_be_counted(trips: int) -> None:
    place = Place("a", "b", eject_after=1, eject_max=30)
    place.of("a").trips = trips
    place.pool.failed(place.of("a"))
    assert place.of("a").ejected_until == place.clock.now + 30
