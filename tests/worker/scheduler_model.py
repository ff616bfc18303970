"""A group that checks what the scheduler asks of it, and the clients that check what they get back.

`StubGroup` replays each plan as a rank would: slots with tokens and block tables, and a physical KV. What it writes
for a position is a number that names the salt and every token up to there, so one comparison tells whether a block
holds what its reader believes. The sampled token follows from that number: whatever is preempted, shared, chunked or
lost, a request's output must be that of the same request alone (`expected_output`).
"""

from __future__ import annotations

import zlib
from array import array
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from arriero_worker.engine.blocks import extend_keys
from arriero_worker.engine.messages import EngineRequest, Outputs, SamplingParams, TokenLogprobs
from arriero_worker.engine.scheduler import Scheduler, SchedulerSettings
from arriero_worker.engine.step import SampledLogprobs, StepPlan, StepResult

VOCABULARY = 11
"""Small, so that stop tokens come up and texts coincide."""


def start_of(salt: str) -> int:
    return zlib.crc32(salt.encode())


def follow(content: int, token: int) -> int:
    """The content of the position behind one of `content`, where `token` is."""
    return hash((content, token))


def sample(content: int) -> int:
    """The stub model: the token that follows a context."""
    return (content >> 11) % VOCABULARY


def expected_output(request: EngineRequest, max_length: int) -> tuple[list[int], str]:
    """(new tokens, finish reason) of the request when nothing disturbs it."""
    content = start_of(request.cache_salt)
    for token in request.prompt + request.output:
        content = follow(content, token)
    limit = min(request.sampling.max_tokens, max_length - len(request.prompt))
    output = list(request.output)
    if output and output[-1] in request.sampling.stop_token_ids:
        return [], "stop"
    while len(output) < limit:
        token = sample(content)
        content = follow(content, token)
        output.append(token)
        if token in request.sampling.stop_token_ids:
            return output[len(request.output) :], "stop"
    return output[len(request.output) :], "length"


def marks_of(prompt: list[int], salt: str, stride: int, shift: int) -> list[tuple[int, int]]:
    """A mark for each `stride` tokens, its depth told wrong by `shift`, as far as the prompt goes."""
    content, marks = start_of(salt), []
    for length, token in enumerate(prompt, 1):
        content = follow(content, token)
        if length % stride == 0:
            depth = min(max(length + shift, 1), len(prompt))
            marks.append((depth, content & (2**64 - 1)))
    return marks


@dataclass
class Slot:
    request: EngineRequest
    prompt_length: int
    tokens: list[int]
    sampled_at: list[int]
    """The step that sampled each token; -1: came with the plan."""
    contents: list[int]
    computed: int = -1
    """Tokens whose KV is there; -1: no chunk seen yet."""
    blocks: list[int] = field(default_factory=list)


