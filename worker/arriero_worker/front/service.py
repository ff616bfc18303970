"""The request core behind both faces: a typed request in, engine requests out, pieces of answers back.

HTTP and gRPC translate to and from what is here, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from arriero_plan.launch import Launch
from arriero_worker.engine.messages import EngineRequest, EngineStatus, Refusal, SamplingParams
from arriero_worker.front.answer import Answer, AnswerRules, Piece
from arriero_worker.front.engine_client import ConsumerTooSlow, Delta, EngineClient, EngineGone, Submission
from arriero_worker.front.http.errors import HttpError
from arriero_worker.front.metrics import Metrics
from arriero_worker.front.resume import SEED, TOKENS, Resume, Resumed
from arriero_worker.front.sampling import SamplingFields, build_sampling, check_sampling
from arriero_worker.front.text.chat_template import TemplateRefusal, load_chat_template
from arriero_worker.front.text.generation_config import load_generation_defaults
from arriero_worker.front.text.stop import StopStrings
from arriero_worker.front.text.tokenizer import PromptTooLong, load_tokenizer
from arriero_worker.front.text.tools import PYTHON_TAG

MAX_SEQUENCES = 1024
"""Prompts times n of one request."""
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
    queue_timeout: float = 0.0
    resume: Resume = field(default_factory=Resume)
    arrived: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class Usage:
    """Tokens of a request, all answers together; those produced before a resume count."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Service:
    """What a replica can do for clients. Every refusal is an HttpError, which gRPC translates by its status."""

    def __init__(self, launch: Launch, client: EngineClient) -> None:
        """Reads tokenizer, chat template and defaults from the model's directory. Raises TokenizerError."""
        path = Path(launch.model_path)
        self.launch = launch
        self.client = client
        self.names = launch.served_names
        self.started = int(time.time())
        self.tokenizer = load_tokenizer(path)
        self.template = load_chat_template(path, self.tokenizer.config, self.tokenizer.special_tokens)
        self.defaults = load_generation_defaults(path, self.tokenizer)
        self.draining = False
        self.metrics = Metrics(
            self.names[0], lambda: client.last_status, lambda: client.status is not None, lambda: self.unready is None
        )
        self._quiet_stops = frozenset(self.defaults.eos)
        tag = self.tokenizer.id_of(PYTHON_TAG)
        self._tool_tokens = frozenset() if tag is None else frozenset({tag})

    # -- the replica

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together, at most."""
        status = self.client.last_status
        return status.model.max_context if status is not None else self.launch.engine.max_context

    @property
    def vocab_size(self) -> int:
        status = self.client.last_status
        return status.model.vocab_size if status is not None else self.tokenizer.vocabulary.size

    @property
    def unready(self) -> str | None:
        """Why the replica should get no new requests; None when it should."""
        status = self.client.status
        if self.draining:
            return "draining"
        if status is None:
            return "the engine is not there"
        if status.phase != "Serving":
            return status.reason or f"the engine is {status.phase.lower()}"
        return None

    def check_admission(self) -> None:
        """Raises HttpError 503 where a request could not be run.

        A group that lost a rank and forms again (`Joining` after it has served) takes requests: they wait.
        """
        reason = self.unready
        if reason is None:
            return
        if self.draining:
            raise HttpError(503, "the replica is draining", code="draining", retry_after=1)
        status = self.client.status
        if status is not None and status.phase == "Joining" and status.steps > 0:
            return
        raise HttpError(503, f"the replica is not ready: {reason}", code="not_ready", retry_after=1)

    def resolve_model(self, name: str | None) -> str:
        """The served name asked for; the main one where none was. Raises HttpError 404."""
        if not name:
            return self.names[0]
        if name not in self.names:
            raise HttpError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")
        return name

    # -- text in

    async def tokenize(self, text: str, *, special: bool, param: str = "prompt") -> list[int]:
        """Ids of a text. Raises HttpError 400 where they certainly exceed the context."""
        return (await self.tokenize_all([text], special=special, param=param))[0]

    async def tokenize_all(self, texts: list[str], *, special: bool, param: str = "prompt") -> list[list[int]]:
        """`tokenize`, of each."""
        try:
            return await self.tokenizer.encode_soon(texts, special=special, limit=self.max_context)
        except PromptTooLong as error:
            raise self._too_long(f"at least {error.tokens}", param) from error

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as text; the template brings the beginning of text. Raises HttpError 400."""
        try:
            return self.template.render(
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=variables,
            )
        except TemplateRefusal as error:
            raise HttpError(400, str(error), param="messages") from error

    def check_ids(self, ids: list[int], param: str) -> None:
        top = self.vocab_size
        if any(not 0 <= id < top for id in ids):
            raise HttpError(400, f"{param}: token ids are from 0 to {top - 1}", param=param)

    def sampling(
        self,
        fields: SamplingFields,
        prompts: list[list[int]],
        resume: Resume,
        *,
        default_max_tokens: int | None = None,
        param: str = "prompt",
    ) -> SamplingParams:
        """The engine's parameters for these prompts. Raises HttpError 400 naming the field."""
        if resume.seed is not None:
            fields.seed = resume.seed
        check_sampling(fields, self.vocab_size)
        longest = max(map(len, prompts))
        if min(map(len, prompts)) == 0:
            raise HttpError(400, f"{param}: the prompt has no tokens", param=param)
        room = self.max_context - longest
        if room < 1:
            raise self._too_long(str(longest), param)
        sampling = build_sampling(fields, self.defaults, room=room, default_max_tokens=default_max_tokens)
        if fields.seed is None and sampling.temperature > 0 and any(was.tokens for was in resume.answers or ()):
            raise HttpError(400, f"{SEED}: a sampled answer cannot go on without its seed", param=SEED)
        return sampling

    def _too_long(self, tokens: str, param: str) -> HttpError:
        return HttpError(
            400,
            f"{param}: {tokens} tokens leave no room for an answer; the context holds {self.max_context}",
            param=param,
            code="context_length_exceeded",
        )

    # -- answers out

    def generate(self, generation: Generation) -> Run:
        """Submit. Raises HttpError; the Run must be closed."""
        self.check_admission()
        if len(generation.prompts) * generation.n > MAX_SEQUENCES:
            raise HttpError(400, f"n: prompts times n is at most {MAX_SEQUENCES}", param="n")
        return Run(self, generation, self._rules(generation))

    def _rules(self, generation: Generation) -> AnswerRules:
        sampling = generation.sampling
        visible = self._tool_tokens if generation.tools is not None else frozenset()
        return AnswerRules(
            vocabulary=self.tokenizer.vocabulary,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            stop_ids=frozenset(sampling.stop_token_ids),
            quiet_stop_ids=self._quiet_stops,
            stop=StopStrings(generation.stop) if generation.stop else None,
            include_stop=generation.include_stop,
            visible=self.tokenizer.vocabulary.special if generation.show_special else visible,
            tools=generation.tools,
        )


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
                )
            )
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


def status_report(service: Service) -> dict[str, Any]:
    """The body of /health/ready."""
    status: EngineStatus | None = service.client.status
    reason = service.unready
    report: dict[str, Any] = {"ready": reason is None, "phase": status.phase if status else "Starting"}
    if service.draining:
        report["phase"] = "Draining"
    if reason is not None:
        report["reason"] = reason
    if status is not None:
        report["epoch"] = status.epoch
        report["ranks"] = [
            {"rank": r.rank, "pod": r.pod, "phase": r.phase, "epoch": r.epoch, "step": r.step}
            | ({"bytes_loaded": r.bytes_loaded, "bytes_total": r.bytes_total} if r.phase == "Loading" else {})
            | ({"reason": r.reason} if r.reason else {})
            for r in status.ranks
        ]
    return report
