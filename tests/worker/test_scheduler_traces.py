"""Random traces against the model in scheduler_model.py: nothing leaks, nothing is mixed up, everybody gets an end.

`pytest tests/worker/test_scheduler_traces.py --campaign 100` tries a hundred times as many.
"""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.worker.scheduler_model import VOCABULARY, Harness

TOKENS = st.integers(0, VOCABULARY - 1)


class Traces(RuleBasedStateMachine):
    """Clients, engine and failures in any order. KV and slots are scarce: preemption never ceases."""

    @initialize(
        block_size=st.integers(1, 4),
        kv_blocks=st.integers(4, 24),
        max_running=st.integers(1, 6),
        spare_budget=st.integers(0, 12),
        max_chunk_tokens=st.integers(0, 5),
        max_waiting=st.integers(1, 12),
        pipeline=st.integers(1, 3),
        prefix_cache=st.booleans(),
    )
    def start(self, max_running: int, spare_budget: int, **sizes: int) -> None:
        self.harness = Harness(
            max_running=max_running, max_batch_tokens=max_running + spare_budget, max_context=40, **sizes
        )
        self.prompts: list[list[int]] = []

    @rule(
        prompt=st.lists(TOKENS, max_size=24),
        like=st.none() | st.tuples(st.integers(0, 100), st.integers(0, 24)),
        output=st.just([]) | st.lists(TOKENS, max_size=6),
        max_tokens=st.integers(1, 30),
        stops=st.lists(TOKENS, max_size=2).map(tuple),
        priority=st.integers(0, 2),
        cache_salt=st.sampled_from(["", "", "blue"]),
        queue_timeout=st.sampled_from([0.0, 0.0, 1.0]),
        run_timeout=st.sampled_from([0.0, 0.0, 5.0]),
        logprobs=st.sampled_from([-1, -1, 0, 2]),
        prompt_logprobs=st.sampled_from([-1, -1, 1]),
        stride=st.sampled_from([0, 0, 1, 3, 4]),
        shift=st.integers(-3, 3),
        copies=st.sampled_from([1, 1, 1, 3]),
    )
    def submit(self, prompt: list[int], like: tuple[int, int] | None, copies: int, **fields: object) -> None:
        if like is not None and self.prompts:  # a prefix of an earlier prompt, continued
            earlier = self.prompts[like[0] % len(self.prompts)]
            prompt = (earlier[: like[1]] + prompt)[:30]
        self.prompts.append(prompt)
        for _ in range(copies):
            self.harness.submit(prompt, **fields)  # type: ignore[arg-type]

    @rule(steps=st.integers(1, 4))
    def schedule(self, steps: int) -> None:
        for _ in range(steps):
            self.harness.schedule()

    @precondition(lambda self: self.harness.in_flight)
    @rule()
    def commit(self) -> None:
        self.harness.commit()

    @rule(turns=st.integers(1, 12))
    def loop(self, turns: int) -> None:
        for _ in range(turns):
            self.harness.step()

    @precondition(lambda self: self.harness.taken)
    @rule(choice=st.lists(st.integers(0, 1000), min_size=1, max_size=3))
    def abort(self, choice: list[int]) -> None:
        ids = list(self.harness.taken)
        self.harness.abort(*(ids[index % len(ids)] for index in choice))

    @rule(seconds=st.sampled_from([0.5, 2.0]))
    def wait(self, seconds: float) -> None:
        self.harness.wait(seconds)

    @rule()
    def take_events(self) -> None:
        self.harness.take_events()

    @rule()
    def lose_a_rank(self) -> None:
        self.harness.reset()

    @precondition(lambda self: len(self.harness.taken) > 5)
    @rule()
    def drain(self) -> None:
        self.harness.scheduler.drain()

    @invariant()
    def check(self) -> None:
        if hasattr(self, "harness"):
            self.harness.check()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.finish()


def test_any_order_of_events(campaign: int) -> None:
    run_state_machine_as_test(
        Traces,
        settings=settings(
            max_examples=200 * campaign,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def random_trace(seed: int) -> Harness:
    """A busier life than a state machine finds by itself: waves of requests, long outputs, now and then a calamity."""
    rng = random.Random(seed)
    block_size = rng.randint(1, 5)
    max_running = rng.randint(1, 8)
    harness = Harness(
        block_size=block_size,
        kv_blocks=rng.randint(4, 8 + 60 // block_size),
        max_context=rng.randint(10, 60),
        max_running=max_running,
        max_waiting=rng.randint(1, 20),
        max_batch_tokens=max_running + rng.randint(0, 24),
        max_chunk_tokens=rng.choice([0, 0, 1, 3, 7]),
        pipeline=rng.randint(1, 3),
        prefix_cache=rng.random() < 0.8,
    )
    systems = [rng.choices(range(VOCABULARY), k=rng.randint(0, 16)) for _ in range(3)]
    calm = rng.random() < 0.5
    for _ in range(rng.randint(5, 60)):
        for _ in range(rng.choice([0, 0, 0, 1, 1, 4])):
            prompt = rng.choice(systems) + rng.choices(range(VOCABULARY), k=rng.randint(0, 8))
            for _ in range(rng.choice([1, 1, 1, 1, 4])):
                harness.submit(
                    prompt,
                    max_tokens=rng.choice([1, 2, 5, 20, 60]),
                    stops=tuple(rng.choices(range(VOCABULARY), k=rng.choice([0, 0, 1, 2]))),
                    output=rng.choices(range(VOCABULARY), k=rng.choice([0, 0, 0, 3])),
                    priority=rng.choice([0, 0, 0, 1, -3]),
                    cache_salt=rng.choice(["", "", "", "blue"]),
                    queue_timeout=rng.choice([0.0, 0.0, 20.0]),
                    run_timeout=rng.choice([0.0, 0.0, 0.0, 40.0]),
                    logprobs=rng.choice([-1, -1, -1, 1]),
                    prompt_logprobs=rng.choice([-1, -1, -1, -1, 0]),
                    stride=rng.choice([0, 1, 2, 5]),
                    shift=rng.choice([0, 0, -4, 2]),
                )
        for _ in range(rng.randint(0, 4)):
            harness.schedule()
        for _ in range(rng.randint(0, 3)):
            if harness.in_flight:
                harness.commit()
        harness.wait(1.0)
        if not calm:
            if rng.random() < 0.1 and harness.taken:
                harness.abort(*rng.choices(list(harness.taken), k=2))
            if rng.random() < 0.03:
                harness.reset()
            if rng.random() < 0.1:
                harness.take_events()
    harness.finish()
    return harness


def test_random_traces(campaign: int, seed: int) -> None:
    """Each is named by its seed: `random_trace(seed)` plays it again."""
    preemptions = cached = forgotten = 0
    ends: set[str] = set()
    for trace in range(seed, seed + 400 * campaign):
        try:
            harness = random_trace(trace)
        except BaseException:
            print(f"random_trace({trace}) failed")
            raise
        preemptions += harness.scheduler.stats.preemptions
        cached += harness.scheduler.stats.cached_tokens
        forgotten += harness.forgotten
        ends.update(harness.ended.values())
    # The traces are worth something only if they get into trouble.
    assert preemptions > 500 * campaign
    assert cached > 500 * campaign
    assert forgotten > 500 * campaign
    assert ends == {"stop", "length", "abort", "timeout"} | {
        f"refused: {code}" for code in ("invalid", "too_long", "queue_full", "timeout")
    }
