"""What one replica can hold, and which requests it turns away for it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from arriero_worker.engine.messages import EngineRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    block_size: int
    """Tokens per KV block."""
    kv_blocks: int
    max_context: int
    """Tokens of prompt and output together."""
    max_running: int
    """Slots."""
    max_waiting: int
    """Requests in the queue; preempted ones come on top."""
    max_batch_tokens: int
    """Tokens of one step, decodes and prefill chunks together."""
    max_chunk_tokens: int = 0
    """Prefill tokens of one sequence in one step; 0: only the budget limits them."""
    pipeline: int = 1
    """Stages, hence lanes."""
    prefix_cache: bool = True
    vocab_size: int

    def __post_init__(self) -> None:
        for name in ("block_size", "kv_blocks", "max_running", "max_waiting", "pipeline", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_context < 2:
            raise ValueError(f"max_context must be at least 2 (a prompt and an output token), not {self.max_context}")
        if self.max_chunk_tokens < 0:
            raise ValueError(f"max_chunk_tokens must be 0 (no limit) or more, not {self.max_chunk_tokens}")
        if self.max_batch_tokens < self.max_running:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_running ({self.max_running}): "
                "each running sequence may decode one token in a step"
            )

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV fits when one sequence has all blocks."""
        return self.kv_blocks * self.block_size

    @property
    def max_length(self) -> int:
        """The longest sequence that fits alone. Its last token is never fed, so that one's KV needs no room."""
        return min(self.max_context, self.kv_tokens + 1)


def invalid(request: EngineRequest, settings: SchedulerSettings) -> str:
    """What is wrong with the request's values, in one sentence; empty: nothing."""
    sampling = request.sampling
    depths = [depth for depth, _mark in request.marks]
    if depths and (depths[0] < 1 or depths[-1] > len(request.prompt) or any(a > b for a, b in pairwise(depths))):
        return "the depths of the marks must lie in the prompt and never fall"
    if not request.prompt and not request.output:
        return "the prompt is empty"
    if sampling.max_tokens < 1:
        return f"max_tokens must be at least 1, not {sampling.max_tokens}"
    for name, tokens in (
        ("prompt", request.prompt),
        ("output", request.output),
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", sampling.logit_bias),
    ):
        if tokens and (min(tokens) < 0 or max(tokens) >= settings.vocab_size):
            wrong = next(token for token in tokens if not 0 <= token < settings.vocab_size)
            return f"{name} has token {wrong}; this model's tokens are 0 to {settings.vocab_size - 1}"
    return ""


def too_long(request: EngineRequest, settings: SchedulerSettings) -> str:
    """Why the prompt leaves no room for an output token, with the arithmetic; empty: it does."""
    length = len(request.prompt)
    if length + 1 > settings.max_context:
        return (
            f"the prompt has {length} tokens; with one output token that is over the context of {settings.max_context}"
        )
    if length > settings.kv_tokens:
        needed = -(-length // settings.block_size)
        return (
            f"the prompt has {length} tokens and needs {needed} KV blocks of {settings.block_size}; "
            f"this replica has {settings.kv_blocks} ({settings.kv_tokens} tokens)"
        )
    return ""
