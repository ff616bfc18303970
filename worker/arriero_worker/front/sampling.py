"""How a client asked to sample, checked field by field and completed with the model's defaults."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field

from arriero_faces.http.errors import HttpError
from arriero_worker.engine.messages import SamplingParams
from arriero_worker.front.text.generation_config import GenerationDefaults

MAX_LOGPROBS = 20
MAX_ANSWERS = 128
MAX_STOPS = 32
MAX_STOP_LENGTH = 256
MAX_STOP_TOKENS = 1024
MAX_BIASES = 1024
GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing logits by less overflows."""
_SEED_BITS = 2**64


@dataclass(slots=True, kw_only=True)
class SamplingFields:
    """As the client wrote it; None where it was silent. Names are the public ones and appear in messages."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    n: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None


def refuse(param: str, message: str, code: str | None = None) -> HttpError:
    """A 400 that names the field."""
    return HttpError(400, f"{param}: {message}", param=param, code=code)


def bounded(param: str, value: float | None, low: float, high: float, *, above: bool = False) -> None:
    """Raises HttpError unless `value` is None or in [low, high] (with `above`: in (low, high])."""
    if value is None:
        return
    if not math.isfinite(value) or not low <= value <= high or (above and value == low):
        raise refuse(
            param, f"must be {'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}"
        )


def check_sampling(fields: SamplingFields, vocab_size: int) -> None:
    """Every bound that does not depend on the prompt. Raises HttpError naming the field."""
    bounded("max_tokens", fields.max_tokens, 1, 2**31 - 1)
    bounded("min_tokens", fields.min_tokens, 0, 2**31 - 1)
    bounded("temperature", fields.temperature, 0, 100)
    bounded("top_p", fields.top_p, 0, 1, above=True)
    bounded("top_k", fields.top_k, -1, 2**31 - 1)
    bounded("min_p", fields.min_p, 0, 1)
    bounded("repetition_penalty", fields.repetition_penalty, 0, 100, above=True)
    bounded("presence_penalty", fields.presence_penalty, -2, 2)
    bounded("frequency_penalty", fields.frequency_penalty, -2, 2)
    bounded("seed", fields.seed, -(2**63), 2**64 - 1)
    bounded("n", fields.n, 1, MAX_ANSWERS)
    bounded("logprobs", fields.logprobs, 0, MAX_LOGPROBS)
    bounded("prompt_logprobs", fields.prompt_logprobs, 0, MAX_LOGPROBS)
    if len(fields.stop) > MAX_STOPS:
        raise refuse("stop", f"at most {MAX_STOPS} strings")
    if any(not 0 < len(stop) <= MAX_STOP_LENGTH for stop in fields.stop):
        raise refuse("stop", f"a stop string has 1 to {MAX_STOP_LENGTH} characters")
    if len(fields.stop_token_ids) > MAX_STOP_TOKENS:
        raise refuse("stop_token_ids", f"at most {MAX_STOP_TOKENS} tokens")
    if any(not 0 <= token < vocab_size for token in fields.stop_token_ids):
        raise refuse("stop_token_ids", f"token ids are from 0 to {vocab_size - 1}")
    if len(fields.logit_bias) > MAX_BIASES:
        raise refuse("logit_bias", f"at most {MAX_BIASES} tokens")
    for token, bias in fields.logit_bias.items():
        if not 0 <= token < vocab_size:
            raise refuse("logit_bias", f"token ids are from 0 to {vocab_size - 1}")
        bounded("logit_bias", bias, -100, 100)


def build_sampling(
    fields: SamplingFields, defaults: GenerationDefaults, *, room: int, default_max_tokens: int | None
) -> SamplingParams:
    """The engine's parameters. `room` is what the context leaves behind the prompt, at least 1.

    Raises HttpError where `max_tokens` does not fit, or `min_tokens` is above it. `check_sampling` comes first.
    """
    max_tokens = fields.max_tokens
    if max_tokens is None:
        max_tokens = room if default_max_tokens is None else min(default_max_tokens, room)
    elif max_tokens > room:
        raise refuse(
            "max_tokens",
            f"{max_tokens} tokens do not fit: the context leaves {room} behind the prompt",
            "context_length_exceeded",
        )
    min_tokens = fields.min_tokens or 0
    if min_tokens > max_tokens:
        raise refuse("min_tokens", f"cannot be above max_tokens, which is {max_tokens}")
    temperature = _or(fields.temperature, defaults.temperature)
    top_k = _or(fields.top_k, defaults.top_k)
    stop_ids = fields.stop_token_ids if fields.ignore_eos else [*defaults.eos, *fields.stop_token_ids]
    seed = secrets.randbits(63) if fields.seed is None else fields.seed % _SEED_BITS
    return SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_k=int(max(top_k, 0)),
        top_p=_or(fields.top_p, defaults.top_p),
        min_p=_or(fields.min_p, defaults.min_p),
        repetition_penalty=_or(fields.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=_or(fields.presence_penalty, 0.0),
        frequency_penalty=_or(fields.frequency_penalty, 0.0),
        logit_bias=fields.logit_bias,
        min_tokens=min_tokens,
        stop_token_ids=tuple(dict.fromkeys(stop_ids)),
        logprobs=-1 if fields.logprobs is None else fields.logprobs,
        prompt_logprobs=-1 if fields.prompt_logprobs is None else fields.prompt_logprobs,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)
