"""The step plan: what the scheduler on the leader asks of every rank, and what it gets back.

A running sequence has a *slot* on every rank: a row of the batch state (tokens, block table, sampling parameters)
that is sent once, when the sequence is admitted, and only extended afterwards. A decode needs nothing per sequence
but its slot: the token it feeds is the one its rank sampled last for that slot, which the scheduler need not know
yet. So step n+1 is planned while step n runs.

A plan is encoded once (msgpack) and the same bytes go to the ranks of the leader's pod through shared memory and to
every other pod over gRPC; all ranks of a group run the same revision of this package (checked when they join).
"""

from __future__ import annotations

import msgspec

from arriero_worker.engine.messages import SamplingParams


class Admit(msgspec.Struct, frozen=True, array_like=True):
    """A sequence takes a slot. Whatever the slot held before is forgotten."""

    slot: int
    tokens: list[int]
    """Prompt and the output known so far."""
    prompt_length: int
    sampling: SamplingParams


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Compute the KV of tokens [start, start + length) of a slot; `sample` where the last of them is the last known
    token.
    """

    slot: int
    start: int
    length: int
    sample: bool
    prompt_logprobs: bool = False


class Grow(msgspec.Struct, frozen=True, array_like=True):
    """Append blocks to a slot's block table (for an admitted slot: its first ones)."""

    slot: int
    blocks: list[int]


class StepPlan(msgspec.Struct, array_like=True):
    """One micro-batch through all stages. Ranks apply `admits`, then `grows`, then run `chunks` and `decodes` as one
    batch.

    `decodes` holds little-endian int32 slots. Each decodes one token: position p = tokens of the slot so far - 1;
    its KV goes to block p // block_size; then a token is sampled at position p + 1 and appended to the slot. Slots
    of `chunks` with `sample` are sampled likewise. The batch order, and the order of sampled tokens in `StepResult`,
    is: `chunks` with `sample`, in order, then `decodes`.

    Step numbers rise; some are left out. Before a rank of the first stage runs step n it must have the results of all
    plans issued with a step <= n - `pipeline`, and it needs no later one: decodes feed only tokens sampled by those.
    (The chunks of one sequence need no results and may be in consecutive steps.) At most `pipeline` + 1 plans are in
    flight.

    Every rank runs the steps in order. So a block may be given to another sequence while a step that writes it for the
    old one is in flight. A slot is more careful: where step m admits it, no step after m - `pipeline` ran its old
    sequence, so all results of the old one are in before the new one comes.
    """

    step: int
    decodes: bytes = b""
    chunks: list[Chunk] = []
    grows: list[Grow] = []
    admits: list[Admit] = []


class SampledLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities of one sampled token or prompt position; `index` counts the step's sampled tokens (or prompt
    positions).
    """

    index: int
    token: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class StepResult(msgspec.Struct, array_like=True):
    """What the last stage sampled in one step, in the plan's order."""

    step: int
    tokens: list[int]
    logprobs: list[SampledLogprobs] = []
    prompt_logprobs: list[tuple[int, list[SampledLogprobs]]] = []
    """(slot, positions start + 1 to min(start + length, prompt length - 1) of its chunk, in order): log-probabilities
    of prompt tokens."""
