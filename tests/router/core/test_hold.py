"""The hold queue: who waits, who goes next, who gives way, and when waiting is over."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from arriero_router.core.ask import FOREVER, Ask
from arriero_router.core.hold import HoldQueue, Refusal


class Item:
    """Told apart by identity alone."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        raise AssertionError("items are not to be compared")

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return self.name


def an_ask(tenant="a", *, priority=0, tokens=100, deadline=FOREVER):
    return Ask(model="llama", tenant=tenant, priority=priority, tokens=tokens, deadline=deadline)


def fill(queue, *tenants, now=0.0, **fields):
    """One item per tenant named, called a0, a1, ... in the order they came."""
    seen = Counter()
    items = []
    for tenant in tenants:
        item = Item(f"{tenant}{seen[tenant]}")
        seen[tenant] += 1
        assert queue.push(an_ask(tenant, **fields), item, now).held
        items.append(item)
    return items


def drain(queue, now=0.0):
    names = []
    while (waiting := queue.pop(now)) is not None:
        names.append(waiting.item.name)
    return names


# -- order


def test_one_tenant_is_served_in_the_order_it_came():
    queue = HoldQueue(10)
    fill(queue, "a", "a", "a", "a")
    assert drain(queue) == ["a0", "a1", "a2", "a3"]


def test_a_better_class_goes_first():
    queue = HoldQueue(10)
    for priority in (5, -1, 0, 5, -1):
        queue.push(an_ask(priority=priority), Item(str(priority)), 0.0)
    assert drain(queue) == ["-1", "-1", "0", "5", "5"]


def test_tenants_of_a_class_take_turns_however_many_one_has():
    queue = HoldQueue(100)
    fill(queue, *"aaaaaa", *"bb", "c")
    assert drain(queue) == ["a0", "b0", "c0", "a1", "b1", "a2", "a3", "a4", "a5"]


def test_turns_are_weighed_by_tokens():
    queue = HoldQueue(100)
    for i in range(2):
        queue.push(an_ask("long", tokens=400), Item(f"long{i}"), 0.0)
    for i in range(8):
        queue.push(an_ask("short", tokens=100), Item(f"short{i}"), 0.0)
    assert drain(queue) == [
        "long0",
        "short0",
        "short1",
        "short2",
        "short3",
        "long1",
        *(f"short{i}" for i in range(4, 8)),
    ]


def test_a_tenant_of_thrice_the_weight_gets_thrice_the_tokens():
    queue = HoldQueue(100, {"big": 3.0})
    fill(queue, *["big"] * 30, *["small"] * 30)
    served = Counter(name.rstrip("0123456789") for name in (queue.pop(0.0).item.name for _ in range(24)))
    assert served == {"big": 18, "small": 6}


def test_weights_may_be_filled_in_later():
    weights = {}
    queue = HoldQueue(100, weights)
    weights["big"] = 2.0
    fill(queue, *["big"] * 6, *["small"] * 6)
    assert [queue.pop(0.0).ask.tenant for _ in range(6)].count("big") == 4


def test_who_was_idle_has_nothing_saved_up():
    queue = HoldQueue(100)
    fill(queue, *"aaaaaaaa", "b")
    for _ in range(5):  # b's one and four of a's
        queue.pop(0.0)
    fill(queue, *"bbbb")
    assert [name[0] for name in drain(queue)] == list("babababa")


def test_debts_end_when_nobody_waits_any_more():
    queue = HoldQueue(100)
    fill(queue, *"aaaaaaaaaa", "b")
    drain(queue)
    fill(queue, "a", "b", "a", "b")
    assert drain(queue) == ["a0", "b0", "a1", "b1"]


def test_an_ask_of_no_tokens_still_counts():
    queue = HoldQueue(100)
    fill(queue, *"aaaa", "b", tokens=0)
    assert drain(queue)[1] == "b0"


# -- corrections


def test_tokens_used_beyond_the_estimate_cost_the_tenant_its_turns():
    queue = HoldQueue(100)
    fill(queue, *"aaaaaa", *"bbbbbb")
    ask, _ = queue.pop(0.0)
    assert ask.tenant == "a"
    queue.charge(ask, 400)
    assert [queue.pop(0.0).ask.tenant for _ in range(4)] == ["b"] * 4


