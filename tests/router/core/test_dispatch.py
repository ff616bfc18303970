"""Pool, policy and hold queue put together, under a virtual clock: by example, and as a state machine."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from arriero_router.core.ask import FOREVER, Ask
from arriero_router.core.dispatch import Dispatcher, Grant, Refusal, Waiter
from arriero_router.core.hold import HoldQueue
from arriero_router.core.policies import POLICIES
from arriero_router.core.pool import Pool, PoolSettings
from arriero_router.core.prefix_index import PrefixIndex
from arriero_router.core.replica import Endpoint, Report


class Client:
    """A waiter that keeps what it hears."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.heard: list[Grant | Refusal] = []
        self.withdrawn = False

    def granted(self, grant: Grant) -> None:
        assert not self.withdrawn
        self.heard.append(grant)

    def refused(self, refusal: Refusal) -> None:
        assert not self.withdrawn
        self.heard.append(refusal)


class World:
    def __init__(self, policy: str = "least-load", queue: int = 8, **pool: float) -> None:
        self.now = 0.0
        self.pool = Pool(PoolSettings(**pool), lambda: self.now, lambda: self.dispatcher.pump())  # type: ignore[arg-type]
        chosen = POLICIES[policy](PrefixIndex(1024, 64, 30.0), random.Random(0))
        held: HoldQueue[Waiter] = HoldQueue(queue)
        self.dispatcher = Dispatcher(self.pool, chosen, held, lambda: self.now)

    def replicas(self, *names: str) -> None:
        self.pool.set_endpoints([Endpoint(name, "h", 1) for name in names])

    def up(self, name: str) -> None:
        self.pool.told(name, Report(ready=True))

    def ask(self, **fields: object) -> Client:
        client = Client(Ask(model="m", **fields))  # type: ignore[arg-type]
        asked = self.dispatcher.ask(client.ask, client)
        if asked is not None:
            assert not client.heard, "told twice"
            client.heard.append(asked)
        return client


def grant(client: Client) -> Grant:
    (heard,) = client.heard
    assert isinstance(heard, Grant), heard
    return heard


def refusal(client: Client) -> Refusal:
    (heard,) = client.heard
    assert isinstance(heard, Refusal), heard
    return heard


def test_with_a_replica_ready_nobody_waits() -> None:
    world = World()
    world.replicas("a")
    world.up("a")
    assert grant(world.ask()).replica.name == "a"
    assert world.dispatcher.held == 0


def test_without_one_requests_wait_in_order() -> None:
    world = World(max_in_flight=1)
    world.replicas("a")
    clients = [world.ask() for _ in range(3)]
    assert [client.heard for client in clients] == [[], [], []]
    world.up("a")
    first = grant(clients[0])
    assert clients[1].heard == []
    world.dispatcher.release(first)
    assert grant(clients[1])
    assert clients[2].heard == []


def test_a_newcomer_does_not_overtake_those_who_wait() -> None:
    world = World(max_in_flight=1)
    world.replicas("a")
    early = world.ask()
    world.pool.settings = PoolSettings(max_in_flight=1)
    world.up("a")
    late = world.ask()
    assert grant(early)
    assert late.heard == []


def test_a_better_priority_goes_first() -> None:
    world = World()
    world.replicas("a")
    low, high = world.ask(priority=5), world.ask(priority=1)
    world.pool.settings = PoolSettings(max_in_flight=1)
    world.up("a")
    assert grant(high)
    assert low.heard == []


def test_a_full_queue_refuses() -> None:
    world = World(queue=2)
    held = [world.ask(), world.ask()]
    full = refusal(world.ask())
    assert full.full
    assert full.message == "2 requests are waiting already"
    assert full.retry_after >= 1
    assert [client.heard for client in held] == [[], []]


def test_a_late_request_hears_why() -> None:
    world = World()
    world.replicas("a")
    world.pool.told("a", Report(ready=False, reason="loading"))
    client = world.ask(deadline=5.0)
    world.now = 4.9
    world.dispatcher.pump()
    assert client.heard == []
    assert world.dispatcher.next_deadline == 5.0
    world.now = 5.0
    world.dispatcher.pump()
    late = refusal(client)
    assert not late.full
    assert late.message == "the request waited for as long as it may: no replica is ready (loading)"
    assert world.dispatcher.next_deadline == FOREVER


