"""The batch state: what a plan becomes, against the same done one token at a time."""

from __future__ import annotations

import random as stdlib_random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero_worker.engine.messages import SamplingParams
from arriero_worker.engine.step import Admit, Chunk, Grow, StepPlan
from arriero_worker.runner.batch import BatchState, Step

BLOCK = 4
CONTEXT = 50


def sampling(**fields: object) -> SamplingParams:
    return SamplingParams(max_tokens=10, **fields)  # type: ignore[arg-type]


def slots_of(*slots: int) -> bytes:
    return np.array(slots, dtype="<i4").tobytes()


class Naive:
    """A slot as a Python list."""

    def __init__(self, admit: Admit, computed: int) -> None:
        self.tokens = list(admit.tokens)
        self.known = len(admit.tokens)
        self.prompt_length = admit.prompt_length
        self.top = max(admit.sampling.prompt_logprobs, 0)
        self.blocks: list[int] = []
        self.computed = computed


def check(plan: StepPlan, step: Step, slots: dict[int, Naive]) -> None:
    """`slots` before the step's tokens are appended, after its admits and grows."""
    spans = [(c.slot, c.start, c.start + c.length) for c in plan.chunks]
    decodes = np.frombuffer(plan.decodes, dtype="<i4").tolist()
    spans += [(slot, len(slots[slot].tokens) - 1, len(slots[slot].tokens)) for slot in decodes]
    tokens = [slots[slot].tokens[i] for slot, start, end in spans for i in range(start, end)]
    positions = [i for _, start, end in spans for i in range(start, end)]
    cache = [slots[s].blocks[i // BLOCK] * BLOCK + i % BLOCK for s, start, end in spans for i in range(start, end)]
    starts = [0]
    for _, start, end in spans:
        starts.append(starts[-1] + end - start)
    forward = step.forward
    assert forward.tokens_T.tolist() == tokens
    assert forward.positions_T.tolist() == positions
    assert forward.slots_T.tolist() == cache
    assert forward.query_starts_B1.tolist() == starts
    assert forward.context_lengths_B.tolist() == [end for *_, end in spans]
    for row, (slot, _, end) in zip(forward.block_tables_BP.tolist(), spans, strict=True):
        needed = -(-end // BLOCK)
        assert row[:needed] == slots[slot].blocks[:needed]
    sampled = [i for i, c in enumerate(plan.chunks) if c.sample] + list(range(len(plan.chunks), len(spans)))
    rows = [starts[i + 1] - 1 for i in sampled]
    prompts = []
    for i, chunk in enumerate(plan.chunks):
        naive = slots[chunk.slot]
        targets = [p for p in range(chunk.start + 1, chunk.start + chunk.length + 1) if p < naive.prompt_length]
        if chunk.prompt_logprobs and targets:
            rows += [starts[i] + p - chunk.start - 1 for p in targets]
            prompts.append((chunk.slot, targets[0], [naive.tokens[p] for p in targets], naive.top))
    assert forward.logits_rows_R.tolist() == rows
    assert step.slots_N.tolist() == [spans[i][0] for i in sampled]
    assert step.positions_N.tolist() == [spans[i][2] for i in sampled]
    assert [(p.slot, p.first, p.targets.tolist(), p.top) for p in step.prompts] == prompts
    int32 = {"query_starts_B1", "context_lengths_B", "block_tables_BP"}
    for name in forward.__slots__:
        tensor = getattr(forward, name)
        assert tensor.dtype == (torch.int32 if name in int32 else torch.int64), name
        assert tensor.is_contiguous(), name


class Plans:
    """Random plans over all slots: admits into any slot, used or not, chunks, decodes and growth."""

    def __init__(self, seed: int, max_running: int) -> None:
        self.rng = stdlib_random.Random(seed)
        self.max_running = max_running
        self.slots: dict[int, Naive] = {}
        self.blocks = 0

    def next(self, number: int) -> StepPlan:
        rng, plan = self.rng, StepPlan(number)
        decodes: list[int] = []
        for slot in rng.sample(range(self.max_running), self.max_running):
            naive = self.slots.get(slot)
            if naive is None or len(naive.tokens) == CONTEXT or rng.random() < 0.1:
                naive = self.admit(slot, plan)
            elif plan.chunks and rng.random() < 0.2:
                continue
            if naive.computed < naive.known:
                length = rng.randint(1, naive.known - naive.computed)
                end = naive.computed + length
                plan.chunks.append(Chunk(slot, naive.computed, length, end == naive.known, rng.random() < 0.5))
                naive.computed = end
            else:
                decodes.append(slot)
                naive.computed = len(naive.tokens)
            lacking = -(-naive.computed // BLOCK) - len(naive.blocks)
            if lacking > 0:
                fresh = list(range(self.blocks, self.blocks + lacking))
                self.blocks += lacking
                plan.grows.append(Grow(slot, fresh))
                naive.blocks += fresh
        plan.decodes = slots_of(*decodes)
        return plan

    def admit(self, slot: int, plan: StepPlan) -> Naive:
        rng = self.rng
        tokens = [rng.randrange(100) for _ in range(rng.randint(1, 30))]
        params = sampling(prompt_logprobs=rng.choice([-1, 0, 3]))
        plan.admits.append(Admit(slot, tokens, rng.randint(1, len(tokens)), params))
        cached = rng.randrange(len(tokens))  # what a prefix cache would give
        self.slots[slot] = naive = Naive(plan.admits[-1], cached)
        return naive

    def append(self, slots: list[int], tokens: list[int]) -> None:
        for slot, token in zip(slots, tokens, strict=True):
            self.slots[slot].tokens.append(token)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), max_running=st.integers(1, 7), steps=st.integers(1, 60))
def test_plans_become_batches(seed: int, max_running: int, steps: int) -> None:
    plans, state = Plans(seed, max_running), BatchState(max_running, CONTEXT, BLOCK)
    for number in range(steps):
        plan = plans.next(number)
        step = state.apply(plan)
        check(plan, step, plans.slots)
        tokens = [plans.rng.randrange(100) for _ in step.slots_N]
        state.store(number, step.slots_N, np.array(tokens, dtype=np.int64))
        plans.append(step.slots_N.tolist(), tokens)


def admitted(state: BatchState, step: int, slot: int, tokens: list[int], blocks: list[int]) -> Step:
    return state.apply(
        StepPlan(
            step,
            chunks=[Chunk(slot, 0, len(tokens), True)],
            grows=[Grow(slot, blocks)],
            admits=[Admit(slot, tokens, len(tokens), sampling())],
        )
    )


def test_a_late_result_does_not_reach_the_slots_next_sequence() -> None:
    """With stages in between, the result of step 0 comes when step 1 has given its slot away."""
    state = BatchState(2, CONTEXT, BLOCK)
    before = state.apply(
        StepPlan(
            0,
            chunks=[Chunk(0, 0, 2, True), Chunk(1, 0, 1, True)],
            grows=[Grow(0, [0]), Grow(1, [1])],
            admits=[Admit(0, [5, 6], 2, sampling()), Admit(1, [7], 1, sampling())],
        )
    )
    after = admitted(state, 1, 0, [8, 9], [2])
    state.store(1, after.slots_N, np.array([40]))
    state.store(0, before.slots_N, np.array([30, 31]))
    step = state.apply(StepPlan(2, slots_of(0, 1)))
    assert step.forward.tokens_T.tolist() == [40, 31]


def test_a_prefix_hit_of_all_but_the_last_token_may_decode_at_once() -> None:
    state = BatchState(1, CONTEXT, BLOCK)
    admit = Admit(0, [3, 1, 4, 1, 5], 5, sampling())
    step = state.apply(StepPlan(0, slots_of(0), grows=[Grow(0, [9, 8])], admits=[admit]))
    assert step.forward.tokens_T.tolist() == [5]
    assert step.forward.slots_T.tolist() == [8 * BLOCK]
    assert step.positions_N.tolist() == [5]


def test_seeds_keep_64_bits() -> None:
    state = BatchState(3, CONTEXT, BLOCK)
    seeds = [-1, 2**64 - 2, 2**63]
    admits = [Admit(i, [1], 1, sampling(seed=seed)) for i, seed in enumerate(seeds)]
    grows = [Grow(i, [i]) for i in range(3)]
    state.apply(StepPlan(0, chunks=[Chunk(0, 0, 1, True)], grows=grows, admits=admits))
    assert state.seeds_S.tolist() == [2**64 - 1, 2**64 - 2, 2**63]


def test_tokens_without_a_block_are_caught() -> None:
    """They would be written over another sequence's KV."""
    state = BatchState(2, CONTEXT, BLOCK)
    admitted(state, 0, 0, [1, 2, 3, 4], [7])
    with pytest.raises(AssertionError, match="step 1 computes tokens beyond their slots' blocks"):
        state.apply(StepPlan(1, slots_of(0)))


def test_what_a_plan_may_not_ask() -> None:
    state = BatchState(2, CONTEXT, BLOCK)
    admitted(state, 0, 0, [1, 2, 3, 4], [7])
    with pytest.raises(AssertionError, match=r"computes tokens \[2, 5\) of slot 0, which has 4"):
        state.apply(StepPlan(1, chunks=[Chunk(0, 2, 3, True)], grows=[Grow(0, [8])]))
    with pytest.raises(AssertionError, match="slot 1 grows to 14 blocks; its table holds 13"):
        state.apply(StepPlan(2, grows=[Grow(1, list(range(14)))]))
    with pytest.raises(AssertionError, match="step 3 has nothing to compute"):
        state.apply(StepPlan(3))