def test_tokens_not_used_are_given_back():
    queue = HoldQueue(100)
    fill(queue, *"aaaaaa", *"bbbbbb", tokens=300)
    asks = [queue.pop(0.0).ask for _ in range(4)]
    assert [ask.tenant for ask in asks] == ["a", "b", "a", "b"]
    for ask in asks:
        if ask.tenant == "a":
            queue.charge(ask, 1)
    assert [queue.pop(0.0).ask.tenant for _ in range(3)] == ["a", "a", "b"]


def test_nothing_is_given_back_of_the_time_before_a_tenant_was_idle():
    queue = HoldQueue(100)
    fill(queue, "a", *["b"] * 20)
    early = queue.pop(0.0).ask
    for _ in range(10):
        queue.pop(0.0)
    fill(queue, *"aaaa")
    queue.charge(early, -(10**9))
    served = [queue.pop(0.0).ask.tenant for _ in range(4)]
    assert served.count("a") <= 3
    assert "b" in served


def test_a_tenant_that_is_given_back_much_does_not_turn_back_the_time_for_newcomers():
    queue = HoldQueue(100)
    fill(queue, *"aaaaaa", *"cccccc", tokens=300)
    for ask in [queue.pop(0.0).ask for _ in range(4)]:
        if ask.tenant == "a":
            queue.charge(ask, 1)
    assert queue.pop(0.0).ask.tenant == "a"
    fill(queue, *"bbb", tokens=300)
    assert [queue.pop(0.0).ask.tenant for _ in range(3)] == ["b", "a", "c"]


def test_a_debt_outlives_a_pause_while_others_wait():
    queue = HoldQueue(1000)
    fill(queue, "a", *"bbb")
    queue.charge(queue.pop(0.0).ask, 10**6)
    for i in range(100):
        queue.push(an_ask(f"t{i}"), item := Item("t"), 0.0)
        queue.remove(item)
    fill(queue, "a")
    assert drain(queue) == ["b0", "b1", "b2", "a0"]


def test_a_correction_for_a_class_that_is_gone_is_of_no_effect():
    queue = HoldQueue(10)
    fill(queue, "a")
    ask = queue.pop(0.0).ask
    queue.charge(ask, 10**6)
    fill(queue, "a", "b")
    assert drain(queue) == ["a0", "b0"]


# -- room


def test_a_full_queue_refuses():
    queue = HoldQueue(2)
    fill(queue, "a", "a")
    pushed = queue.push(an_ask("a"), Item("a2"), 0.0)
    assert (pushed.held, pushed.refused, pushed.displaced) == (False, Refusal.FULL, None)
    assert drain(queue) == ["a0", "a1"]


def test_a_queue_of_no_room_refuses_everybody():
    queue = HoldQueue(0)
    assert queue.push(an_ask(priority=-5), Item("x"), 0.0).refused is Refusal.FULL
    assert len(queue) == 0


def test_a_better_class_takes_the_place_of_the_last_of_the_worst():
    queue = HoldQueue(4)
    worst = fill(queue, "a", "a", priority=9)
    fill(queue, "a", "a", priority=5)
    pushed = queue.push(an_ask("a", priority=1), Item("better"), 0.0)
    assert pushed.held
    assert pushed.displaced.item is worst[1]
    assert len(queue) == 4
    assert drain(queue)[0] == "better"


def test_an_equal_or_worse_class_displaces_nobody_of_the_same_tenant():
    queue = HoldQueue(2)
    fill(queue, "a", "a", priority=3)
    for priority in (3, 4):
        assert queue.push(an_ask("a", priority=priority), Item("late"), 0.0).refused is Refusal.FULL


def test_a_flood_of_one_tenant_gives_way_to_others_until_they_have_as_many():
    queue = HoldQueue(6)
    flood = fill(queue, *"aaaaaa")
    for i in range(3):
        assert queue.push(an_ask("b"), Item(f"b{i}"), 0.0).displaced.item is flood[5 - i]
    assert queue.push(an_ask("b"), Item("b3"), 0.0).refused is Refusal.FULL
    assert queue.push(an_ask("a"), Item("a9"), 0.0).refused is Refusal.FULL
    assert queue.lengths == {"a": 3, "b": 3}


