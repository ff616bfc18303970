"""What crosses the Unix socket between the public faces and the engine of one replica.

Frames are a 4-byte little-endian length and one msgpack-encoded message of the unions `ToEngine` and `FromEngine`
(tagged by type). Both ends are always the same revision of this package, so the messages carry no version.
Output travels in columns, one frame per step, because a thousand small objects per step would cost more than the step's
scheduling.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]
RefusalCode = Literal["invalid", "too_long", "queue_full", "draining", "not_ready", "timeout", "internal"]
Phase = Literal["Starting", "Loading", "Warming", "Joining", "Serving", "Draining", "Failed"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the next token of one sequence is chosen: a pure function of (logits, these, seed, position).

    Filters apply in this order: repetition, presence and frequency penalties, `logit_bias`, the ban on stop tokens
    before `min_tokens`, temperature, `top_k`, `top_p`, `min_p`.
    """

    max_tokens: int
    """Output tokens at most, counted with those of `EngineRequest.output`."""
    seed: int = 0
    """64-bit key of the counter-based random numbers; the face draws one where the client gave none."""
    temperature: float = 1.0
    """0 means greedy: the highest logit, ties to the lowest token id."""
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output."""
    presence_penalty: float = 0.0
    """Subtracted once from each token in the output."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the output."""
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    """No stop token is sampled before so many output tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the sequence; the face adds the model's own unless `ignore_eos` was asked for."""
    logprobs: int = -1
    """-1: none; k >= 0: the chosen token's log-probability and the k highest."""
    prompt_logprobs: int = -1
    """The same for the prompt's tokens from the second on; such a request takes no prefix-cache hit."""


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One sequence to continue. `id` is unique on its connection."""

    id: int
    prompt: list[int]
    sampling: SamplingParams
    output: list[int] = []
    """Tokens already produced elsewhere: the sequence continues behind them as if it had never stopped."""
    priority: int = 0
    """Lower runs earlier; equal priorities run first come, first served."""
    queue_timeout: float = 0.0
    """Seconds it may wait before its first chunk is scheduled; 0: no limit. Ends with a `timeout` refusal."""
    run_timeout: float = 0.0
    """Seconds from submission to its last token; 0: no limit. Ends with finish reason `timeout`."""
    cache_salt: str = ""
    """Prefix blocks are shared only between requests of the same salt."""
    marks: list[tuple[int, int]] = []
    """(depth, mark), depths from 1 to the prompt's length and never falling: the mark names a prefix of the prompt's
    text, which is in its first `depth` tokens.
    """


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position: the chosen token's, its rank (1 = most likely), and the highest `k`."""

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]] = []


class Submit(msgspec.Struct, frozen=True, tag=True, array_like=True):
    requests: list[EngineRequest]


class Abort(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The client went away, or the face found a stop string: end these without further output."""

    ids: list[int]


class Finish(msgspec.Struct, frozen=True, array_like=True):
    id: int
    reason: FinishReason
    stop_token: int = -1
    """The stop token that ended it (it is the last of its output tokens), or -1."""
    message: str = ""


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """A request that was not run. Nothing of it will follow."""

    id: int
    code: RefusalCode
    message: str
    retry_after: float = 0.0
    """Seconds after which trying again makes sense; 0: unknown."""


class Outputs(msgspec.Struct, tag=True, array_like=True):
    """What one step brought. Request `ids[i]` gained token `tokens[i]`; a request appears at most once in `ids`."""

    step: int
    ids: list[int]
    tokens: list[int]
    finished: list[Finish] = []
    refused: list[Refusal] = []
    logprobs: list[tuple[int, TokenLogprobs]] = []
    """(request id, log-probabilities of its token of this step)."""
    prompt_logprobs: list[tuple[int, list[TokenLogprobs]]] = []
    """(request id, the next prompt positions' log-probabilities, in order, beginning with the second prompt token)."""
    cached: list[tuple[int, int]] = []
    """(request id, prompt tokens found in the prefix cache), once, when its first chunk was scheduled."""


class PrefixNews(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Marks that came into the prefix cache and left it: on connection the whole set, then what each step changed."""

    reset: bool
    """Forget all that was told before: `added` is all there is."""
    added: list[int]
    removed: list[int]
    run: int
    """As in EngineStatus."""


class Model(msgspec.Struct, frozen=True, array_like=True):
    """What the faces must know of the model behind the engine."""

    max_context: int
    vocab_size: int


class RankStatus(msgspec.Struct, frozen=True, array_like=True):
    rank: int
    pod: int
    phase: Phase
    epoch: int
    step: int
    bytes_loaded: int = 0
    bytes_total: int = 0
    memory_bytes: int = 0
    reason: str = ""


class EngineStatus(msgspec.Struct, tag=True, array_like=True):
    """Sent on connection, at each change of phase, and about four times a second while there is work."""

    phase: Phase
    epoch: int
    model: Model
    running: int = 0
    waiting: int = 0
    kv_blocks: int = 0
    kv_blocks_used: int = 0
    """Blocks that running sequences hold (cached blocks that nobody holds are free)."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    recoveries: int = 0
    """How often the group re-formed after a lost rank."""
    ranks: list[RankStatus] = []
    reason: str = ""
    run: int = 0
    """When the engine was started, in nanoseconds since 1970: it names this life of it."""
    tokens_per_second: float = 0.0
    """Tokens sampled, over the last ten seconds."""


class Drain(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Take no new request; running and waiting ones go on."""


ToEngine = Submit | Abort | Drain
FromEngine = Outputs | EngineStatus | PrefixNews
