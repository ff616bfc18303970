"""Who computes what in the next step, and what came of the last one.

The engine's loop is `plan = schedule()`, run it on every rank, `outputs = commit(result)`. Both are pure bookkeeping:
no torch, no network, no clock but the injected one.

Order. Everything follows `Sequence.order` (priority, then arrival), strictly: the queue, the chunks of a step, and,
from the other end, who is preempted. So the first of all living sequences is never preempted, and alone it always
fits (`submit` sees to that): it ends, then the next one is first. No one starves once no better ones arrive; there is
no aging.

Steps. Lane n % P is decoded by step n (lanes.py). A number whose lane is empty, while there is no prefill to do, is
skipped. Step n is issued once every issued step before n - P is committed, so at most P + 1 are in flight, and a
sequence in two of them at most.

Ends. A sequence that ends at step n may be in a later step already. That result is dropped, and its blocks may serve
others at once: every rank runs the steps in order, so the late write lands before the new owner's.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

from arriero_worker.engine.blocks import BlockPool
from arriero_worker.engine.issued import Issued
from arriero_worker.engine.lanes import Lanes
from arriero_worker.engine.limits import SchedulerSettings, invalid, too_long
from arriero_worker.engine.marks import MarkNews
from arriero_worker.engine.messages import EngineRequest, Finish, FinishReason, Outputs, Refusal
from arriero_worker.engine.prefixes import Prefixes
from arriero_worker.engine.queue import Deadlines, Ordered
from arriero_worker.engine.sequence import Sequence
from arriero_worker.engine.step import Admit, Chunk, Grow, StepPlan, StepResult

__all__ = ["Scheduler", "SchedulerSettings", "Stats"]

_append = array.append
_MARKS_PER_BLOCK = 16  # several times what one prompt puts there: the faces send no more than one for 4 tokens
_LOSSES = 5  # epochs that may end under a sequence without a token gained


@dataclass(slots=True)
class Stats:
    """Gauges are of now, counters since the scheduler was made."""

    running: int = 0
    waiting: int = 0
    kv_blocks: int = 0
    kv_blocks_used: int = 0
    steps: int = 0
    """Steps issued."""
    prompt_tokens: int = 0
    """Prompt tokens of the sequences that were started, each counted once."""
    cached_tokens: int = 0
    """Those of them that the prefix cache spared."""
    generated_tokens: int = 0
    preemptions: int = 0


class Scheduler:
    """Plans steps for the requests of one replica. Not thread-safe."""

    def __init__(self, settings: SchedulerSettings, clock: Callable[[], float]) -> None:
        self.settings = settings
        self._clock = clock
        self._blocks = BlockPool(settings.kv_blocks, max(_MARKS_PER_BLOCK, settings.block_size // 2))
        self._prefixes = Prefixes(self._blocks, settings.block_size, settings.prefix_cache)
        self._living: dict[int, Sequence] = {}
        self._waiting = Ordered()
        self._running = Ordered()
        self._prefilling = Ordered()
        self._lanes = Lanes(settings.pipeline, settings.block_size)
        self._issued: deque[Issued] = deque()
        self._next_step = 0
        self._free_slots = deque((0, slot) for slot in range(settings.max_running))
        self._stops: Counter[int] = Counter()
        self._deadlines = Deadlines()
        self._starts: deque[float] = deque(maxlen=64)
        self._arrivals = 0
        self._last_committed = -1
        self.draining = False
        """Refuse new requests; those taken go on."""
        self._finished: list[Finish] = []
        self._refused: list[Refusal] = []
        self._cached: list[tuple[int, int]] = []
        self._stats = Stats(kv_blocks=settings.kv_blocks)

    # What comes in

    def submit(self, request: EngineRequest) -> Refusal | None:
        """Queue a request, or say why not. Everything that follows for it comes with `commit` and `take_events`."""
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        now = self._clock()
        limit = min(len(request.prompt) + request.sampling.max_tokens, self.settings.max_length)
        sequence = Sequence(request, self._arrivals, now, limit)
        self._arrivals += 1
        if request.output and request.output[-1] in sequence.stops:
            self._finished.append(Finish(request.id, "stop", request.output[-1]))
        elif len(sequence.tokens) >= limit:
            self._finished.append(Finish(request.id, "length"))
        else:
            self._living[request.id] = sequence
            self._waiting.add(sequence)
            self._stops.update(sequence.stops)
            for timeout in (request.queue_timeout, request.run_timeout):
                if timeout > 0:
                    self._deadlines.add(now + timeout, sequence)
        return None

    def abort(self, ids: Iterable[int]) -> None:
        """End these without further output; each that still lived is reported as finished with `abort`."""
        for id_ in ids:
            sequence = self._living.get(id_)
            if sequence is not None:
                self._end(sequence, "abort")

    def drain(self) -> None:
        """Refuse new requests from now on; those taken go on."""
        self.draining = True

    def reset(self) -> None:
        """The group lost a rank: the KV is gone and no step in flight comes back. Running sequences are recomputed.

        They return to the queue, where their order puts them before all that had not started. One that keeps ending its
        group's epochs is ended itself: else a request that fails its step would hold the group for ever.
        """
        self._issued.clear()
        self._lanes = Lanes(self.settings.pipeline, self.settings.block_size)
        self._prefilling = Ordered()
        self._blocks.reset()
        self._prefixes.reset()
        for sequence in self._running:
            sequence.vacate()
            sequence.needs = 0
            sequence.losses = sequence.losses + 1 if len(sequence.tokens) == sequence.lost_at else 1
            sequence.lost_at = len(sequence.tokens)
            self._waiting.add(sequence)
        hopeless = [sequence for sequence in self._running if sequence.losses >= _LOSSES]
        self._running = Ordered()
        self._free_slots = deque((0, slot) for slot in range(self.settings.max_running))
        for sequence in hopeless:
            self._end(sequence, "error", message=f"the group failed {_LOSSES} times in a row while it ran this request")

    def resize(self, kv_blocks: int) -> None:
        """The ranks turned out to have so many blocks. Nothing runs, and nothing has since `reset` or the beginning.

        A waiting request that has become too long to ever fit ends where the blocks end, as one that was submitted now
        would.
        """
        assert not self._running, "blocks are given away"
        if kv_blocks == self.settings.kv_blocks:
            return
        self.settings = replace(self.settings, kv_blocks=kv_blocks)
        self._blocks.size = kv_blocks
        self._blocks.reset()
        self._prefixes.reset()
        self._stats.kv_blocks = kv_blocks
        for sequence in list(self._waiting):
            sequence.limit = min(sequence.limit, self.settings.max_length)
            if len(sequence.tokens) >= sequence.limit:
                self._end(sequence, "length")

    # The loop

    def schedule(self) -> StepPlan | None:
        """The next step, or None where nothing can be run now (nothing to do, or first a result must come back)."""
        self.expire()
        pipeline = self.settings.pipeline
        for step in range(self._next_step, self._next_step + pipeline):
            if self._issued and self._issued[0].step < step - pipeline:
                break
            plan = self._plan(step)
            if plan is not None:
                self._next_step = step + 1
                self._stats.steps += 1
                return plan
        return None

    def _plan(self, step: int) -> StepPlan | None:
        """Decodes first, then chunks with what is left of the budget. None: there is neither at this step."""
        plan = StepPlan(step)
        lane = self._lanes.at(step)
        growing, last = lane.due()
        if growing:
            self._grow(growing)
        chunked: list[Sequence] = []
        if self._prefilling or self._waiting:
            chunked = self._prefill(plan, self.settings.max_batch_tokens - len(lane))
        if not lane.sequences and not plan.chunks:
            return None
        plan.decodes = lane.slots.tobytes()
        sampled = [sequence for sequence in chunked if sequence.planned == sequence.target]
        issued = Issued(step, sampled, lane)
        for sequence in growing:
            if sequence.lane is lane:  # else it was preempted for a sequence that goes before it
                plan.grows.append(Grow(sequence.slot, sequence.blocks[-1:]))
                issued.growing.append((sequence, sequence.run))
        for sequence in last:
            if sequence.lane is lane:
                issued.last.append((sequence, sequence.run))
                lane.remove(sequence)
        for sequence in sampled:
            sequence.origin = sequence.target
            if sequence.target + 1 < sequence.limit:
                self._lanes.join(sequence, step + self.settings.pipeline)
            else:
                issued.last.append((sequence, sequence.run))
        for chunk, sequence in zip(plan.chunks, chunked, strict=True):
            self._prefixes.publish(sequence)
            if chunk.prompt_logprobs:
                issued.reporting[chunk.slot] = (sequence, sequence.run, chunk.start)
        lane.tick += 1
        self._issued.append(issued)
        return plan

    def commit(self, result: StepResult) -> Outputs:
        """Take in what the oldest step in flight sampled; its tokens, and all events since the last call."""
        issued = self._take(result)
        outputs = Outputs(result.step, issued.ids, result.tokens)
        if result.logprobs or result.prompt_logprobs:
            issued.deliver_logprobs(result, outputs)
        if issued.dead:
            outputs.tokens = issued.drop_dead(result.tokens)
        deque(map(_append, issued.tokens, outputs.tokens), maxlen=0)
        self._stats.generated_tokens += len(outputs.tokens)
        self._prefixes.publish_grown(issued.growing)
        if not self._stops.keys().isdisjoint(outputs.tokens):
            for row, token in enumerate(outputs.tokens):
                if token in self._stops and token in issued.sequences[row].stops:
                    self._end(issued.sequences[row], "stop", token)
        for sequence, run in issued.last:
            if sequence.run == run:
                self._end(sequence, "length")
        self._hand_over(outputs)
        return outputs

    def take_events(self) -> Outputs | None:
        """What happened outside of steps (time-outs, aborts), for when none runs; None where nothing did."""
        self.expire()
        if not (self._finished or self._refused or self._cached):
            return None
        outputs = Outputs(self._last_committed, [], [])
        self._hand_over(outputs)
        return outputs

    def take_mark_news(self) -> MarkNews | None:
        """Which marks of requests came into the prefix cache and left it since the last call; None: none did."""
        return self._blocks.marks.take()

    @property
    def marks(self) -> Collection[int]:
        """All marks of requests whose blocks are in the prefix cache."""
        return self._blocks.marks.held

    def expire(self) -> None:
        """End what has waited or run past its time-out."""
        deadline = self._deadlines.next
        if deadline is None or deadline > (now := self._clock()):
            return
        for sequence in self._deadlines.pop_due(now, self._living):
            request = sequence.request
            if request.run_timeout > 0 and sequence.submitted + request.run_timeout <= now:
                self._end(
                    sequence, "timeout", message=f"not finished within its run_timeout of {request.run_timeout:g} s"
                )
            elif not sequence.started:
                self._end(
                    sequence, "timeout", message=f"not started within its queue_timeout of {request.queue_timeout:g} s"
                )

    @property
    def next_deadline(self) -> float | None:
        """When `expire` may have something to do, on the injected clock."""
        return self._deadlines.next

    @property
    def has_work(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self._living)

    @property
    def idle(self) -> bool:
        """Nothing waits, runs, is in flight, or is to be told."""
        return not (self._living or self._issued or self._finished or self._refused or self._cached)

    @property
    def stats(self) -> Stats:
        return replace(
            self._stats, running=len(self._running), waiting=len(self._waiting), kv_blocks_used=self._blocks.used
        )

    # Decodes

    def _grow(self, growing: list[Sequence]) -> None:
        """One more block for each, preempting from the end of the order where blocks are missing."""
        lacking = len(growing)
        while self._blocks.available < lacking:
            victim = self._running.last
            assert victim is not None
            assert len(self._running) > 1, "a sequence alone always fits"
            lacking -= victim in growing
            self._preempt(victim)
        survivors = [sequence for sequence in growing if sequence.lane is not None]
        for sequence, block in zip(survivors, self._blocks.allocate(len(survivors)), strict=True):
            sequence.blocks.append(block)

    def _preempt(self, victim: Sequence) -> None:
        self._vacate(victim)
        self._waiting.add(victim)
        self._stats.preemptions += 1

    # Prefill

    def _prefill(self, plan: StepPlan, budget: int) -> list[Sequence]:
        """Fill the plan with chunks, in order over the started and the waiting. Returns the chunks' sequences."""
        chunked: list[Sequence] = []
        started = deque(self._prefilling)
        blocked = False
        while budget > 0:
            head = None if blocked else self._waiting.first
            if head is not None and (not started or head.order < started[0].order):
                if not self._admit(head, plan):
                    blocked = True
                    continue
                sequence = head
            elif started:
                sequence = started.popleft()
                if sequence.slot < 0:
                    continue  # just preempted for one that goes before it
            else:
                break
            start = sequence.planned
            length = min(sequence.target - start, budget, self.settings.max_chunk_tokens or budget)
            sequence.planned = end = start + length
            budget -= length
            wants_logprobs = sequence.wants_prompt_logprobs and sequence.prompt_reported < min(
                end, sequence.prompt_length - 1
            )
            plan.chunks.append(Chunk(sequence.slot, start, length, end == sequence.target, wants_logprobs))
            if end == sequence.target:
                self._prefilling.remove(sequence)
            chunked.append(sequence)
        return chunked

    def _admit(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Give the queue's head a slot and the blocks of all its tokens, if it can have them now."""
        if not self._outranked(sequence) and (not self._free_slots or sequence.needs > self._spare_blocks):
            return False  # a slot, or what it lacked last time, is still missing: spare the look-up
        if self._free_slots and self._free_slots[0][0] > plan.step:
            return False  # one is resting (see `_vacate`), soon to be had
        cached = self._prefixes.match(sequence)
        if cached is None or not self._find_blocks(sequence, cached) or not self._find_slot(plan.step):
            return False
        self._waiting.remove(sequence)
        _usable, sequence.slot = self._free_slots.popleft()
        self._blocks.hold(cached)
        sequence.blocks = cached + self._blocks.allocate(self._block_count(sequence) - len(cached))
        sequence.published = len(cached)
        sequence.planned = len(cached) * self.settings.block_size
        sequence.target = len(sequence.tokens)
        self._prefixes.promise(sequence)
        self._running.add(sequence)
        self._prefilling.add(sequence)
        if not sequence.started:
            self._note_start(sequence)
        tokens = sequence.tokens.tolist()
        plan.admits.append(Admit(sequence.slot, tokens, sequence.prompt_length, sequence.request.sampling))
        plan.grows.append(Grow(sequence.slot, sequence.blocks[:]))
        return True

    @property
    def _spare_blocks(self) -> int:
        """Blocks a new sequence may take: each running one is left its next, lest the new one is preempted at once."""
        return self._blocks.available - len(self._running)

    def _block_count(self, sequence: Sequence) -> int:
        return -(-len(sequence.tokens) // self.settings.block_size)

    def _outranked(self, sequence: Sequence) -> bool:
        """Whether a running sequence may be preempted for this one: arrival alone is no reason."""
        last = self._running.last
        return last is not None and last.order[0] > sequence.order[0]

    def _find_slot(self, step: int) -> bool:
        """Whether a slot can be used at `step`, after preempting the last of the running for it if all are taken."""
        if not self._free_slots:
            assert self._running.last is not None
            self._preempt(self._running.last)
        return self._free_slots[0][0] <= step

    def _find_blocks(self, sequence: Sequence, cached: list[int]) -> bool:
        """Whether its blocks are there, after preempting those of lower priority if that can be enough."""
        fresh = self._block_count(sequence) - len(cached)
        sequence.needs = fresh + self._blocks.idle(cached)
        if sequence.needs <= self._spare_blocks:
            return True
        victims = [other for other in self._running if other.order[0] > sequence.order[0]]
        if sequence.needs > self._spare_blocks + sum(len(victim.blocks) + 1 for victim in victims):
            return False
        while victims and sequence.needs > self._spare_blocks:
            self._preempt(victims.pop())
            sequence.needs = fresh + self._blocks.idle(cached)
        return sequence.needs <= self._spare_blocks

    def _note_start(self, sequence: Sequence) -> None:
        cached = min(sequence.planned, sequence.prompt_length)
        sequence.started = True
        self._cached.append((sequence.id, cached))
        self._starts.append(self._clock())
        self._stats.prompt_tokens += sequence.prompt_length
        self._stats.cached_tokens += cached

    def _vacate(self, sequence: Sequence) -> None:
        """Take slot and blocks from a running sequence; its results still in flight will be dropped.

        The slot rests until the ranks have the results of all issued steps, so that none reaches its next holder.
        """
        self._prefixes.publish(sequence)
        self._prefixes.abandon(sequence)
        for issued in self._issued:
            issued.dead.append(sequence.slot)
        self._free_slots.append((self._next_step - 1 + self.settings.pipeline, sequence.slot))
        self._running.remove(sequence)
        self._prefilling.discard(sequence)
        self._lanes.leave(sequence)
        self._blocks.release(sequence.blocks)
        sequence.vacate()

    def _end(self, sequence: Sequence, reason: FinishReason, stop_token: int = -1, message: str = "") -> None:
        if sequence.slot >= 0:
            self._vacate(sequence)
        else:
            self._waiting.remove(sequence)
        del self._living[sequence.id]
        self._deadlines.compact(self._living)
        for token in sequence.stops:
            self._stops[token] -= 1
            if not self._stops[token]:
                del self._stops[token]
        if reason == "timeout" and not sequence.started:
            self._refused.append(Refusal(sequence.id, "timeout", message))
        else:
            self._finished.append(Finish(sequence.id, reason, stop_token, message))

    def _hand_over(self, outputs: Outputs) -> None:
        """Move the pending events into `outputs`."""
        if self._finished:
            outputs.finished, self._finished = self._finished, []
        if self._refused:
            outputs.refused, self._refused = self._refused, []
        if self._cached:
            outputs.cached, self._cached = self._cached, []

    def _take(self, result: StepResult) -> Issued:
        """The oldest step in flight, which must be this result's."""
        if not self._issued or self._issued[0].step != result.step:
            expected = f"step {self._issued[0].step} is next" if self._issued else "none is in flight"
            raise ValueError(f"the result of step {result.step} was committed, but {expected}")
        issued = self._issued[0]
        if len(result.tokens) != len(issued.ids):
            raise ValueError(
                f"step {result.step} sampled {len(issued.ids)} sequences, its result has {len(result.tokens)} tokens"
            )
        self._last_committed = result.step
        return self._issued.popleft()

    def _refusal(self, request: EngineRequest) -> Refusal | None:
        if self.draining:
            return Refusal(request.id, "draining", "this replica is draining and takes no new request")
        if request.id in self._living:
            return Refusal(request.id, "invalid", f"request id {request.id} is in use")
        if wrong := invalid(request, self.settings):
            return Refusal(request.id, "invalid", wrong)
        if wrong := too_long(request, self.settings):
            return Refusal(request.id, "too_long", wrong)
        if len(self._waiting) >= self.settings.max_waiting:
            message = f"{len(self._waiting)} requests are waiting already"
            return Refusal(request.id, "queue_full", message, self._retry_after())
        return None

    def _retry_after(self) -> float:
        """Seconds in which a quarter of the queue should have started, as fast as the last starts went; 1 to 60."""
        if len(self._starts) < 2:
            return 1.0
        per_start = (self._clock() - self._starts[0]) / (len(self._starts) - 1)
        return min(max(per_start * len(self._waiting) / 4, 1.0), 60.0)