def test_an_odd_place_does_not_go_to_and_fro():
    queue = HoldQueue(7)
    fill(queue, *"aaaaaaa")
    while queue.push(an_ask("b"), Item("b"), 0.0).held:
        pass
    assert queue.lengths == {"a": 4, "b": 3}
    assert queue.push(an_ask("a"), Item("a"), 0.0).refused is Refusal.FULL


def test_places_are_shared_by_weight():
    queue = HoldQueue(8, {"b": 3.0})
    fill(queue, *"aaaaaaaa")
    while queue.push(an_ask("b"), Item("b"), 0.0).held:
        pass
    assert queue.lengths == {"a": 2, "b": 6}


def test_what_has_begun_is_never_refused_goes_first_and_never_gives_way():
    queue = HoldQueue(2)
    fill(queue, "a", "b")
    again = [Item("again0"), Item("again1")]
    for i, item in enumerate(again):
        pushed = queue.push(an_ask("a", tokens=10**6), item, 1.0, begun=True)
        assert pushed.held, i
        assert pushed.displaced is None
    assert len(queue) == 4
    pushed = queue.push(an_ask("c", priority=-1), Item("better"), 1.0)
    assert pushed.displaced.item.name == "a0"
    assert drain(queue, 1.0) == ["better", "again0", "b0", "again1"]


def test_what_has_begun_was_counted_before_and_does_not_put_its_tenant_back():
    queue = HoldQueue(10)
    fill(queue, "b", "b", "b")
    for name in ("again0", "again1"):
        queue.push(an_ask("a", tokens=10**6), Item(name), 0.0, begun=True)
    fill(queue, "a")
    assert drain(queue) == ["b0", "again0", "again1", "a0", "b1", "b2"]


def test_what_has_begun_is_refused_when_its_deadline_is_over():
    assert HoldQueue(1).push(an_ask(deadline=5.0), Item("x"), 5.0, begun=True).refused is Refusal.EXPIRED


def test_the_limit_can_be_changed_and_who_waits_stays():
    queue = HoldQueue(4)
    fill(queue, *"aaaa")
    queue.limit = 2
    assert queue.push(an_ask("a"), Item("late"), 0.0).refused is Refusal.FULL
    assert len(queue) == 4
    drain(queue)
    fill(queue, "a", "a")
    assert queue.push(an_ask("a"), Item("late"), 0.0).refused is Refusal.FULL


# -- deadlines


def test_deadlines_are_exact():
    queue = HoldQueue(10)
    items = {deadline: Item(str(deadline)) for deadline in (3.0, 1.0, 2.0)}
    for deadline, item in items.items():
        queue.push(an_ask(deadline=deadline), item, 0.0)
    assert queue.next_deadline == 1.0
    assert queue.expire(0.999) == []
    assert [waiting.item.name for waiting in queue.expire(2.0)] == ["1.0", "2.0"]
    assert queue.next_deadline == 3.0
    assert queue.pop(2.999).item is items[3.0]
    assert queue.next_deadline == FOREVER


def test_pop_never_returns_what_is_over_and_expire_still_does():
    queue = HoldQueue(10)
    fill(queue, "a", deadline=1.0)
    fill(queue, "b")
    assert queue.peek(1.0).ask.tenant == "b"
    assert queue.pop(1.0).item.name == "b0"
    assert queue.pop(1.0) is None
    assert len(queue) == 1
    assert queue.lengths == {"a": 1}
    assert queue.next_deadline == 1.0
    assert [waiting.item.name for waiting in queue.expire(1.0)] == ["a0"]
    assert len(queue) == 0


def test_one_whose_deadline_is_over_takes_nobodys_room():
    queue = HoldQueue(1)
    fill(queue, "a", deadline=1.0)
    assert queue.push(an_ask("a"), Item("next"), 1.0).held
    assert [waiting.item.name for waiting in queue.expire(1.0)] == ["a0"]


def test_what_comes_too_late_is_refused():
    queue = HoldQueue(1)
    assert queue.push(an_ask(deadline=1.0), Item("x"), 1.0).refused is Refusal.EXPIRED
    assert queue.push(an_ask(deadline=1.0), Item("x"), 0.999).held


# -- leaving, and what is told


