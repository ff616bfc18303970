"""What each policy promises, and what all of them do."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero_faces.prefix import CHUNK
from arriero_router.core.ask import Ask
from arriero_router.core.policies import POLICIES, hashing
from arriero_router.core.policies.prefix import CROWDED, SLACK
from arriero_router.core.policy import Pick, Policy
from arriero_router.core.prefix_index import PrefixIndex
from arriero_router.core.replica import Endpoint, Replica, Report

NAMES = ("prefix", "least-load", "power-of-two", "round-robin", "hash")


def policy(name: str, seed: int = 7, index: PrefixIndex | None = None) -> Policy:
    return POLICIES[name](index or PrefixIndex(), random.Random(seed))


def replica(slot: int, in_flight: int = 0, pending: int = 0, others: int = 0) -> Replica:
    made = Replica(Endpoint(f"group-{slot}", "10.0.0.1", 8000), slot)
    made.report = Report(ready=True, running=others)
    made.in_flight, made.pending = in_flight, pending
    return made


def loaded(*in_flight: int) -> list[Replica]:
    return [replica(slot, count) for slot, count in enumerate(in_flight)]


def ask(chunks: Sequence[int] = (), session: str = "", tail: int = 100) -> Ask:
    return Ask(model="llama", marks=chunks, size=len(chunks) * CHUNK + tail, session=session)


def choose(policy: Policy, asked: Ask, replicas: list[Replica], shares: list[float] | None = None) -> Pick:
    return policy.pick(asked, replicas, shares or [1.0] * len(replicas), 0.0)


def names(policy: Policy, asked: Ask, replicas: list[Replica], times: int) -> Counter[str]:
    return Counter(choose(policy, asked, replicas).replica.name for _ in range(times))


# All of them


def test_the_names_are_those_of_the_configuration() -> None:
    assert tuple(POLICIES) == NAMES


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    replicas=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 9000), st.integers(0, 5), st.floats(0.01, 1.0), st.integers(0, 4)),
        min_size=1,
        max_size=6,
    ),
    session=st.sampled_from(["", "anna", "ben"]),
    length=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_any_policy_names_one_that_was_offered(
    name: str, replicas: list[tuple[int, int, int, float, int]], session: str, length: int, seed: int
) -> None:
    index = PrefixIndex()
    offered = [replica(slot, *counts[:3]) for slot, counts in enumerate(replicas)]
    for slot, counts in enumerate(replicas):
        index.reset(slot, range(100, 100 + counts[4]))
    asked = ask(range(100, 100 + length), session)
    chosen = POLICIES[name](index, random.Random(seed)).pick(asked, offered, [c[3] for c in replicas], 1.0)
    assert chosen.replica in offered
    assert chosen.reason in ("prefix", "load", "turn", "session")
    if name == "prefix":
        assert chosen.matched == min(length, replicas[chosen.replica.slot][4])
    else:
        assert chosen.matched == 0


@pytest.mark.parametrize("name", NAMES)
def test_idle_replicas_are_chosen_alike_and_routers_do_not_choose_in_step(name: str) -> None:
    firsts = Counter(choose(policy(name, seed), ask(), loaded(0, 0, 0, 0)).replica.slot for seed in range(400))
    assert all(firsts[slot] > 60 for slot in range(4)), firsts


@pytest.mark.parametrize("name", ["prefix", "least-load", "power-of-two", "hash"])
def test_requests_of_other_routers_count(name: str) -> None:
    busy, idle = replica(0, others=9), replica(1)
    assert choose(policy(name), ask(), [busy, idle]).replica is idle


@pytest.mark.parametrize("name", ["prefix", "least-load", "power-of-two", "hash"])
def test_a_replica_in_slow_start_fills_to_its_share(name: str) -> None:
    replicas = [replica(slot) for slot in range(3)]
    chooser = policy(name)
    for _ in range(210):
        choose(chooser, ask(), replicas, [0.1, 1.0, 1.0]).replica.in_flight += 1
    assert 5 <= replicas[0].in_flight <= 15, replicas
    assert abs(replicas[1].in_flight - replicas[2].in_flight) <= 10, replicas


# Least load


def test_least_load_takes_the_fewest_requests_then_the_fewest_bytes() -> None:
    assert choose(policy("least-load"), ask(), loaded(3, 2, 4)).replica.slot == 1
    replicas = [replica(0, 2, pending=500), replica(1, 2, pending=400), replica(2, 2, pending=600)]
    assert choose(policy("least-load"), ask(), replicas).replica.slot == 1


# Power of two


def test_power_of_two_never_takes_the_most_loaded_and_takes_all_others() -> None:
    counts = names(policy("power-of-two"), ask(), loaded(4, 1, 2, 9), 600)
    # Of six pairs, the least loaded wins three, the next two, the third one.
    assert set(counts) == {"group-0", "group-1", "group-2"}
    assert 240 < counts["group-1"] < 360
    assert 150 < counts["group-2"] < 250
    assert 60 < counts["group-0"] < 140


# Round robin


def turns(chooser: Policy, replicas: list[Replica], times: int, shares: list[float] | None = None) -> list[int]:
    return [choose(chooser, ask(), replicas, shares).replica.slot for _ in range(times)]


def test_round_robin_takes_each_once_a_round() -> None:
    chooser, replicas = policy("round-robin"), loaded(0, 5, 9)
    order = turns(chooser, replicas, 3)
    assert sorted(order) == [0, 1, 2]
    assert turns(chooser, replicas, 9) == order * 3


def test_round_robin_is_fair_to_those_that_were_away() -> None:
    chooser, (one, two, three) = policy("round-robin"), loaded(0, 0, 0)
    turns(chooser, [one, two, three], 6)
    assert Counter(turns(chooser, [one, two], 40)) == {0: 20, 1: 20}
    back = Counter(turns(chooser, [one, two, three], 30))
    assert 10 <= back[2] <= 12, back  # at most a turn more: nothing is caught up on
    chooser.gone(one)
    assert Counter(turns(chooser, [replica(0), two, three], 30)).most_common()[0][1] <= 11


def test_round_robin_gives_a_share_of_turns_in_slow_start() -> None:
    assert Counter(turns(policy("round-robin"), loaded(0, 0, 0), 50, [0.5, 1.0, 1.0])) == {0: 10, 1: 20, 2: 20}


# Hash


def owners(replicas: list[Replica], seed: int = 7) -> dict[str, str]:
    chooser = policy("hash", seed)
    return {f"s{n}": choose(chooser, ask(session=f"s{n}"), replicas).replica.name for n in range(600)}


def test_hash_keeps_a_session_in_any_router_and_any_order_of_replicas() -> None:
    replicas = loaded(0, 0, 0, 0)
    assert owners(replicas) == owners(replicas[::-1], seed=8)
    counts = Counter(owners(replicas).values())
    assert all(110 < count < 190 for count in counts.values()), counts
    assert choose(policy("hash"), ask(session="s1"), replicas).reason == "session"


def test_hash_moves_only_the_sessions_of_the_replica_that_went() -> None:
    replicas = loaded(0, 0, 0, 0)
    before, after = owners(replicas), owners(replicas[:2] + replicas[3:])
    moved = {session for session in before if before[session] != after[session]}
    assert moved == {session for session, name in before.items() if name == "group-2"}


def test_hash_bounds_the_load_of_a_session_that_asks_for_more_than_its_part() -> None:
    replicas = loaded(0, 0, 0, 0)
    chooser = policy("hash")
    for total in range(1, 201):
        choose(chooser, ask(session="busy"), replicas).replica.in_flight += 1
        assert max(r.in_flight for r in replicas) <= hashing.EXCESS * total / 4 + hashing.SLACK


def test_hash_without_a_session_takes_the_least_loaded() -> None:
    chosen = choose(policy("hash"), ask(), loaded(3, 1, 2))
    assert (chosen.replica.slot, chosen.reason) == (1, "load")


# Prefix


def test_prefix_takes_the_longest_cached_prefix() -> None:
    index = PrefixIndex()
    index.reset(0, [1, 2])
    index.reset(1, [1, 2, 3, 4])
    chosen = choose(policy("prefix", index=index), ask([1, 2, 3, 4, 5]), loaded(0, 0, 0))
    assert (chosen.replica.slot, chosen.reason, chosen.matched) == (1, "prefix", 4)
    missed = choose(policy("prefix", index=index), ask([9, 8]), loaded(1, 1, 0))
    assert (missed.replica.slot, missed.reason, missed.matched) == (2, "load", 0)


def test_prefix_leaves_a_queue_that_is_longer_than_the_prefix_is_worth() -> None:
    index = PrefixIndex()
    marks = list(range(1, 95))
    index.reset(0, marks)
    chooser = policy("prefix", index=index)
    picked = [
        choose(chooser, ask(marks), [replica(0, 1, pending=chunks * CHUNK), replica(1, 1)]).replica.slot
        for chunks in range(0, 1000, 10)
    ]
    assert picked[:9] == [0] * 9, "a queue shorter than the prefix is better than computing it again"
    assert picked[-1] == 1
    assert picked == sorted(picked), "and once it is not, it is not for any longer queue"


def test_prefix_knows_what_it_sent_before_the_replica_says_so() -> None:
    chooser = policy("prefix")
    replicas = loaded(0, 0, 0, 0)
    first = choose(chooser, ask([1, 2, 3]), replicas)
    assert choose(chooser, ask([1, 2, 3]), replicas).matched == 0, "a pick that was not sent is no news"
    chooser.sent(ask([1, 2, 3]), first)
    again = choose(chooser, ask([1, 2, 3]), replicas)
    assert (again.replica, again.matched) == (first.replica, 3)
    chooser.gone(first.replica)
    assert choose(chooser, ask([1, 2, 3]), replicas).matched == 0


def test_prefix_believes_an_answer_that_found_less_cached_than_was_thought() -> None:
    """What was sent there before the evicted prompt was evicted, too; what was sent since then need not be."""
    chooser = policy("prefix")
    only = [replica(0)]

    def send(chunks: list[int], now: float) -> Pick:
        pick = chooser.pick(ask(chunks), only, [1.0], now)
        chooser.sent(ask(chunks), pick)
        return pick

    for now, chunks in enumerate(([1, 2], [3, 4], [5, 6])):
        assert send(chunks, float(now)).matched == 0
    pick = send([3, 4], 3.0)
    assert pick.matched == 2
    chooser.found(pick, CHUNK)  # half of it: rounding
    assert choose(chooser, ask([1, 2]), only).matched == 2
    chooser.found(pick, 16)
    assert [choose(chooser, ask(chunks), only).matched for chunks in ([1, 2], [3, 4], [5, 6])] == [0, 2, 2]


def test_prefix_believes_what_a_watched_replica_says_itself() -> None:
    index = PrefixIndex()
    index.reset(0, [1, 2, 3, 4])
    chooser = policy("prefix", index=index)
    pick = choose(chooser, ask([1, 2]), [replica(0)])
    chooser.sent(ask([1, 2]), pick)
    chooser.found(pick, 0)
    assert index.match([1, 2, 3, 4]) == {0: 4}


def test_prefix_takes_the_fewest_requests_of_those_that_cost_alike() -> None:
    one, two = replica(0, in_flight=2, others=0), replica(1, in_flight=0, others=2)
    assert {choose(policy("prefix", seed), ask(), [one, two]).replica.slot for seed in range(20)} == {1}


@pytest.mark.parametrize("chunks", [4, 94, 400])
def test_one_prefix_that_all_ask_for_is_no_hot_spot(chunks: int, seed: int) -> None:
    """8 replicas, everybody has the same prefix, 160 run at any time: none has far more than the mean."""
    rng = random.Random(seed)
    replicas = loaded(*[0] * 8)
    chooser = policy("prefix", seed)
    running: list[Replica] = []
    for _ in range(1000):
        chosen = choose(chooser, ask([*range(1, chunks + 1), rng.getrandbits(64)]), replicas)
        chooser.sent(ask(range(1, chunks + 1)), chosen)
        chosen.replica.in_flight += 1
        running.append(chosen.replica)
        if len(running) > 160:
            running.pop(rng.randrange(len(running))).in_flight -= 1
    assert max(r.in_flight for r in replicas) <= CROWDED * 160 / 8 + SLACK, replicas
