"""One request under way: engine requests out, pieces of answers back."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from arriero_faces.http.errors import HttpError
from arriero_faces.prefix import NOTHING, Marked
from arriero_faces.resume import TOKENS, Resume, Resumed
from arriero_worker.engine.messages import EngineRequest, Refusal, SamplingParams
from arriero_worker.front.answer import Answer, AnswerRules, Piece
from arriero_worker.front.engine_client import ConsumerTooSlow, Delta, EngineGone, Submission
from arriero_worker.front.marks import mark_depths

if TYPE_CHECKING:
    from arriero_worker.front.service import Service

_SEEDS = 2**64


@dataclass(slots=True, kw_only=True)
class Generation:
    """One checked request: sequences to continue, and how. Sequence `p * n + i` is answer i to prompt p."""

    prompts: list[list[int]]
    sampling: SamplingParams
    """Of answer 0; answer i uses seed + i."""
    n: int = 1
    stop: list[str] = field(default_factory=list)
    include_stop: bool = False
    show_special: bool = False
    tools: frozenset[str] | None = None
    priority: int = 0
    cache_salt: str = ""
    marked: Marked = NOTHING
    """Of the only prompt; with several there are no marks."""
    queue_timeout: float = 0.0
    resume: Resume = field(default_factory=Resume)
    arrived: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class Usage:
    """Tokens of a request, all answers together; those produced before a resume count."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Run:
    """The answers to one Generation: `next` until it returns [], `close` always."""

    def __init__(self, service: Service, generation: Generation, rules: AnswerRules) -> None:
        self.seed = generation.sampling.seed
        self.usage = Usage(prompt_tokens=sum(map(len, generation.prompts)), cached_tokens=generation.resume.cached or 0)
        self._service = service
        self._metrics = service.metrics
        self._generation = generation
        self._answers: list[Answer] = []
        """Of the sequences in the submission, by place."""
        self._ready: list[Piece] = []
        self._submission: Submission | None = None
        self._last_token: list[float] = []
        requests = self._prepare(rules)
        self._unfinished = len(requests)
        if requests:
            try:
                self._submission = service.client.submit(requests)
            except EngineGone as error:
                raise _gone(error) from error

    def _prepare(self, rules: AnswerRules) -> list[EngineRequest]:
        generation, launch = self._generation, self._service.launch
        count = len(generation.prompts) * generation.n
        resumed = generation.resume.answers
        if resumed is not None and len(resumed) != count:
            raise HttpError(
                400,
                f"{TOKENS}: {len(resumed)} groups of tokens for {count} answers",
                param=TOKENS,
            )
        marks = mark_depths(generation.marked, len(generation.prompts[0])) if launch.engine.prefix_cache else []
        requests = []
        ids = self._service.client.allocate(count)
        for index in range(count):
            was = resumed[index] if resumed is not None else None
            answer = Answer(index, rules)
            if was is not None and self._resume(answer, was):
                continue
            sampling = generation.sampling
            if index % generation.n:
                seed = (sampling.seed + index % generation.n) % _SEEDS
                sampling = msgspec.structs.replace(sampling, seed=seed)
            self._answers.append(answer)
            self._last_token.append(0.0)
            requests.append(
                EngineRequest(
                    id=ids[index],
                    prompt=generation.prompts[index // generation.n],
                    sampling=sampling,
                    output=was.tokens if was is not None else [],
                    priority=generation.priority,
                    queue_timeout=generation.queue_timeout or launch.engine.queue_timeout_seconds,
                    run_timeout=launch.engine.run_timeout_seconds,
                    cache_salt=generation.cache_salt,
                    marks=marks,
                )
            )
            marks = []  # the other answers share its prompt, and so its blocks
        return requests

    def _resume(self, answer: Answer, was: Resumed) -> bool:
        """Whether the answer was over already, so that nothing is left to run."""
        answer.resume(was.tokens)
        if answer.finish is None and not was.delivered:
            self.usage.completion_tokens += len(was.tokens)
            return False
        self.usage.completion_tokens += answer.count
        if not was.delivered:
            self._ready.append(answer.last_piece())
        return True

    @property
    def over(self) -> bool:
        """Whether `next` has returned every answer's finish."""
        return self._unfinished == 0 and not self._ready

    async def next(self) -> list[Piece]:
        """The next pieces, of any answers; waits for them. [] once every answer has had its finish.

        Raises HttpError where the engine refused a sequence, failed or went away.
        """
        if self._ready:
            ready, self._ready = self._ready, []
            return ready
        if self._submission is None or self._unfinished == 0:
            return []
        while True:
            try:
                news = await self._submission.next()
            except EngineGone as error:
                raise _gone(error) from error
            except ConsumerTooSlow as error:
                raise HttpError(408, str(error), code="client_too_slow") from error
            if not news:
                return []
            now = time.monotonic()
            pieces = []
            for place, delta in news:
                piece = self._take(place, delta, now)
                if piece is not None:
                    pieces.append(piece)
            if pieces:
                return pieces

    def _take(self, place: int, delta: Delta, now: float) -> Piece | None:
        assert self._submission is not None
        if delta.refusal is not None:
            raise _refused(delta.refusal)
        if delta.finish is not None and delta.finish.reason in ("error", "abort"):
            self._metrics.answer(delta.finish.reason)
            raise HttpError(500, delta.finish.message or "the engine failed on this request", code="engine_error")
        answer = self._answers[place]
        if answer.finish is not None:
            return None
        first_of_prompt = answer.index % self._generation.n == 0
        if delta.cached > 0 and first_of_prompt and self._generation.resume.cached is None:
            prompt = self._generation.prompts[answer.index // self._generation.n]
            self.usage.cached_tokens += min(delta.cached, len(prompt))
        before = answer.count
        piece = answer.take(delta)
        fresh = answer.count - before
        self.usage.completion_tokens += fresh
        if fresh:
            self._observe(place, fresh, now)
        if piece is not None and piece.finish is not None:
            self._submission.abort(place)
            self._metrics.answer(piece.finish)
            self._unfinished -= 1
            if self._unfinished == 0:
                self._metrics.end_to_end.observe(now - self._generation.arrived)
        return piece

    def _observe(self, place: int, fresh: int, now: float) -> None:
        last = self._last_token[place]
        self._last_token[place] = now
        if last == 0.0:
            self._metrics.first_token.observe(now - self._generation.arrived)
            fresh -= 1
            last = now
        if fresh > 0:
            step = (now - last) / fresh
            for _ in range(fresh):
                self._metrics.inter_token.observe(step)

    def close(self) -> None:
        """End what still runs: the client is gone, or has all it wanted."""
        if self._submission is not None:
            for _ in range(self._submission.close()):
                self._metrics.answer("abort")


def _gone(error: EngineGone) -> HttpError:
    return HttpError(503, str(error), code="engine_gone", retry_after=1)


def _refused(refusal: Refusal) -> HttpError:
    message, wait = refusal.message, refusal.retry_after or 1.0
    match refusal.code:
        case "invalid":
            return HttpError(400, message)
        case "too_long":
            return HttpError(400, message, param="prompt", code="context_length_exceeded")
        case "queue_full":
            return HttpError(429, message, code="queue_full", retry_after=wait)
        case "draining" | "not_ready":
            return HttpError(503, message, code=refusal.code, retry_after=wait)
        case "timeout":
            return HttpError(504, message, code="queue_timeout")
        case "internal":
            return HttpError(500, message, code="engine_error")
