"""POST /v1/chat/completions."""

from __future__ import annotations

import hashlib
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
    event,
    finite,
    json_bytes,
    prompt_logprobs,
    usage_fields,
)
from arriero_worker.front.openai.parse import (
    check_neutral,
    parse_body,
    sampling_fields,
    template_messages,
    template_tools,
)
from arriero_worker.front.openai.reply import collect, resume_of, stream
from arriero_worker.front.openai.schema import ChatRequest
from arriero_worker.front.run import Generation, Run, Usage
from arriero_worker.front.sampling import refuse
from arriero_worker.front.service import Service
from arriero_worker.front.text.tools import ToolCall
from arriero_worker.front.text.vocabulary import Vocabulary


async def chat_completions(service: Service, exchange: Exchange) -> None:
    """Answer one exchange. Raises HttpError."""
    arrived = time.monotonic()
    request = parse_body(ChatRequest, exchange.body, exchange.header(b"content-type"))
    check_neutral(request)
    model = service.resolve_model(request.model)
    resume = resume_of(exchange, service)
    generation, echo = await _generation(service, request, exchange.body, resume)
    generation.arrived = arrived
    identity = Identity(exchange, "chatcmpl", model, resume)
    run = service.generate(generation)
    try:
        if request.stream:
            usage = request.stream_options is not None and bool(request.stream_options.include_usage)
            writer = ChatStream(service.tokenizer.vocabulary, identity, generation, run, usage, bool(request.logprobs))
            writer.echo = echo if resume.answers is None else ""
            await stream(exchange, run, writer, identity.headers)
        else:
            answers, usage_counts = await collect(run, generation)
            body = _whole(service.tokenizer.vocabulary, identity, answers, usage_counts, request, echo)
            exchange.respond(200, json_bytes(body), headers=identity.headers)
    finally:
        run.close()


async def _generation(service: Service, request: ChatRequest, body: bytes, resume: Resume) -> tuple[Generation, str]:
    """The checked request, and the text to put in front of the answers (echo)."""
    fields = sampling_fields(request)
    if request.max_completion_tokens is not None:
        if request.max_tokens not in (None, request.max_completion_tokens):
            raise refuse("max_tokens", "differs from max_completion_tokens; send one of them")
        fields.max_tokens = request.max_completion_tokens
    if request.logprobs:
        fields.logprobs = request.top_logprobs or 0
    elif request.top_logprobs:
        raise refuse("top_logprobs", "only allowed with logprobs: true")
    if request.top_logprobs is not None and not 0 <= request.top_logprobs <= 20:
        raise refuse("top_logprobs", "must be from 0 to 20")
    messages = template_messages(request.messages)
    tools = template_tools(request.tools, request.tool_choice)
    if request.continue_final_message and request.add_generation_prompt:
        raise refuse("continue_final_message", "cannot be combined with add_generation_prompt: true")
    text = service.render(
        messages,
        tools,
        add_generation_prompt=request.add_generation_prompt is not False and not request.continue_final_message,
        continue_final_message=bool(request.continue_final_message),
        variables=request.chat_template_kwargs,
    )
    prompt = await service.tokenize(text, special=bool(request.add_special_tokens), param="messages")
    last = messages[-1]
    generation = Generation(
        prompts=[prompt],
        sampling=service.sampling(fields, [prompt], resume, param="messages"),
        n=request.n or 1,
        stop=fields.stop,
        include_stop=bool(request.include_stop_str_in_output),
        show_special=request.skip_special_tokens is False,
        tools=frozenset(tool["function"]["name"] for tool in tools) if tools else None,
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
        marked=fields_of(body).chat(),
        resume=resume,
    )
    return generation, last["content"] if request.echo and last["role"] == "assistant" and last["content"] else ""


def _whole(
    vocabulary: Vocabulary,
    identity: Identity,
    answers: list[Piece],
    usage: Usage,
    request: ChatRequest,
    echo: str,
) -> dict[str, Any]:
    choices = []
    for answer in answers:
        message: dict[str, Any] = {"role": "assistant", "content": echo + answer.text, "refusal": None}
        if answer.calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [_call(identity, answer.index, k, call) for k, call in enumerate(answer.calls)]
        choices.append(
            {
                "index": answer.index,
                "message": message,
                "logprobs": {"content": _logprobs(vocabulary, answer.logprobs)} if request.logprobs else None,
                "finish_reason": answer.finish,
                "stop_reason": answer.stop_reason,
            }
        )
    body: dict[str, Any] = {
        "id": identity.id,
        "object": "chat.completion",
        "created": identity.created,
        "model": identity.model,
        "choices": choices,
        "usage": usage_fields(usage),
    }
    if request.prompt_logprobs is not None:
        body["prompt_logprobs"] = prompt_logprobs(vocabulary, answers[0].prompt_logprobs or [])
    return body