class StubGroup:
    """All ranks of a replica as one, running steps in order. A slot's request is found by its unique sampling seed."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self.settings = settings
        self.requests: dict[int, EngineRequest] = {}
        self.last_step = -1
        self.reset()

    def reset(self) -> None:
        self.slots: dict[int, Slot] = {}
        self.last_sampled: dict[int, int] = {}
        self.kv: dict[tuple[int, int], int] = {}

    def run(self, plan: StepPlan) -> StepResult:
        settings = self.settings
        assert plan.step > self.last_step
        self.last_step = plan.step
        decodes = array("i", plan.decodes)
        tokens = sum(chunk.length for chunk in plan.chunks) + len(decodes)
        assert 0 < tokens <= settings.max_batch_tokens
        named = [chunk.slot for chunk in plan.chunks] + list(decodes)
        assert len(named) == len(set(named))
        self._apply(plan)
        spans = [self._chunk(plan, index) for index in range(len(plan.chunks))]
        spans += [self._decode(plan.step, slot) for slot in decodes]
        # What a step reads was there before it: nothing it writes itself is shared.
        for slot, start, _end in spans:
            for position in range(start):
                assert self.kv.get(self._place(slot, position)) == slot.contents[position], "reads another's KV"
        written = [self._place(slot, position) for slot, start, end in spans for position in range(start, end)]
        assert len(written) == len(set(written)), "two sequences write one place"
        for slot, start, end in spans:
            for position in range(start, end):
                self.kv[self._place(slot, position)] = slot.contents[position]
            slot.computed = end
        return self._result(plan, decodes)

    def _apply(self, plan: StepPlan) -> None:
        for admit in plan.admits:
            assert 0 <= admit.slot < self.settings.max_running
            before = self.last_sampled.get(admit.slot, -self.settings.pipeline)
            assert before <= plan.step - self.settings.pipeline, "a result of the slot's old sequence may still come"
            request = self.requests[admit.sampling.seed]
            contents = [start_of(request.cache_salt)]
            for token in admit.tokens:
                contents.append(follow(contents[-1], token))
            slot = Slot(request, admit.prompt_length, list(admit.tokens), [-1] * len(admit.tokens), contents[1:])
            assert slot.tokens[: len(request.prompt)] == request.prompt
            assert slot.prompt_length == len(request.prompt)
            self.slots[admit.slot] = slot
        for grow in plan.grows:
            assert grow.blocks
            assert all(0 <= block < self.settings.kv_blocks for block in grow.blocks)
            self.slots[grow.slot].blocks += grow.blocks

    def _place(self, slot: Slot, position: int) -> tuple[int, int]:
        index, offset = divmod(position, self.settings.block_size)
        return slot.blocks[index], offset

    def _chunk(self, plan: StepPlan, index: int) -> tuple[Slot, int, int]:
        chunk = plan.chunks[index]
        slot = self.slots[chunk.slot]
        if slot.computed < 0:  # what lies before the first chunk was found in the prefix cache
            assert chunk.start % self.settings.block_size == 0
            assert not (chunk.start and chunk.prompt_logprobs)
            slot.computed = chunk.start
        end = chunk.start + chunk.length
        assert chunk.start == slot.computed
        assert 0 < chunk.length <= (self.settings.max_chunk_tokens or self.settings.max_batch_tokens)
        assert end <= len(slot.tokens)
        assert chunk.sample == (end == len(slot.tokens))
        assert all(step < 0 for step in slot.sampled_at), "a chunk follows a decode"
        return slot, chunk.start, end

    def _decode(self, step: int, index: int) -> tuple[Slot, int, int]:
        slot = self.slots[index]
        position = len(slot.tokens) - 1
        assert position == slot.computed, "decodes before its prefill is complete"
        assert slot.sampled_at[-1] <= step - self.settings.pipeline, "feeds a token that has not come back"
        assert slot.sampled_at[-1] >= 0
        return slot, position, position + 1

    def _result(self, plan: StepPlan, decodes: array[int]) -> StepResult:
        result = StepResult(plan.step, [])
        for chunk in plan.chunks:
            if chunk.prompt_logprobs:
                slot = self.slots[chunk.slot]
                last = min(chunk.start + chunk.length, slot.prompt_length - 1)
                reported = [
                    SampledLogprobs(position, slot.tokens[position], -1.0, 1, [0, 1], [-1.0, -2.0])
                    for position in range(chunk.start + 1, last + 1)
                ]
                result.prompt_logprobs.append((chunk.slot, reported))
        for index in [chunk.slot for chunk in plan.chunks if chunk.sample] + list(decodes):
            slot = self.slots[index]
            token = sample(slot.contents[-1])
            if slot.request.sampling.logprobs >= 0:
                result.logprobs.append(SampledLogprobs(len(result.tokens), token, -0.5, 1, [token, 0], [-0.5, -2.0]))
            result.tokens.append(token)
            slot.tokens.append(token)
            slot.contents.append(follow(slot.contents[-1], token))
            slot.sampled_at.append(plan.step)
            self.last_sampled[index] = plan.step
        return result


class Harness:
    """A scheduler between a `StubGroup` and clients; every call checks what must always hold."""

    def __init__(self, **settings: int | bool) -> None:
        defaults: dict[str, Any] = {
            "block_size": 4,
            "kv_blocks": 64,
            "max_context": 64,
            "max_running": 4,
            "max_waiting": 100,
            "max_batch_tokens": 32,
            "vocab_size": VOCABULARY,
        }
        self.settings = SchedulerSettings(**{**defaults, **settings})
        self.now = 1000.0
        self.scheduler = Scheduler(self.settings, lambda: self.now)
        self.group = StubGroup(self.settings)
        self.in_flight: deque[StepResult] = deque()
        self.plans: list[StepPlan] = []
        self.taken: dict[int, EngineRequest] = {}
        self.received: dict[int, list[int]] = {}
        self.cached: dict[int, int] = {}
        self.prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        self.ended: dict[int, str] = {}
        self.outputs: list[Outputs] = []
        self.losses: dict[int, tuple[int, int]] = {}
        """For each request, how many epochs in a row ended under it at this number of tokens received."""
        self.told: set[int] = set()
        """Marks, as the faces would know them."""
        self.forgotten = 0
        self._places: dict[int, set[bytes]] = {}
        """The keys of blocks where each mark may lie."""
        self._ids = 0

    # What clients do

    def submit(
        self,
        prompt: list[int],
        max_tokens: int = 8,
        stops: tuple[int, ...] = (),
        logprobs: int = -1,
        prompt_logprobs: int = -1,
        stride: int = 0,
        shift: int = 0,
        **fields: Any,
    ) -> int:
        """Returns the id; a refusal ends it at once, as `refused: <code>`. With a `stride` it has marks: `marks_of`."""
        id_ = self._ids
        self._ids += 1
        sampling = SamplingParams(
            max_tokens=max_tokens,
            seed=id_,
            stop_token_ids=stops,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        if stride:
            fields["marks"] = marks_of(prompt, fields.get("cache_salt", ""), stride, shift)
        request = EngineRequest(id=id_, prompt=prompt, sampling=sampling, **fields)
        refusal = self.scheduler.submit(request)
        if refusal is not None:
            assert refusal.id == id_
            assert refusal.message
            self.ended[id_] = f"refused: {refusal.code}"
        else:
            self.taken[id_] = self.group.requests[id_] = request
            self.received[id_] = []
            self._note_places(request)
        self.check()
        return id_

    def abort(self, *ids: int) -> None:
        self.scheduler.abort(ids)
        self.check()

    def wait(self, seconds: float) -> None:
        self.now += seconds

    # What the engine does

    def schedule(self) -> StepPlan | None:
        scheduler = self.scheduler
        first = min(scheduler._living.values(), key=lambda sequence: sequence.order, default=None)
        running = first is not None and first.slot >= 0
        oldest = self.in_flight[0].step if self.in_flight else None
        plan = scheduler.schedule()
        if first is not None and running and first.id in scheduler._living:
            assert first.slot >= 0, "the first of all was preempted"
        if plan is not None:
            assert oldest is None or plan.step - oldest <= self.settings.pipeline
            assert len(self.in_flight) <= self.settings.pipeline
            self.plans.append(plan)
            self.in_flight.append(self.group.run(plan))
        self.check()
        return plan

    def commit(self) -> Outputs:
        outputs = self.scheduler.commit(self.in_flight.popleft())
        self._deliver(outputs)
        self.check()
        return outputs

    def take_events(self) -> None:
        outputs = self.scheduler.take_events()
        if outputs is not None:
            assert not outputs.ids
            self._deliver(outputs)
        self.check()

    def reset(self) -> None:
        for sequence in self.scheduler._running:
            count, gained = self.losses.get(sequence.id, (0, -1))
            now = len(self.received[sequence.id])
            self.losses[sequence.id] = (count + 1 if now == gained else 1, now)
        self.scheduler.reset()
        self.group.reset()
        self.in_flight.clear()
        self.check()

    def step(self) -> Outputs | None:
        """One turn of the engine's loop: schedule all that may be in flight, commit the oldest."""
        while self.schedule() is not None:
            pass
        self.take_events()
        return self.commit() if self.in_flight else None

    def finish(self) -> None:
        """Run until nothing is left, within a bound, and check each request's end."""
        bound = 50 + 4 * (self.settings.pipeline + 1) * sum(s.limit for s in self.scheduler._living.values())
        for _ in range(bound):
            if self.scheduler.idle:
                break
            if self.step() is None and not self.scheduler.idle:
                raise AssertionError("requests are left, nothing is in flight, and nothing is scheduled")
        assert self.scheduler.idle, f"not done after {bound} steps"
        assert not self.scheduler.has_work
        assert self.scheduler._blocks.available == self.settings.kv_blocks
        assert not self.scheduler._prefixes._promised
        assert not self.scheduler._stops
        for id_, request in self.taken.items():
            self._check_end(id_, request)

    # What must hold

    def _note_places(self, request: EngineRequest) -> None:
        size = self.settings.block_size
        tokens = array("i", request.prompt + request.output)
        tokens.extend(expected_output(request, self.settings.max_length)[0])
        keys: list[bytes] = []
        extend_keys(keys, tokens, size, len(tokens) // size, request.cache_salt)
        for depth, mark in request.marks:
            self._places.setdefault(mark, set()).update(keys[(depth - 1) // size : (depth - 1) // size + 1])

    def _hear_marks(self) -> None:
        news = self.scheduler.take_mark_news()
        if news is None:
            return
        if news.reset:
            self.told.clear()
        assert not self.told.intersection(news.added)
        assert self.told.issuperset(news.removed)
        self.told.update(news.added)
        self.told.difference_update(news.removed)
        self.forgotten += len(news.removed)

    def _check_marks(self) -> None:
        """What was told is what cached blocks carry, each mark where it belongs, and none is missing."""
        self._hear_marks()
        pool, size = self.scheduler._blocks, self.settings.block_size
        carried = pool.marks.of
        assert self.told == {mark for marks in carried.values() for mark in marks} == set(self.scheduler.marks)
        for block, marks in carried.items():
            assert 0 < len(marks) == len(set(marks)) <= 16
            for mark in marks:
                assert pool._key[block] in self._places[mark]
        for sequence in self.scheduler._running:
            for depth, mark in sequence.request.marks:
                index = (depth - 1) // size
                if index >= sequence.published or not self.settings.prefix_cache:
                    break
                block = sequence.blocks[index]
                if pool._key[block] is not None:  # else another's block is the cached one
                    assert mark in carried[block] or len(carried[block]) == 16

    def _deliver(self, outputs: Outputs) -> None:
        self.outputs.append(outputs)
        for id_, cached in outputs.cached:
            assert id_ not in self.cached
            assert 0 <= cached <= len(self.taken[id_].prompt)
            self.cached[id_] = cached
        for id_, entries in outputs.prompt_logprobs:
            assert id_ not in self.ended
            self.prompt_logprobs.setdefault(id_, []).extend(entries)
        assert len(outputs.ids) == len(set(outputs.ids)) == len(outputs.tokens)
        for id_, token in zip(outputs.ids, outputs.tokens, strict=True):
            assert id_ not in self.ended, "a token after the end"
            assert id_ in self.cached, "a token before the start"
            self.received[id_].append(token)
        wanted = {id_ for id_ in outputs.ids if self.taken[id_].sampling.logprobs >= 0}
        told = dict(outputs.logprobs)
        assert set(told) == wanted
        assert len(told) == len(outputs.logprobs)
        for id_, entry in told.items():
            assert entry.token == self.received[id_][-1]
            assert len(entry.top) == min(2, self.taken[id_].sampling.logprobs)
        for finish in outputs.finished:
            assert finish.id not in self.ended, "two ends"
            assert (finish.stop_token >= 0) == (finish.reason == "stop")
            self.ended[finish.id] = finish.reason
        for refusal in outputs.refused:
            assert refusal.id not in self.ended, "two ends"
            assert refusal.id not in self.cached, "refused after its start"
            self.ended[refusal.id] = f"refused: {refusal.code}"

    def _check_end(self, id_: int, request: EngineRequest) -> None:
        tokens, reason = expected_output(request, self.settings.max_length)
        ended = self.ended[id_]
        if ended in ("stop", "length"):
            assert (self.received[id_], ended) == (tokens, reason)
            if request.sampling.prompt_logprobs >= 0 and tokens:
                assert [entry.token for entry in self.prompt_logprobs.get(id_, [])] == request.prompt[1:]
        else:
            hopeless = self.losses.get(id_, (0, 0))[0] >= 5
            assert ended in ("abort", "timeout", "refused: timeout") or (ended == "error" and hopeless)
            assert self.received[id_] == tokens[: len(self.received[id_])]

    def check(self) -> None:
        """Every block is held exactly by those who list it; every sequence is in exactly one place."""
        scheduler, pool = self.scheduler, self.scheduler._blocks
        running, waiting = list(scheduler._running), list(scheduler._waiting)
        assert {s.id for s in running + waiting} == set(scheduler._living)
        assert len(running) + len(waiting) == len(scheduler._living)
        assert [s.order for s in running] == sorted(s.order for s in running)
        assert [s.order for s in waiting] == sorted(s.order for s in waiting)
        slots = [s.slot for s in running] + [slot for _usable, slot in scheduler._free_slots]
        assert sorted(slots) == list(range(self.settings.max_running))
        assert all(s.slot < 0 and not s.blocks for s in waiting)
        held = Counter(block for s in running for block in s.blocks)
        assert [held[block] for block in range(pool.size)] == pool._references
        resting = {block for block in range(pool.size) if not held[block]}
        assert {b for b in resting if pool._key[b] is not None} == set(pool._idle)
        assert {b for b in resting if pool._key[b] is None} == set(pool._free)
        assert len(pool._free) == len(set(pool._free))
        assert pool._cached == {key: block for block, key in enumerate(pool._key) if key is not None}
        assert pool.used + pool.available == pool.size
        for sequence in running:  # what more than one holds is full, and was found in the cache
            own = sequence.blocks[sequence.published :]
            assert all(held[block] == 1 for block in own)
        self._check_marks()
        lanes = [s for lane in scheduler._lanes._lanes for s in lane.sequences]
        assert len(lanes) == len({s.id for s in lanes})
        assert all(s.slot >= 0 for s in lanes)
