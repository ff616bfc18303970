"""A step in flight: what its commit has to know of the moment it was planned."""

from __future__ import annotations

from array import array

from arriero_worker.engine.lanes import Lane
from arriero_worker.engine.messages import Outputs, TokenLogprobs
from arriero_worker.engine.sequence import Sequence
from arriero_worker.engine.step import SampledLogprobs, StepResult


class Issued:
    """Its sampled rows in columns, in the order of `StepResult.tokens`, and the few sequences that need a look."""

    __slots__ = ("dead", "growing", "ids", "last", "reporting", "sequences", "slots", "step", "tokens")

    def __init__(self, step: int, sampled: list[Sequence], lane: Lane) -> None:
        self.step = step
        self.slots = lane.slots[:]
        self.ids = lane.ids[:]
        self.tokens = lane.tokens[:]
        self.sequences = lane.sequences[:]
        if sampled:
            self.slots = array("i", [sequence.slot for sequence in sampled]) + self.slots
            self.ids[:0] = [sequence.id for sequence in sampled]
            self.tokens[:0] = [sequence.tokens for sequence in sampled]
            self.sequences[:0] = sampled
        self.dead: list[int] = []
        """Slots whose sequence left since: their results are dropped."""
        self.growing: list[tuple[Sequence, int]] = []
        """(sequence, run) of those that began a new block: the one before is full and known at commit."""
        self.last: list[tuple[Sequence, int]] = []
        """(sequence, run) of those that reach their limit."""
        self.reporting: dict[int, tuple[Sequence, int, int]] = {}
        """slot -> (sequence, run, start) of the chunks whose log-probabilities were asked for."""

    def drop_dead(self, tokens: list[int]) -> list[int]:
        """Remove the rows of those who left from all columns; returns `tokens` without them."""
        rows = set()
        for slot in self.dead:
            try:
                rows.add(self.slots.index(slot))
            except ValueError:  # it was prefilling, or joined later
                pass
        tokens = tokens[:]
        for row in sorted(rows, reverse=True):
            del self.slots[row], self.ids[row], self.tokens[row], self.sequences[row], tokens[row]
        return tokens

    def deliver_logprobs(self, result: StepResult, outputs: Outputs) -> None:
        """Put the log-probabilities of those who are still there into `outputs`; call it before `drop_dead`."""
        for sampled in result.logprobs:
            sequence = self.sequences[sampled.index]
            most = sequence.request.sampling.logprobs
            if most >= 0 and self.slots[sampled.index] not in self.dead:
                outputs.logprobs.append((sequence.id, _token_logprobs(sampled, most)))
        for slot, positions in result.prompt_logprobs:
            sequence, run, start = self.reporting[slot]
            if sequence.run != run:
                continue
            fresh = positions[max(sequence.prompt_reported - start, 0) :]  # preempted, it told the first of them before
            most = sequence.request.sampling.prompt_logprobs
            outputs.prompt_logprobs.append((sequence.id, [_token_logprobs(position, most) for position in fresh]))
            sequence.prompt_reported = start + len(positions)


def _token_logprobs(sampled: SampledLogprobs, most: int) -> TokenLogprobs:
    top = list(zip(sampled.top_ids[:most], sampled.top_logprobs[:most], strict=True))
    return TokenLogprobs(sampled.token, sampled.logprob, sampled.rank, top)
