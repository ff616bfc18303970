"""POST /v1/completions."""

from __future__ import annotations

import time
from typing import Any

from arriero_faces.http.exchange import Exchange
from arriero_faces.prefix import fields_of
from arriero_faces.resume import Resume
from arriero_worker.engine.messages import TokenLogprobs
from arriero_worker.front.answer import Piece
from arriero_worker.front.openai.encode import (
    Identity,
    ResumeComments,
    alternatives,
    event,
    finite,
    json_bytes,
    prompt_logprobs,
    token_name,
    usage_fields,
)
from arriero_worker.front.openai.parse import check_neutral, parse_body, prompts_of, sampling_fields
from arriero_worker.front.openai.reply import collect, resume_of, stream
from arriero_worker.front.openai.schema import CompletionRequest
from arriero_worker.front.run import Generation, Run, Usage
from arriero_worker.front.sampling import refuse
from arriero_worker.front.service import MAX_SEQUENCES, Service
from arriero_worker.front.text.vocabulary import Vocabulary

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, where a completion does not say."""


async def completions(service: Service, exchange: Exchange) -> None:
    """Answer one exchange. Raises HttpError."""
    arrived = time.monotonic()
    request = parse_body(CompletionRequest, exchange.body, exchange.header(b"content-type"))
    check_neutral(request)
    model = service.resolve_model(request.model)
    resume = resume_of(exchange, service)
    generation, texts = await _generation(service, request, exchange.body, resume)
    generation.arrived = arrived
    identity = Identity(exchange, "cmpl", model, resume)
    shape = Shape(service.tokenizer.vocabulary, identity, request, generation, texts)
    run = service.generate(generation)
    try:
        if request.stream:
            await stream(exchange, run, CompletionStream(shape, run), identity.headers)
        else:
            answers, usage = await collect(run, generation)
            exchange.respond(200, json_bytes(shape.whole(answers, usage)), headers=identity.headers)
    finally:
        run.close()


async def _generation(
    service: Service, request: CompletionRequest, body: bytes, resume: Resume
) -> tuple[Generation, list[str] | None]:
    """The checked request, and the prompts' texts where they are echoed."""
    fields = sampling_fields(request)
    fields.logprobs = request.logprobs
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise refuse("best_of", "only supported where it equals n", "unsupported_field")
    if request.max_tokens == 0:
        if not request.echo or request.stream:
            raise refuse("max_tokens", "0 is only allowed with echo and without stream")
        fields.max_tokens = 1  # one is sampled and thrown away: the prompt's logprobs are what is asked for
    if request.echo and request.logprobs is not None:
        if request.stream:
            raise refuse("echo", "logprobs of the prompt are not available with stream")
        fields.prompt_logprobs = max(request.logprobs, request.prompt_logprobs or 0)
    given = prompts_of(request.prompt)
    if len(given) * (request.n or 1) > MAX_SEQUENCES:
        raise refuse("prompt", f"prompts times n is at most {MAX_SEQUENCES}")
    if isinstance(given[0], str):
        texts = [prompt for prompt in given if isinstance(prompt, str)]
        prompts = await service.tokenize_all(texts, special=request.add_special_tokens is not False)
    else:
        prompts = [prompt for prompt in given if isinstance(prompt, list)]
        for prompt in prompts:
            service.check_ids(prompt, "prompt")
        texts = [service.tokenizer.decode(prompt) for prompt in prompts] if request.echo else []
    generation = Generation(
        prompts=prompts,
        sampling=service.sampling(fields, prompts, resume, default_max_tokens=DEFAULT_MAX_TOKENS),
        n=request.n or 1,
        stop=fields.stop,
        include_stop=bool(request.include_stop_str_in_output),
        show_special=request.skip_special_tokens is False,
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
        marked=fields_of(body).text(),
        resume=resume,
    )
    return generation, texts if request.echo else None