def _call(identity: Identity, index: int, k: int, call: ToolCall) -> dict[str, Any]:
    """The id is a function of the answer's, so that a resumed stream gives the same one."""
    digest = hashlib.sha256(f"{identity.id}/{index}/{k}".encode()).hexdigest()[:24]
    return {
        "id": f"call_{digest}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _logprobs(vocabulary: Vocabulary, positions: list[TokenLogprobs]) -> list[dict[str, Any]]:
    return [
        {
            **_logprob(vocabulary, position.token, position.logprob),
            "top_logprobs": [_logprob(vocabulary, id, value) for id, value in position.top],
        }
        for position in positions
    ]


def _logprob(vocabulary: Vocabulary, id: int, value: float) -> dict[str, Any]:
    data = vocabulary.token_bytes(id)
    return {"token": data.decode("utf-8", "replace"), "logprob": finite(value), "bytes": list(data)}


class ChatStream:
    """Pieces as `chat.completion.chunk` events, built by hand: this runs once per token and client."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        identity: Identity,
        generation: Generation,
        run: Run,
        include_usage: bool,
        logprobs: bool,
    ) -> None:
        self.echo = ""
        self._vocabulary = vocabulary
        self._identity = identity
        self._comments = ResumeComments(identity, run, generation.n > 1)
        self._resume = generation.resume
        self._answers = generation.n
        self._include_usage = include_usage
        self._logprobs = logprobs
        fixed = {
            "id": identity.id,
            "object": "chat.completion.chunk",
            "created": identity.created,
            "model": identity.model,
        }
        self._prefix = b"data: " + json_bytes(fixed)[:-1] + b',"choices":[{"index":'
        self._suffix = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"

    def first(self) -> bytes:
        """The roles, unless they were sent before the break."""
        if self._resume.answers is not None:
            return b""
        out = []
        for index in range(self._answers):
            out.append(self._chunk(index, b'{"role":"assistant","content":""}', b"null", None))
            if self.echo:
                out.append(self._chunk(index, b'{"content":' + json_bytes(self.echo) + b"}", b"null", None))
        if self._resume.wanted:
            out.append(self._comments.comment(0, []))
        return b"".join(out)

    def piece(self, piece: Piece) -> bytes:
        logprobs = b"null"
        if self._logprobs and piece.logprobs:
            logprobs = json_bytes({"content": _logprobs(self._vocabulary, piece.logprobs)})
        out = []
        if piece.text:
            out.append(self._chunk(piece.index, b'{"content":' + json_bytes(piece.text) + b"}", logprobs, None))
            logprobs = b"null"
        if piece.calls:
            calls = [{"index": k, **_call(self._identity, piece.index, k, call)} for k, call in enumerate(piece.calls)]
            out.append(self._chunk(piece.index, json_bytes({"tool_calls": calls}), logprobs, None))
            logprobs = b"null"
        if piece.finish is not None:
            out.append(self._chunk(piece.index, b"{}", logprobs, piece))
        if self._resume.wanted:
            out.append(self._comments.comment(piece.index, piece.tokens))
        return b"".join(out)

    def last(self, usage: Usage) -> bytes:
        if not self._include_usage:
            return b""
        return event(
            {
                "id": self._identity.id,
                "object": "chat.completion.chunk",
                "created": self._identity.created,
                "model": self._identity.model,
                "choices": [],
                "usage": usage_fields(usage),
            }
        )

    def _chunk(self, index: int, delta: bytes, logprobs: bytes, end: Piece | None) -> bytes:
        finish = b"null"
        if end is not None:
            finish = json_bytes(end.finish) + b',"stop_reason":' + json_bytes(end.stop_reason)
        return b'%b%d,"delta":%b,"logprobs":%b,"finish_reason":%b%b' % (
            self._prefix,
            index,
            delta,
            logprobs,
            finish,
            self._suffix,
        )
