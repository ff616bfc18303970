"""A Run into an HTTP answer: whole, or as server-sent events."""

from __future__ import annotations

from typing import Protocol

from arriero_faces.http.errors import HttpError
from arriero_faces.http.exchange import Exchange
from arriero_faces.resume import Resume, parse_resume
from arriero_worker.front.answer import Piece
from arriero_worker.front.openai.encode import DONE, EVENT_STREAM, STREAM_HEADERS, event
from arriero_worker.front.run import Generation, Run, Usage
from arriero_worker.front.service import Service


class StreamWriter(Protocol):
    """One API's events."""

    def first(self) -> bytes: ...

    def piece(self, piece: Piece) -> bytes: ...

    def last(self, usage: Usage) -> bytes: ...


def resume_of(exchange: Exchange, service: Service) -> Resume:
    """The resume headers. Raises HttpError."""
    return parse_resume(lambda name: exchange.header(name.encode()), service.vocab_size)


async def collect(run: Run, generation: Generation) -> tuple[list[Piece], Usage]:
    """All answers, whole, by index. Raises HttpError."""
    count = len(generation.prompts) * generation.n
    answers = [Piece(index, "") for index in range(count)]
    texts: list[list[str]] = [[] for _ in range(count)]
    while pieces := await run.next():
        for piece in pieces:
            answer = answers[piece.index]
            texts[piece.index].append(piece.text)
            answer.tokens += piece.tokens
            answer.logprobs += piece.logprobs
            if piece.prompt_logprobs is not None:
                answer.prompt_logprobs = (answer.prompt_logprobs or []) + piece.prompt_logprobs
            answer.finish, answer.stop_reason, answer.calls = piece.finish, piece.stop_reason, piece.calls
    for answer, parts in zip(answers, texts, strict=True):
        answer.text = "".join(parts)
    return answers, run.usage


async def stream(exchange: Exchange, run: Run, writer: StreamWriter, headers: tuple[tuple[str, str], ...]) -> None:
    """Events as they come. An error before the first is raised; a later one becomes an event and a cut connection.

    While the client does not read, output gathers in the Run (bounded) and goes out in fewer, larger events.
    """
    pieces = await run.next()
    exchange.start(200, EVENT_STREAM, (*STREAM_HEADERS, *headers))
    first = writer.first()
    try:
        while pieces:
            exchange.write(first + b"".join([writer.piece(piece) for piece in pieces]))
            first = b""
            if exchange.blocked:
                await exchange.drain()
            pieces = await run.next()
    except HttpError as error:
        # Without [DONE] and without the last chunk: no client takes what it has for the whole answer.
        exchange.write(event({"error": {**error.fields(), "status": error.status}}))
        exchange.cut()
        exchange.status = error.status
        return
    exchange.write(first + writer.last(run.usage) + DONE)
    exchange.finish()
