"""Shapes that completions and chat completions have in common, and server-sent events."""

from __future__ import annotations

import secrets
import time
from typing import Any

import msgspec

from arriero_faces.http.errors import HttpError
from arriero_faces.http.exchange import Exchange
from arriero_faces.resume import HEADER, Resume, valid_id
from arriero_worker.engine.messages import TokenLogprobs
from arriero_worker.front.run import Run, Usage
from arriero_worker.front.text.vocabulary import Vocabulary

json_bytes = msgspec.json.encode
DONE = b"data: [DONE]\n\n"
EVENT_STREAM = "text/event-stream; charset=utf-8"
STREAM_HEADERS = (("cache-control", "no-cache"), ("x-accel-buffering", "no"))
_LOWEST = -9999.0
"""OpenAI's stand-in for minus infinity, which JSON does not have."""


class Identity:
    """What an answer is called: id, time, model; taken over from the broken stream where one is resumed."""

    def __init__(self, exchange: Exchange, prefix: str, model: str, resume: Resume) -> None:
        asked = exchange.header(b"x-request-id")
        if asked is not None and not valid_id(asked):
            raise HttpError(400, "x-request-id: must be 1 to 128 letters, digits, dots, dashes or underscores")
        self.id = resume.id or f"{prefix}-{asked or secrets.token_hex(12)}"
        self.created = resume.created if resume.created is not None else int(time.time())
        self.model = model
        self.headers: tuple[tuple[str, str], ...] = () if asked is None else (("x-request-id", asked),)
        if resume.wanted:
            self.headers += ((HEADER, "1"),)


def event(value: Any) -> bytes:
    return b"data: " + json_bytes(value) + b"\n\n"


class ResumeComments:
    """The comments behind pieces that let another replica go on: see docs/api.md."""

    def __init__(self, identity: Identity, run: Run, several: bool) -> None:
        self._identity = identity
        self._run = run
        self._several = several
        self._begun = False
        self._cached = 0

    def comment(self, index: int, tokens: list[int]) -> bytes:
        fields: dict[str, Any] = {"index": index} if self._several else {}
        fields["tokens"] = tokens
        if not self._begun:
            self._begun = True
            identity = self._identity
            fields |= {"seed": self._run.seed, "id": identity.id, "created": identity.created}
        cached = self._run.usage.cached_tokens
        if cached != self._cached:
            fields["cached"] = self._cached = cached
        return b": arriero " + json_bytes(fields) + b"\n\n"


def usage_fields(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST


def token_name(vocabulary: Vocabulary, id: int) -> str:
    """A token's text, or `bytes:\\xe2\\x82` for one that is not whole characters, as OpenAI writes it."""
    data = vocabulary.token_bytes(id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def alternatives(position: TokenLogprobs) -> list[tuple[int, float]]:
    """The highest alternatives, and the chosen token behind them where it is not among them."""
    top = position.top
    if top and all(id != position.token for id, _ in top):
        return [*top, (position.token, position.logprob)]
    return top


def prompt_logprobs(vocabulary: Vocabulary, positions: list[TokenLogprobs]) -> list[dict[str, Any] | None]:
    """vLLM's shape: null for the first token, then a map of token id to its logprob, rank and text."""
    result: list[dict[str, Any] | None] = [None]
    for position in positions:
        entry = {
            str(id): {"logprob": finite(value), "rank": rank, "decoded_token": vocabulary.text_of(id)}
            for rank, (id, value) in enumerate(position.top, 1)
        }
        entry[str(position.token)] = {
            "logprob": finite(position.logprob),
            "rank": position.rank,
            "decoded_token": vocabulary.text_of(position.token),
        }
        result.append(entry)
    return result