def test_who_leaves_is_gone_and_costs_its_tenant_nothing():
    queue = HoldQueue(10)
    first, _, _, _ = fill(queue, "a", "a", "b", "b", tokens=10**6)
    assert queue.remove(first)
    assert not queue.remove(first)
    assert drain(queue) == ["a1", "b0", "b1"]
    assert len(queue) == 0
    assert queue.lengths == {}


def test_who_leaves_after_its_deadline_is_not_returned_by_expire():
    queue = HoldQueue(10)
    (item,) = fill(queue, "a", deadline=1.0)
    assert queue.pop(2.0) is None
    assert queue.remove(item)
    assert queue.expire(2.0) == []
    assert len(queue) == 0
    assert queue.lengths == {}


def test_an_item_waits_once():
    queue = HoldQueue(10)
    (item,) = fill(queue, "a")
    with pytest.raises(AssertionError, match="waits once"):
        queue.push(an_ask("a"), item, 0.0)


def test_the_oldest_wait_is_of_who_came_first():
    queue = HoldQueue(10)
    assert queue.oldest_wait(9.0) == 0.0
    queue.push(an_ask(), first := Item("first"), 1.0)
    queue.push(an_ask(), Item("second"), 4.0)
    assert queue.oldest_wait(6.0) == 5.0
    queue.remove(first)
    assert queue.oldest_wait(6.0) == 2.0


# -- properties

TENANTS = ("a", "b", "c", "")
WEIGHTS = {"b": 2.0, "c": 0.5}


class Conservation(RuleBasedStateMachine):
    """Whatever happens: nothing lost, nothing twice, the bound kept, classes and lines in order, deadlines exact."""

    @initialize(limit=st.integers(0, 12))
    def start(self, limit):
        self.queue = HoldQueue(limit, WEIGHTS)
        self.now = 0.0
        self.inside = {}
        self.number = 0

    def left(self, item):
        assert id(item) in self.inside, f"{item} twice"
        return self.inside.pop(id(item))

    @rule(
        tenant=st.sampled_from(TENANTS),
        priority=st.integers(-2, 2),
        tokens=st.integers(0, 5000),
        patience=st.one_of(st.just(FOREVER), st.floats(-1, 10)),
        begun=st.sampled_from([False, False, False, True]),
    )
    def push(self, tenant, priority, tokens, patience, begun):
        ask = an_ask(tenant, priority=priority, tokens=tokens, deadline=self.now + patience)
        item = Item(f"{tenant}{self.number}")
        self.number += 1
        live = sum(1 for a, _, _, _ in self.inside.values() if a.deadline > self.now)
        pushed = self.queue.push(ask, item, self.now, begun=begun)
        if pushed.refused is Refusal.EXPIRED:
            assert ask.deadline <= self.now
        elif pushed.refused is Refusal.FULL:
            assert live >= self.queue.limit
            assert not begun
        else:
            assert ask.deadline > self.now
            self.inside[id(item)] = (ask, item, self.number, begun)
        if pushed.displaced is not None:
            assert pushed.held
            assert live >= self.queue.limit
            gone, _, _, had_begun = self.left(pushed.displaced.item)
            assert not had_begun
            assert gone.priority > priority or (gone.priority == priority and gone.tenant != tenant)
            yielding = [a.priority for a, _, _, b in self.inside.values() if not b and a.deadline > self.now]
            assert gone.priority >= max(yielding, default=gone.priority)

    @rule()
    def pop(self):
        head = self.queue.peek(self.now)
        waiting = self.queue.pop(self.now)
        live = [entry for entry in self.inside.values() if entry[0].deadline > self.now]
        if waiting is None:
            assert head is None
            assert not live
            return
        assert waiting == head
        ask, _, number, begun = self.left(waiting.item)
        assert ask.deadline > self.now
        assert ask.priority == min(a.priority for a, *_ in live)
        line = [(not b, n) for a, _, n, b in live if (a.priority, a.tenant) == (ask.priority, ask.tenant)]
        assert (not begun, number) == min(line)

    @rule(step=st.floats(0, 5))
    def pass_time(self, step):
        self.now += step

    @rule()
    def expire(self):
        due = {key for key, (ask, *_) in self.inside.items() if ask.deadline <= self.now}
        over = self.queue.expire(self.now)
        assert {id(waiting.item) for waiting in over} == due
        assert [w.ask.deadline for w in over] == sorted(w.ask.deadline for w in over)
        for waiting in over:
            self.left(waiting.item)

    @rule(data=st.data())
    def remove(self, data):
        if self.inside:
            item = data.draw(st.sampled_from([entry[1] for entry in self.inside.values()]))
            assert self.queue.remove(item)
            self.left(item)
            assert not self.queue.remove(item)

    @rule(tenant=st.sampled_from(TENANTS), priority=st.integers(-2, 2), used=st.integers(0, 20000))
    def charge(self, tenant, priority, used):
        self.queue.charge(an_ask(tenant, priority=priority), used)

    @rule(limit=st.integers(0, 12))
    def resize(self, limit):
        self.queue.limit = limit

    @invariant()
    def counts_agree(self):
        if hasattr(self, "queue"):
            assert len(self.queue) == len(self.inside)
            assert self.queue.lengths == Counter(ask.tenant for ask, *_ in self.inside.values())
            deadlines = [ask.deadline for ask, *_ in self.inside.values()]
            assert self.queue.next_deadline == min(deadlines, default=FOREVER)