class Shape:
    """How pieces of this request look as JSON."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        identity: Identity,
        request: CompletionRequest,
        generation: Generation,
        texts: list[str] | None,
    ) -> None:
        self.identity = identity
        self.generation = generation
        self.include_usage = request.stream_options is not None and bool(request.stream_options.include_usage)
        self._vocabulary = vocabulary
        self._texts = texts
        self._logprobs = request.logprobs
        self._prompt_logprobs = request.prompt_logprobs is not None
        self._scoring = request.max_tokens == 0
        self._offsets = self._first_offsets()

    def echo(self, index: int) -> str:
        return self._texts[index // self.generation.n] if self._texts is not None else ""

    def head(self) -> dict[str, Any]:
        identity = self.identity
        return {
            "id": identity.id,
            "object": "text_completion",
            "created": identity.created,
            "model": identity.model,
        }

    def whole(self, answers: list[Piece], usage: Usage) -> dict[str, Any]:
        choices = []
        for answer in answers:
            if self._scoring:
                answer.text, answer.logprobs, answer.finish, answer.stop_reason = "", [], "length", None
            choice = {
                "index": answer.index,
                "text": self.echo(answer.index) + answer.text,
                "logprobs": self._with_prompt(answer),
                "finish_reason": answer.finish,
                "stop_reason": answer.stop_reason,
            }
            if self._prompt_logprobs:
                choice["prompt_logprobs"] = prompt_logprobs(self._vocabulary, answer.prompt_logprobs or [])
            choices.append(choice)
        if self._scoring:
            usage.completion_tokens = 0
        return {**self.head(), "choices": choices, "usage": usage_fields(usage)}

    def logprobs(self, index: int, positions: list[TokenLogprobs]) -> dict[str, Any] | None:
        """OpenAI's columns for some tokens of one answer; offsets go on from call to call."""
        if self._logprobs is None:
            return None
        names, offsets = [], []
        for position in positions:
            names.append(token_name(self._vocabulary, position.token))
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self._vocabulary.text_of(position.token))
        return {
            "text_offset": offsets,
            "token_logprobs": [finite(position.logprob) for position in positions],
            "tokens": names,
            "top_logprobs": [self._top(position) for position in positions] if self._logprobs else None,
        }

    def _top(self, position: TokenLogprobs) -> dict[str, float]:
        best: dict[str, float] = {}
        for id, value in alternatives(position):
            name = token_name(self._vocabulary, id)
            best[name] = max(finite(value), best.get(name, finite(value)))
        return best

    def _with_prompt(self, answer: Piece) -> dict[str, Any] | None:
        """The answer's logprobs; with echo, the prompt's in front, its first token having none."""
        if self._texts is None or self._logprobs is None:
            return self.logprobs(answer.index, answer.logprobs)
        self._offsets[answer.index] = 0
        first = self.generation.prompts[answer.index // self.generation.n][0]
        result = self.logprobs(
            answer.index, [TokenLogprobs(first, 0.0, 0), *(answer.prompt_logprobs or []), *answer.logprobs]
        )
        assert result is not None
        result["token_logprobs"][0] = None
        if result["top_logprobs"]:
            result["top_logprobs"][0] = None
        return result

    def _first_offsets(self) -> list[int]:
        """Where each answer's text begins: behind its echo and, in a resumed stream, behind what was sent already."""
        count = len(self.generation.prompts) * self.generation.n
        offsets = [len(self.echo(index)) for index in range(count)]
        for index, was in enumerate((self.generation.resume.answers or [])[:count]):
            offsets[index] += sum(len(self._vocabulary.text_of(token)) for token in was.tokens)
        return offsets


class CompletionStream:
    """Pieces as `text_completion` events."""

    def __init__(self, shape: Shape, run: Run) -> None:
        self._shape = shape
        self._resume = shape.generation.resume
        several = len(shape.generation.prompts) * shape.generation.n > 1
        self._comments = ResumeComments(shape.identity, run, several)
        self._echoed: set[int] = set()
        self._prefix = b"data: " + json_bytes(shape.head())[:-1] + b',"choices":[{"index":'
        self._suffix = b'}],"usage":null}\n\n' if shape.include_usage else b"}]}\n\n"

    def first(self) -> bytes:
        return b""

    def piece(self, piece: Piece) -> bytes:
        text = piece.text
        if self._resume.answers is None and piece.index not in self._echoed:
            self._echoed.add(piece.index)
            text = self._shape.echo(piece.index) + text
        out = b'%b%d,"text":%b,"logprobs":%b,"finish_reason":%b,"stop_reason":%b%b' % (
            self._prefix,
            piece.index,
            json_bytes(text),
            json_bytes(self._shape.logprobs(piece.index, piece.logprobs)),
            json_bytes(piece.finish),
            json_bytes(piece.stop_reason),
            self._suffix,
        )
        if not self._resume.wanted:
            return out
        return out + self._comments.comment(piece.index, piece.tokens)

    def last(self, usage: Usage) -> bytes:
        if not self._shape.include_usage:
            return b""
        return event({**self._shape.head(), "choices": [], "usage": usage_fields(usage)})