def test_one_whose_deadline_is_over_is_refused_at_once_but_may_go_at_once() -> None:
    world = World()
    world.now = 10.0
    assert "there is no replica" in refusal(world.ask(deadline=5.0)).message
    world.replicas("a")
    world.up("a")
    assert grant(world.ask(deadline=5.0)), "a deadline is for waiting"


def test_once_closed_nobody_waits_for_a_wake_up_that_never_comes() -> None:
    world = World()
    world.replicas("a")
    held = world.ask(deadline=60.0)
    assert held.heard == []
    world.dispatcher.close("the model is not served any more")
    after = world.ask(deadline=60.0)
    for client in (held, after):
        (refusal,) = client.heard
        assert isinstance(refusal, Refusal)
        assert refusal.message == "the model is not served any more"


def test_who_withdrew_hears_nothing() -> None:
    world = World()
    world.replicas("a")
    client = world.ask()
    client.withdrawn = True
    world.dispatcher.withdraw(client)
    world.up("a")
    assert client.heard == []
    assert world.pool.replicas[0].in_flight == 0


def test_pending_is_what_no_cache_held_until_the_first_token() -> None:
    world = World()
    world.replicas("a")
    world.up("a")
    taken = grant(world.ask(size=1000))
    replica = taken.replica
    assert (replica.in_flight, replica.pending) == (1, 1000)
    world.dispatcher.first_token(taken)
    world.dispatcher.first_token(taken)
    assert (replica.in_flight, replica.pending) == (1, 0)
    world.dispatcher.release(taken)
    assert (replica.in_flight, replica.pending) == (0, 0)
    world.dispatcher.release(grant(world.ask(size=500)))
    assert (replica.in_flight, replica.pending) == (0, 0)


def test_a_request_that_never_waited_does_not_change_its_tenants_turn() -> None:
    """What was not counted when it left the queue must not be given back when it is over."""
    world = World(max_in_flight=1)
    world.replicas("a")
    world.up("a")
    direct = world.ask(tenant="x", tokens=10_000)
    waiting = [world.ask(tenant=tenant, tokens=100) for tenant in "yx"]
    world.dispatcher.settle(direct.ask, 0)
    world.dispatcher.release(grant(direct))
    assert grant(waiting[0])
    assert waiting[1].heard == []
    assert not direct.ask.counted
    assert waiting[0].ask.counted


def test_one_that_began_goes_before_its_tenants_others() -> None:
    world = World(queue=1, max_in_flight=1)
    fresh = world.ask()
    again = world.ask(begun=True)
    assert fresh.heard == again.heard == [], "what has begun is never turned away for want of room"
    world.replicas("a")
    world.up("a")
    assert grant(again)
    assert fresh.heard == []


