"""The prefix index against a naive model, and what the model cannot say."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from arriero_router.core.prefix_index import SHARD, PrefixIndex

SLOTS = st.integers(0, 3)
# Few marks, so that prompts share some; with bits above any shard's, as real ones have.
MARKS = st.lists(st.integers(1, 14).map(lambda n: n << 40 | n), max_size=7, unique=True)


class Naive:
    """What the index promises, written down without regard to cost."""

    def __init__(self, limit: int, guesses: int, patience: float) -> None:
        self.limit, self.guesses, self.patience = limit, guesses, patience
        self.told: dict[int, set[int]] = {}
        self.expected: dict[int, dict[int, float]] = {}
        self.watched: set[int] = set()
        self.used: list[int] = []
        self.aged = float("-inf")

    def holds(self, slot: int, mark: int) -> bool:
        return mark in self.told.get(slot, ()) or mark in self.expected.get(slot, ())

    def use(self, mark: int) -> None:
        if mark in self.used:
            self.used.remove(mark)
        self.used.append(mark)
        known = [m for m in self.used if any(self.holds(slot, m) for slot in self.told)]
        self.used = known[-self.limit :]
        for slot in self.told:
            self.told[slot] &= set(self.used)
            self.expected[slot] = {m: at for m, at in self.expected[slot].items() if m in self.used}

    def forget(self, slot: int) -> None:
        self.told.pop(slot, None)
        self.expected.pop(slot, None)
        self.watched.discard(slot)

    def reset(self, slot: int, marks: list[int]) -> None:
        self.told[slot], self.expected[slot] = set(), {}
        self.watched.add(slot)
        self.add(slot, marks)

    def add(self, slot: int, marks: list[int]) -> None:
        if slot in self.watched:
            for mark in reversed(marks):
                self.expected[slot].pop(mark, None)
                self.told[slot].add(mark)
                self.use(mark)

    def remove(self, slot: int, marks: list[int]) -> None:
        if slot in self.watched:
            for mark in marks:
                self.expected[slot].pop(mark, None)
                self.told[slot].discard(mark)

    def expect(self, slot: int, marks: list[int], now: float) -> None:
        if now - self.aged >= 1:
            self.age(now)
        told, expected = self.told.setdefault(slot, set()), self.expected.setdefault(slot, {})
        for mark in reversed(marks):
            if mark not in told or slot not in self.watched:
                told.discard(mark)
                expected.pop(mark, None)
                expected[mark] = now
            self.use(mark)
            expected = self.expected[slot]
            told = self.told[slot]
        for mark in list(expected)[: max(0, len(expected) - self.guesses)]:
            del expected[mark]

    def missed(self, slot: int, since: float) -> None:
        if slot not in self.watched and slot in self.expected:
            self.expected[slot] = {m: at for m, at in self.expected[slot].items() if at > since}

    def age(self, now: float) -> None:
        self.aged = now
        for slot in self.watched:
            self.expected[slot] = {m: at for m, at in self.expected[slot].items() if at > now - self.patience}

    def match(self, marks: list[int]) -> dict[int, int]:
        held = {}
        for slot in self.told:
            depth = 0
            while depth < len(marks) and self.holds(slot, marks[depth]):
                depth += 1
            if depth:
                held[slot] = depth
        return held


class Traces(RuleBasedStateMachine):
    @initialize(limit=st.integers(3, 20), guesses=st.integers(1, 12), patience=st.sampled_from([0.5, 2.0, 10.0]))
    def start(self, limit: int, guesses: int, patience: float) -> None:
        self.now = 0.0
        self.limit = limit
        self.index = PrefixIndex(limit, guesses, patience)
        self.naive = Naive(limit, guesses, patience)

    @rule(slot=SLOTS, marks=MARKS)
    def reset(self, slot: int, marks: list[int]) -> None:
        self.index.reset(slot, marks)
        self.naive.reset(slot, marks)

    @rule(slot=SLOTS, marks=MARKS)
    def add(self, slot: int, marks: list[int]) -> None:
        self.index.add(slot, marks)
        self.naive.add(slot, marks)

    @rule(slot=SLOTS, marks=MARKS)
    def remove(self, slot: int, marks: list[int]) -> None:
        self.index.remove(slot, marks)
        self.naive.remove(slot, marks)

    @rule(slot=SLOTS)
    def forget(self, slot: int) -> None:
        self.index.forget(slot)
        self.naive.forget(slot)

    @rule(slot=SLOTS)
    def unwatch(self, slot: int) -> None:
        self.index.unwatch(slot)
        self.naive.watched.discard(slot)

    @rule(slot=SLOTS, marks=MARKS, passed=st.sampled_from([0.0, 0.25, 1.0, 5.0]))
    def expect(self, slot: int, marks: list[int], passed: float) -> None:
        self.now += passed
        self.index.expect(slot, marks, self.now)
        self.naive.expect(slot, marks, self.now)

    @rule(slot=SLOTS, n=st.integers(1, 14))
    def missed(self, slot: int, n: int) -> None:
        since = self.index.guessed(slot, n << 40 | n)
        unwatched = slot not in self.naive.watched
        assert since == (
            self.naive.expected.get(slot, {}).get(n << 40 | n, float("-inf")) if unwatched else float("-inf")
        )
        self.index.missed(slot, since)
        self.naive.missed(slot, since)

    @rule(passed=st.sampled_from([0.25, 1.0, 5.0]))
    def age(self, passed: float) -> None:
        self.now += passed
        self.index.age(self.now)
        self.naive.age(self.now)

    @rule(marks=MARKS)
    def match(self, marks: list[int]) -> None:
        assert self.index.match(marks) == self.naive.match(marks)

    @invariant()
    def agrees_mark_by_mark_within_its_limit(self) -> None:
        for n in range(1, 15):
            mark = n << 40 | n
            assert self.index.match([mark]) == self.naive.match([mark]), hex(mark)
        assert len(self.index) <= self.limit
        for slot in range(4):
            assert self.index.watched(slot) == (slot in self.naive.watched)


def test_agrees_with_a_naive_model(campaign: int) -> None:
    run_state_machine_as_test(
        Traces, settings=settings(max_examples=150 * campaign, stateful_step_count=40, deadline=None, derandomize=True)
    )


def prompt(rng: random.Random, count: int) -> list[int]:
    return [rng.getrandbits(64) for _ in range(count)]


def test_matches_the_longest_run_of_leading_marks_of_each_replica() -> None:
    index = PrefixIndex()
    index.reset(0, [1, 2, 3])
    index.reset(1, [1, 3, 4])
    index.reset(2, [2, 3])
    assert index.match([1, 2, 3, 4]) == {0: 3, 1: 1}
    assert index.match([]) == {}
    assert index.match([9]) == {}


def test_many_shards_keep_the_most_recent_and_stay_within_the_limit(seed: int) -> None:
    rng = random.Random(seed)
    limit = 12 * SHARD
    index = PrefixIndex(limit)
    index.reset(5, [])
    prompts = [prompt(rng, 64) for _ in range(600)]
    for marks in prompts:
        index.add(5, marks)
        assert len(index) <= limit
    for marks in prompts[-limit // 2 // 64 :]:
        assert index.match(marks) == {5: 64}
    assert index.match(prompts[0]) == {}


def test_gives_up_a_prompts_end_before_its_beginning() -> None:
    index = PrefixIndex(limit=10)
    index.expect(0, list(range(100, 108)), 0.0)
    index.expect(0, list(range(200, 206)), 0.0)
    assert index.match(list(range(200, 206))) == {0: 6}
    assert index.match(list(range(100, 108))) == {0: 4}


def test_slots_used_again_and_again_leave_nothing_behind(seed: int) -> None:
    rng = random.Random(seed)
    index = PrefixIndex(1 << 18)
    kept = prompt(rng, 50)
    index.reset(1, kept)
    for _ in range(1000):
        marks = prompt(rng, 20)
        index.reset(0, marks)
        assert index.match(marks) == {0: 20}
        index.forget(0)
        assert index.match(marks) == {}
    for _ in range(256):
        index.add(1, [])  # whatever comes next sweeps
    assert len(index) == 50
    assert index.match(kept) == {1: 50}


def test_what_a_forgotten_replica_left_makes_room_before_anything_known(seed: int) -> None:
    rng = random.Random(seed)
    limit = 8 * SHARD
    index = PrefixIndex(limit)
    kept, left, new = prompt(rng, 500), prompt(rng, limit * 3 // 4), prompt(rng, limit * 3 // 4)
    index.reset(1, kept)
    index.reset(0, left)
    index.forget(0)
    index.add(1, new)  # at once: no shard was swept in passing but one
    assert index.match(kept) == {1: len(kept)}
    assert index.match(new) == {1: len(new)}


def test_late_news_of_a_slots_former_replica_counts_for_nothing() -> None:
    index = PrefixIndex()
    index.reset(0, [1])
    index.forget(0)
    index.add(0, [2])
    index.remove(0, [2])
    assert index.match([2]) == {}
    index.expect(0, [3], 0.0)
    index.add(0, [4])
    assert index.match([4]) == {}
    assert index.match([3]) == {0: 1}


def test_a_replica_started_again_has_only_what_it_tells() -> None:
    index = PrefixIndex()
    index.reset(0, [1, 2])
    index.expect(0, [7, 8], 0.0)
    index.reset(0, [2])
    assert [index.match([mark]) for mark in (1, 2, 7)] == [{}, {0: 1}, {}]


def test_what_was_told_outlives_patience_and_what_was_expected_does_not() -> None:
    index = PrefixIndex(patience=10)
    index.reset(0, [])
    index.expect(0, [1, 2, 3], 0.0)
    index.add(0, [1, 2])
    index.age(9.9)
    assert index.match([1, 2, 3]) == {0: 3}
    index.age(10.0)
    assert index.match([1, 2, 3]) == {0: 2}


def test_without_a_watch_guesses_stay_until_there_are_too_many() -> None:
    index = PrefixIndex(guesses=4, patience=10)
    index.expect(0, [1, 2], 0.0)
    index.expect(0, [3, 4], 100.0)
    assert index.match([1, 2]) == {0: 2}
    index.expect(0, [1, 2], 200.0)
    index.expect(0, [5], 300.0)
    assert index.match([1, 2]) == {0: 2}
    assert index.match([3, 4]) == {0: 1}


@pytest.mark.parametrize("sizes", [(0, 1, 1.0), (1, 0, 1.0), (1, 1, 0.0)])
def test_refuses_sizes_that_hold_nothing(sizes: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        PrefixIndex(*sizes)