Conservation.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestConservation = Conservation.TestCase


@pytest.mark.parametrize("corrected", [False, True])
def test_backlogged_tenants_differ_by_at_most_one_largest_request(seed, campaign, corrected):
    """Of any two tenants that wait from the beginning to the end, by tokens over weight; with corrections, by what is
    really used, and up to the corrections that have not come yet.
    """
    draw = random.Random(seed)
    for _ in range(20 * campaign):
        weights = {f"t{i}": draw.choice([0.25, 1.0, 1.0, 3.0]) for i in range(draw.randint(2, 8))}
        largest = draw.choice([1, 50, 5000])
        queue = HoldQueue(10**6, weights)

        def come(tenant, queue=queue, largest=largest):
            queue.push(an_ask(tenant, tokens=draw.randint(1, largest)), Item(tenant), 0.0)

        for tenant in weights:
            for _ in range(3):
                come(tenant)
        given = dict.fromkeys(weights, 0.0)
        for _ in range(300):
            ask = queue.pop(0.0).ask
            used = draw.randint(1, 2 * largest) if corrected else ask.tokens
            if corrected:
                queue.charge(ask, used)
            given[ask.tenant] += used / weights[ask.tenant]
            come(ask.tenant)
            bound = (2 if corrected else 1) * largest / min(weights.values())
            assert max(given.values()) - min(given.values()) <= bound * (1 + 1e-9)


def test_nobody_starves_inside_a_class(seed, campaign):
    """However others flood, a tenant's request goes before each other tenant got more than its share and a request."""
    draw = random.Random(seed)
    for _ in range(20 * campaign):
        flooders = [f"f{i}" for i in range(draw.randint(1, 6))]
        queue = HoldQueue(10**6)
        for _ in range(draw.randint(0, 50)):
            queue.push(an_ask(draw.choice(flooders), tokens=draw.randint(1, 1000)), Item("flood"), 0.0)
            if draw.random() < 0.5:
                queue.pop(0.0)
        tokens = draw.randint(1, 1000)
        queue.push(an_ask("light", tokens=tokens), light := Item("light"), 0.0)
        given = defaultdict(int)
        while (waiting := queue.pop(0.0)).item is not light:
            given[waiting.ask.tenant] += waiting.ask.tokens
            queue.push(an_ask(waiting.ask.tenant, tokens=draw.randint(1, 1000)), Item("flood"), 0.0)
        assert all(amount <= 1000 + 1000 for amount in given.values())


def test_stale_entries_do_not_pile_up():
    """The same few come and go for long: what the queue keeps stays small."""
    queue = HoldQueue(100)
    fill(queue, "stays", deadline=10**9)
    for i in range(5000):
        tenant = f"t{i % 700}"
        queue.push(an_ask(tenant, priority=i % 3, deadline=10**6 + i), item := Item("x"), float(i))
        if i % 2:
            queue.remove(item)
        else:
            queue.push(an_ask("u", priority=-1), Item("u"), float(i))
            queue.pop(float(i))
            while len(queue) > 50:
                queue.pop(float(i))
    rankings = [queue._due, queue._first, queue._last]
    for group in queue._classes.values():
        rankings += [group._turns, group._longest]
        assert len(group._lines) < 2 * 700 + 100
    assert max(len(ranking._heap) for ranking in rankings) < 300
