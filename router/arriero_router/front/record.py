"""What is known of one generating request while it is under way: for limits, log and spans."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from arriero_router.core.ask import Ask
from arriero_router.front.auth import Principal
from arriero_router.front.journey import Journey

if TYPE_CHECKING:
    from arriero_router.observe.tracing import RequestTrace
    from arriero_router.served import Served


@dataclass(slots=True, kw_only=True)
class Record:
    """`Router.open` makes it, `Router.close` ends it. Times in seconds by the loop's clock."""

    face: str
    path: str
    peer: str
    """The client's address."""
    principal: Principal
    served: Served
    ask: Ask
    began: float
    streamed: bool
    journey: Journey = field(init=False)
    trace: RequestTrace | None = None
    request_id: str
    """The client's, or one of the router's."""
    status: int | str = 499
    error: str = ""
    first: float = 0.0
    """From `began` to the first byte of the answer; 0: none came."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    used: int | None = None
    """Tokens that it has cost; None: not known, its estimate stands."""

    def __post_init__(self) -> None:
        self.journey = Journey(self.served, self.ask)

    def first_byte(self) -> None:
        """The answer has begun to come."""
        served, grant = self.served, self.journey.grant
        if grant is not None:
            served.dispatcher.first_token(grant)
        if not self.first:
            self.first = time.monotonic() - self.began
            served.metrics.first.observe(self.first)

    def sent(self) -> None:
        """It is on its way to a replica."""
        if self.journey.attempts.made == 1:
            added = time.monotonic() - self.began - self.journey.held_seconds
            self.served.metrics.added.observe(max(0.0, added))

    def tokens(self, prompt: int, completion: int, cached: int | None) -> None:
        """The usage that the replica told; some do not tell what they had cached."""
        self.prompt_tokens, self.completion_tokens = prompt, completion
        self.used = prompt + completion
        if cached is not None:
            self.found(cached, prompt)

    def found(self, cached: int, prompt: int) -> None:
        """The replica told that it had the first `cached` of `prompt` tokens in its cache."""
        self.cached_tokens = cached
        self.served.metrics.cached_tokens += cached
        journey = self.journey
        # What is told of a resumed answer is what its first replica had.
        if journey.grant is not None and prompt > 0 and journey.attempts.made == 1:
            self.served.dispatcher.found(journey.grant, self.ask.size * cached // prompt)

    def fields(self) -> dict[str, object]:
        """As the access log shows it."""
        journey, grant = self.journey, self.journey.grant
        return {
            "face": self.face,
            "path": self.path,
            "status": self.status,
            "client": self.peer,
            "key": self.principal.name or None,
            "model": self.served.name,
            "request_id": self.request_id,
            "stream": self.streamed,
            "replica": grant.replica.name if grant is not None else None,
            "pick": grant.reason if grant is not None else None,
            "attempts": journey.attempts.made,
            "held_seconds": round(journey.held_seconds, 6),
            "first_seconds": round(self.first, 6) or None,
            "seconds": round(time.monotonic() - self.began, 6),
            "prompt_bytes": self.ask.size,
            "chunks": len(self.ask.marks),
            "chunks_matched": grant.matched if grant is not None else 0,
            "prompt_tokens": self.prompt_tokens or None,
            "completion_tokens": self.completion_tokens or None,
            "cached_tokens": self.cached_tokens,
            "error": self.error or None,
        }
