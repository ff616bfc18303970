"""Which groups come and go: within the bounds, never with requests on them, and always to the target."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from arriero_operator.groups import Group
from arriero_operator.observe import Pod, Report, timestamp
from arriero_operator.rollout import Steps, Target, next_steps

NOW = 1_800_000_000.0
TARGET = Target(
    replicas=2,
    revision="new",
    max_surge=1,
    max_unavailable=0,
    drain_seconds=20,
    unready_seconds=120,
    patience_seconds=300,
)


def group(
    replica: int,
    revision: str = "new",
    ready: bool = True,
    load: int = 0,
    placed: bool = True,
    draining_since: float | None = None,
    heard: bool = True,
    since: float = NOW - 1000,
    deleting: bool = False,
) -> Group:
    """A group of one pod, as it is seen."""
    name = f"llama-{replica}"
    status: dict[str, Any] = {
        "phase": "Running" if placed else "Pending",
        "conditions": [{"type": "Ready", "status": str(ready), "lastTransitionTime": timestamp(since)}],
    }
    if placed:
        status["containerStatuses"] = [{"name": "worker", "state": {"running": {}}}]
    pod = Pod.of(
        {
            "metadata": {"name": f"{name}-0", "namespace": "n", "creationTimestamp": timestamp(since), "labels": {}},
            "spec": {"nodeName": "node"} if placed else {"schedulingGates": [{"name": "serving.arriero.dev/gang"}]},
            "status": status,
        }
    )
    phase = "Serving" if ready else "Loading"
    if draining_since is not None:
        phase = "Draining"
    return Group(
        name=name,
        replica=replica,
        revision=revision,
        size=1,
        stateful_set=None if deleting else {"metadata": {"uid": name}, "kind": "StatefulSet"},
        deleting=deleting,
        draining_since=draining_since,
        gated=not placed,
        pods=(pod,),
        report=Report(phase, 1, running=load) if heard and placed else None,
        lost=frozenset(),
    )


def told(steps: Steps) -> tuple[list[int], list[int], list[int]]:
    return [*steps.create], [g.replica for g in steps.drain], [g.replica for g in steps.delete]


def test_from_nothing_all_groups_are_made_at_once() -> None:
    assert told(next_steps([], replace(TARGET, replicas=4), NOW)) == ([0, 1, 2, 3], [], [])


def test_what_is_wanted_is_left_alone() -> None:
    assert told(next_steps([group(0), group(3)], TARGET, NOW)) == ([], [], [])


def test_a_new_revision_begins_with_one_group_more() -> None:
    old = [group(0, "old"), group(1, "old")]
    assert told(next_steps(old, TARGET, NOW)) == ([2], [], [])
    assert told(next_steps([*old, group(2, ready=False)], TARGET, NOW)) == ([], [], [])
    assert told(next_steps([*old, group(2)], TARGET, NOW)) == ([], [1], [])


def test_without_surge_one_group_leaves_first() -> None:
    target = replace(TARGET, max_surge=0, max_unavailable=1)
    old = [group(0, "old", load=4), group(1, "old", load=9)]
    assert told(next_steps(old, target, NOW)) == ([], [0], [])
    leaving = group(0, "old", load=4, draining_since=NOW - 5)
    assert told(next_steps([leaving, old[1]], target, NOW)) == ([], [], [])
    gone = group(0, "old", deleting=True)
    assert told(next_steps([gone, old[1]], target, NOW)) == ([], [], []), "its pods still hold devices"
    assert told(next_steps([old[1]], target, NOW)) == ([0], [], [])


def test_scaling_down_takes_who_serves_least() -> None:
    groups = [group(0, load=3), group(1, load=1), group(2, load=7)]
    assert told(next_steps(groups, TARGET, NOW)) == ([], [1], [])
    groups[2] = group(2, ready=False, load=0)
    assert told(next_steps(groups, TARGET, NOW)) == ([], [], [2]), "nothing is on one that loads: it goes at once"


def test_a_group_goes_when_its_engine_says_that_it_has_drained() -> None:
    target = replace(TARGET, replicas=0)
    busy = group(0, load=2, draining_since=NOW - 5)
    assert told(next_steps([busy], target, NOW)) == ([], [], [])
    assert next_steps([busy], target, NOW).again_after == 15
    assert told(next_steps([group(0, load=0, draining_since=NOW - 5)], target, NOW)) == ([], [], [0])
    assert told(next_steps([group(0, load=2, draining_since=NOW - 20)], target, NOW)) == ([], [], [0])


def test_silence_is_no_proof_that_nothing_runs() -> None:
    silent = group(0, heard=False, ready=False)
    assert told(next_steps([silent], replace(TARGET, replicas=0), NOW)) == ([], [0], [])
    assert told(next_steps([replace(silent, draining_since=NOW)], replace(TARGET, replicas=0), NOW)) == ([], [], [])


def test_a_group_being_drained_never_comes_back() -> None:
    leaving = group(0, load=3, draining_since=NOW)
    assert told(next_steps([leaving], replace(TARGET, replicas=1), NOW)) == ([1], [], [])


def test_a_broken_old_group_makes_room_for_a_new_one_that_has_none() -> None:
    old, new = group(0, "old", ready=False, since=NOW - 119), group(1, ready=False, placed=False)
    target = replace(TARGET, replicas=1)
    assert told(next_steps([old, new], target, NOW)) == ([], [], [])
    assert told(next_steps([old, new], target, NOW + 1)) == ([], [], [0])


def test_a_stuck_new_group_is_dropped_for_the_next_revision() -> None:
    groups = [group(0, "old"), group(1, "old"), group(2, "newer", ready=False)]
    assert told(next_steps(groups, TARGET, NOW)) == ([], [], [2])
    assert told(next_steps(groups[:2], replace(TARGET, revision="old"), NOW)) == ([], [], [])


@dataclass
class Copy:
    """A replica in the simulation."""

    replica: int
    revision: str
    placed: bool = False
    age: int = 0
    load: int = 0
    draining_since: float | None = None
    broken_until: float = 0.0

    def seen(self, now: float) -> Group:
        ready = self.placed and self.age >= 3 and now >= self.broken_until and self.draining_since is None
        since = now - self.age if now >= self.broken_until else self.broken_until - 10
        return group(self.replica, self.revision, ready, self.load, self.placed, self.draining_since, since=since)


class Simulation:
    """Groups that load, serve, fail and come back, on a number of places; the rollout's steps are carried out."""

    def __init__(self, target: Target, places: int, chance: random.Random) -> None:
        self.target, self.places, self.chance = target, places, chance
        self.now = NOW
        self.copies: list[Copy] = []

    def second(self, faults: bool) -> bool:
        """Whether nothing was to be done."""
        groups = [copy.seen(self.now) for copy in self.copies]
        steps = next_steps(groups, self.target, self.now)
        self._check(groups, steps)
        for replica in steps.create:
            self.copies.append(Copy(replica, self.target.revision))
        for leaving in steps.drain:
            self._copy(leaving).draining_since = self.now
        for going in steps.delete:
            self.copies.remove(self._copy(going))
        self.now += 1
        for copy in self.copies:
            copy.placed = copy.placed or sum(other.placed for other in self.copies) < self.places
            copy.age += copy.placed
            if copy.draining_since is not None:
                copy.load = max(0, copy.load - 1)
            elif faults and copy.placed and self.chance.random() < 0.03:
                copy.broken_until, copy.load = self.now + 10, 0
            elif copy.seen(self.now).ready:
                copy.load = self.chance.randrange(10)
        return not (steps.create or steps.drain or steps.delete)

    def _copy(self, seen: Group) -> Copy:
        return next(copy for copy in self.copies if copy.replica == seen.replica)

    def _check(self, groups: list[Group], steps: Steps) -> None:
        target = self.target
        assert not {g.name for g in steps.drain} & {g.name for g in steps.delete}
        for going in steps.delete:
            since = going.draining_since
            over = since is not None and self.now - since >= target.drain_seconds
            assert going.idle or over, f"{going.name} is deleted with {going.load} requests on it"
            assert not going.ready
        ready = sum(g.ready for g in groups)
        floor = target.replicas - target.max_unavailable
        assert ready - len(steps.drain) >= min(ready, floor), "fewer ready groups than allowed"
        assert not steps.create or len(groups) + len(steps.create) <= target.replicas + target.max_surge
        assert len({copy.replica for copy in self.copies} | set(steps.create)) == len(self.copies) + len(steps.create)


bounds = st.tuples(st.integers(0, 2), st.integers(0, 2)).filter(any)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=4), bounds, st.integers(0, 2), st.randoms(use_true_random=False)
)
def test_every_history_ends_at_the_target(targets: list[int], bound: tuple[int, int], spare: int, chance: Any) -> None:
    """Targets change while groups fail and load; with as many places as groups wanted, and a few to spare."""
    surge, unavailable = bound
    target = replace(TARGET, max_surge=surge, max_unavailable=unavailable)
    simulation = Simulation(target, max(targets) + max(spare, surge if not unavailable else 0), chance)
    for number, replicas in enumerate(targets):
        simulation.target = replace(target, replicas=replicas, revision=f"r{number}")
        for _ in range(chance.randrange(60)):
            simulation.second(faults=True)
    quiet = 0
    for _ in range(1500):
        quiet = quiet + 1 if simulation.second(faults=False) else 0
        if quiet > 30 and all(copy.seen(simulation.now).ready for copy in simulation.copies):
            break
    assert len(simulation.copies) == targets[-1]
    assert {copy.revision for copy in simulation.copies} <= {f"r{len(targets) - 1}"}
    assert all(copy.seen(simulation.now).ready for copy in simulation.copies)
