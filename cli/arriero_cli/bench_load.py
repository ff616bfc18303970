"""Load on a server of OpenAI's API, in a closed loop (so many requests at once) or an open one (so many per second)."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from arriero_cli.bench_http import Connection
from arriero_cli.endpoint import DONE

COMPLETIONS = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Work:
    """One request: a prompt (token ids, or text) and the tokens wanted."""

    prompt: str | Sequence[int]
    output_tokens: int


@dataclass(slots=True)
class Sample:
    """One request's fate. Times are seconds of time.perf_counter."""

    due: float
    """When it had to be sent: in an open loop the moment that the arrival process chose, however late the client was,
    so that a server that stalls is not measured by the requests it kept from being sent (coordinated omission)."""
    sent: float = 0.0
    first: float = 0.0
    end: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """Between one piece of the answer and the next."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    failure: str = ""
    """Why it brought no whole answer; empty: it did."""

    @property
    def ttft(self) -> float:
        return self.first - self.due

    @property
    def latency(self) -> float:
        return self.end - self.due


class Target:
    """Where requests go, and the fields that all of them have."""

    def __init__(self, url: str, request: dict[str, Any], timeout: float) -> None:
        self._url, self._timeout = url, timeout
        self._request = {**request, "stream": True, "stream_options": {"include_usage": True}}
        self._idle: list[Connection] = []

    async def send(self, work: Work, due: float) -> Sample:
        """Send one request and read its whole answer; what goes wrong stands in the sample."""
        body = json.dumps({**self._request, "prompt": work.prompt, "max_tokens": work.output_tokens}).encode()
        sample = Sample(due, sent=time.perf_counter())
        connection = self._idle.pop() if self._idle else Connection(self._url)
        try:
            async with asyncio.timeout(self._timeout):
                await _read_answer(connection, body, sample)
            self._idle.append(connection)
        except TimeoutError:
            sample.failure = "timeout"
        except OSError as error:
            sample.failure = f"connection: {error.strerror or error}"
        except BaseException:
            await connection.close()
            raise
        if sample.failure.startswith(("timeout", "connection")):
            await connection.close()
        sample.end = time.perf_counter()
        return sample

    async def close(self) -> None:
        for connection in self._idle:
            await connection.close()
        self._idle.clear()


async def _read_answer(connection: Connection, body: bytes, sample: Sample) -> None:
    rest, previous, ended = b"", 0.0, False
    async for chunk in connection.post(COMPLETIONS, body):
        now = time.perf_counter()
        if connection.status != 200:
            sample.failure = f"HTTP {connection.status}"
            continue
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            if line[5:].strip() == DONE.encode():
                ended = True
            elif _note_event(line[5:], sample):
                if previous:
                    sample.gaps.append(now - previous)
                else:
                    sample.first = now
                previous = now
    if connection.status != 200:
        sample.failure = f"HTTP {connection.status}"
    elif not sample.failure and not (ended and sample.first):
        sample.failure = "broken stream"


def _note_event(data: bytes, sample: Sample) -> bool:
    """Take over what an event tells. True where it carries a piece of the answer."""
    try:
        event = json.loads(data)
        if "error" in event:
            sample.failure = "error in the stream"
            return False
        if usage := event.get("usage"):
            sample.prompt_tokens, sample.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        choices = event.get("choices") or ()
        return bool(choices and (choices[0].get("text") or not sample.first))
    except (ValueError, TypeError, KeyError, AttributeError):
        sample.failure = "broken stream"
        return False


async def closed_loop(
    target: Target, works: Sequence[Work], concurrency: int, tell: Callable[[Sample], None]
) -> list[Sample]:
    """Keep so many requests going until all works are done; `tell` hears of each."""
    queue = iter(works)
    samples: list[Sample] = []

    async def lane() -> None:
        for work in queue:
            sample = await target.send(work, time.perf_counter())
            samples.append(sample)
            tell(sample)

    async with asyncio.TaskGroup() as lanes:
        for _ in range(min(concurrency, len(works))):
            lanes.create_task(lane())
    return samples


async def open_loop(
    target: Target, works: Sequence[Work], rate: float, rng: random.Random, tell: Callable[[Sample], None]
) -> list[Sample]:
    """Send the works as a Poisson process of `rate` per second, however many are still unanswered."""
    samples: list[Sample] = []

    async def one(work: Work, due: float) -> None:
        await asyncio.sleep(due - time.perf_counter())
        sample = await target.send(work, due)
        samples.append(sample)
        tell(sample)

    due = time.perf_counter()
    async with asyncio.TaskGroup() as sending:
        for work in works:
            due += rng.expovariate(rate)
            sending.create_task(one(work, due))
    return samples
