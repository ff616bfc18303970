"""What one API key may use: tokens per minute, requests per minute, requests at once.

With N processes each keeps a `KeyLimit` of its own with an N-th of the key's rates and bursts: in the long run they let
no more pass together than the key may have, and less when its connections are spread unevenly over them. Requests at
once are shared alike, rounded up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

_MINUTE = 60.0
_MARGIN = 1e-9
"""Of a bucket's size: what rounding may take from it, so that who waits as long as told is let in."""


class RateLimit:
    """A token bucket: fills at `rate` units a second up to `burst`; full at the beginning. Times are by the caller's
    clock, in seconds, and may stand still, but what lies behind the latest one seen counts as that.
    """

    __slots__ = ("_at", "_level", "burst", "rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        """Raises ValueError unless rate and burst are above 0 and finite."""
        self._set(rate, burst)
        self._level = burst
        self._at = now

    def level(self, now: float) -> float:
        """What is in the bucket: below 0 if more was used than had been taken."""
        if now > self._at:
            self._level = min(self.burst, self._level + (now - self._at) * self.rate)
            self._at = now
        return self._level

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` can be taken, if nobody takes any before; 0.0: at once. A larger amount than a full
        bucket has can be taken from a full one, which is then in debt.
        """
        lacking = min(amount, self.burst) - self.level(now)
        return 0.0 if lacking <= _MARGIN * self.burst else lacking / self.rate

    def take(self, amount: float, now: float) -> float:
        """Take `amount` and return 0.0, or take nothing and return the seconds to wait."""
        seconds = self.wait(amount, now)
        if seconds == 0.0:
            self._level -= amount
        return seconds

    def settle(self, estimated: float, used: float, now: float) -> None:
        """Correct an amount taken before: it was `used` in the end. The bucket may go below 0."""
        self._level = min(self.burst, self.level(now) + estimated - used)

    def resize(self, rate: float, burst: float, now: float) -> None:
        """Go on with other numbers. What is used stays used: the bucket is as far from full as before."""
        used = self.burst - self.level(now)
        self._set(rate, burst)
        self._level = burst - used

    def _set(self, rate: float, burst: float) -> None:
        if not (0 < rate < math.inf and 0 < burst < math.inf):
            raise ValueError(f"a rate of {rate:g} with bursts of {burst:g}: both must be above 0 and finite")
        self.rate = rate
        self.burst = burst


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a key may use; 0: no limit."""

    tokens_per_minute: int = 0
    requests_per_minute: int = 0
    max_concurrent: int = 0
    burst_seconds: float = _MINUTE
    """So many seconds' worth of its rates a key may use at once after a pause."""


class Denied(NamedTuple):
    """Why a request of a key may not go on."""

    limit: Literal["requests", "tokens", "concurrent"]
    wait: float
    """Seconds until it may, as far as can be known."""


class KeyLimit:
    """One key's use, in one of `processes`. What is admitted is released once, and settled before that."""

    def __init__(self, allowance: Allowance, processes: int, now: float) -> None:
        self.running = 0
        """Requests admitted and not released."""
        self._processes = processes
        self._tokens: RateLimit | None = None
        self._requests: RateLimit | None = None
        self._most = 0
        self.resize(allowance, now)

    def admit(self, tokens: int, now: float) -> Denied | None:
        """Let a request go on that may cost so many tokens, or say why not, counting nothing."""
        if self._most and self.running >= self._most:
            # Nobody knows when one of its own ends; often soon.
            return Denied("concurrent", 1.0)
        waits = [
            Denied("requests", 0.0 if self._requests is None else self._requests.wait(1, now)),
            Denied("tokens", 0.0 if self._tokens is None else self._tokens.wait(tokens, now)),
        ]
        longest = max(waits, key=lambda denied: denied.wait)
        if longest.wait:
            return longest
        if self._requests is not None:
            self._requests.take(1, now)
        if self._tokens is not None:
            self._tokens.take(tokens, now)
        self.running += 1
        return None

    def settle(self, estimated: int, used: int, now: float) -> None:
        """A request that was admitted for `estimated` tokens has used so many."""
        if self._tokens is not None:
            self._tokens.settle(estimated, used, now)

    def release(self) -> None:
        """A request that was admitted is over."""
        assert self.running > 0, "what is released was admitted"
        self.running -= 1

    def resize(self, allowance: Allowance, now: float) -> None:
        """Go on with another allowance; what is used stays used."""
        self._most = -(-allowance.max_concurrent // self._processes)
        self._tokens = self._resized(self._tokens, allowance.tokens_per_minute, allowance, now)
        self._requests = self._resized(self._requests, allowance.requests_per_minute, allowance, now)

    def _resized(self, limit: RateLimit | None, per_minute: int, allowance: Allowance, now: float) -> RateLimit | None:
        if not per_minute:
            return None
        rate = per_minute / _MINUTE / self._processes
        burst = rate * allowance.burst_seconds
        if limit is None:
            return RateLimit(rate, burst, now)
        limit.resize(rate, burst, now)
        return limit