class Machine(RuleBasedStateMachine):
    """Requests of all kinds over replicas that come, go, fail and return.

    No count leaks; who waits hears exactly once; nobody waits while there is room; of one tenant and priority nobody
    overtakes; nobody is granted a replica that does not take requests.
    """

    NAMES = ("a", "b", "c")

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        limit=st.sampled_from([0, 1, 2, 3]),
        queue=st.integers(0, 6),
        slow=st.sampled_from([0.0, 5.0]),
    )
    def begin(self, policy: str, limit: int, queue: int, slow: float) -> None:
        self.world = World(policy, queue, max_in_flight=limit, slow_start=slow, eject_after=2, eject_base=1.0)
        self.clients: list[Client] = []
        self.running: list[Grant] = []
        self.listed: set[str] = set()

    def collect(self) -> None:
        """Take note of what clients heard since."""
        for client in self.clients:
            assert len(client.heard) <= 1, "told twice"
        granted = [c for c in self.clients if c.heard and isinstance(c.heard[0], Grant)]
        for client in granted:
            taken = grant(client)
            assert taken.ask is client.ask
            self.running.append(taken)
        left = [client for client in self.clients if not client.heard]
        self.clients = left

    @rule(names=st.sets(st.sampled_from(NAMES)))
    def listed_are(self, names: set[str]) -> None:
        self.listed = names
        self.world.replicas(*sorted(names))

    @precondition(lambda self: self.listed)
    @rule(data=st.data(), ready=st.booleans(), draining=st.booleans(), run=st.sampled_from(["", "1", "2"]))
    def told(self, data: st.DataObject, ready: bool, draining: bool, run: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.listed)))
        self.world.pool.told(name, Report(ready=ready, draining=draining, run=run))

    @precondition(lambda self: self.listed)
    @rule(data=st.data())
    def up(self, data: st.DataObject) -> None:
        self.world.up(data.draw(st.sampled_from(sorted(self.listed))))

    @rule(
        tenant=st.sampled_from(["x", "y"]),
        priority=st.integers(0, 1),
        wait=st.sampled_from([0.0, 1.0, 5.0, FOREVER]),
        size=st.sampled_from([0, 100, 5000]),
        begun=st.booleans(),
        avoid=st.sets(st.sampled_from(NAMES)),
    )
    def ask(self, tenant: str, priority: int, wait: float, size: int, begun: bool, avoid: set[str]) -> None:
        world = self.world
        marks = list(range(size // 256))
        client = world.ask(
            tenant=tenant, priority=priority, deadline=world.now + wait, size=size, marks=marks, tokens=size // 4,
            begun=begun, avoid=avoid,
        )  # fmt: skip
        if client.heard and isinstance(client.heard[0], Grant):
            before = [
                c
                for c in self.clients
                if not c.heard and (c.ask.priority, c.ask.tenant) == (priority, tenant) and c.ask.begun >= begun
            ]
            assert not before, "it overtook"
        self.clients.append(client)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), how=st.sampled_from(["done", "first", "failed", "shunned"]))
    def end(self, data: st.DataObject, how: str) -> None:
        taken = data.draw(st.sampled_from(self.running))
        world = self.world
        if how == "first":
            world.dispatcher.first_token(taken)
            return
        if how == "failed":
            world.pool.failed(taken.replica)
        elif how == "shunned":
            world.pool.shun(taken.replica)
        else:
            world.pool.succeeded(taken.replica)
        self.running.remove(taken)
        world.dispatcher.release(taken)
        world.dispatcher.settle(taken.ask, 7)

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(self.clients))
        client.withdrawn = True
        self.world.dispatcher.withdraw(client)
        self.clients.remove(client)

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.5, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.now += seconds
        self.world.dispatcher.pump()

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "world"):
            return
        self.collect()
        world = self.world
        pool = world.pool
        for replica in pool.replicas:
            mine = [taken for taken in self.running if taken.replica is replica]
            assert replica.in_flight == len(mine)
            assert replica.pending == sum(taken.unworked for taken in mine)
            limit = pool.settings.max_in_flight
            assert not limit or replica.in_flight <= limit
        assert world.dispatcher.held == len(self.clients), "who is held and who waits are the same"
        for client in self.clients:
            assert client.ask.deadline > world.now or world.dispatcher.next_deadline <= world.now

    @invariant()
    def nobody_waits_while_there_is_room(self) -> None:
        if hasattr(self, "world") and self.clients:
            self.world.dispatcher.pump()
            self.collect()
            if self.clients:
                head = self.world.dispatcher.queue.peek(self.world.now)
                assert head is None or not self.world.pool.candidates(head.ask.avoid)[0]

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.collect()
        for taken in self.running:
            self.world.dispatcher.release(taken)
        self.running = []
        while True:
            self.collect()
            if not self.running:
                break
            self.world.dispatcher.release(self.running.pop())
        for client in self.clients:
            self.world.dispatcher.withdraw(client)
        assert self.world.dispatcher.held == 0
        assert all((replica.in_flight, replica.pending) == (0, 0) for replica in self.world.pool.replicas)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
