"""One gRPC call on its way to replicas and back."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from arriero.inference.v1 import inference_pb2 as pb
from arriero_faces.http.errors import HttpError
from arriero_faces.resume import HEADER, SEED, TOKENS
from arriero_router.core.replay import Break
from arriero_router.front.forward import prompt_estimate
from arriero_router.front.journey import HoldSettings, Outcome

if TYPE_CHECKING:
    from arriero_router.core.dispatch import Grant
    from arriero_router.front.record import Record

_METHOD = "/arriero.inference.v1.Inference/Generate"
_NOT_FORWARDED = ("authorization", "x-api-key", "user-agent", "traceparent", "x-request-id")
_BREAKS = {
    grpc.StatusCode.UNAVAILABLE: Break.CUT,
    grpc.StatusCode.CANCELLED: Break.CUT,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Break.REFUSED,
    grpc.StatusCode.INTERNAL: Break.FAILED,
    grpc.StatusCode.UNKNOWN: Break.FAILED,
    grpc.StatusCode.DATA_LOSS: Break.FAILED,
    grpc.StatusCode.ABORTED: Break.FAILED,
}
"""Any other status is the request's own fault."""
_STATUSES = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.INTERNAL: 500,
}


class GrpcError(HttpError):
    """A replica's own status, passed on."""

    def __init__(self, code: grpc.StatusCode, message: str, retry_after: float | None = None) -> None:
        super().__init__(_STATUSES.get(code, 400), message, retry_after=retry_after)
        self.grpc_code = code


class GrpcForward:
    """A `Generate` call. What the client has is known token by token, so another replica can go on behind it."""

    def __init__(
        self, data: bytes, request: pb.GenerateRequest, metadata: dict[str, str], context: Any, record: Record
    ) -> None:
        self._data, self._context, self._record = data, context, record
        self._answers = max(1, request.sampling.n or 1)
        self._passes_ids = metadata.get(HEADER) == "1"
        self._given = {name: value for name, value in metadata.items() if name.startswith(HEADER) and name != HEADER}
        self._trace = metadata.get("traceparent", "")
        self._metadata = [
            (name, value)
            for name, value in metadata.items()
            if name not in _NOT_FORWARDED and not name.startswith((HEADER, "grpc-"))
        ]
        record.request_id = metadata.get("x-request-id") or secrets.token_hex(12)
        self._metadata += [(HEADER, "1"), ("x-request-id", record.request_id)]
        self._tokens: list[list[int]] = []
        self._finished: set[int] = set()
        self._seed: int | None = None
        self._complete = False
        self.begun = False
        """The client has had something."""

    async def run(self, hold: HoldSettings, take_seconds: float) -> None:
        """Raises HttpError; GrpcError where the last word was a replica's."""
        self._take_seconds = take_seconds
        journey = self._record.journey
        outcome = await journey.run(self._attempt, hold)
        if outcome.kind is None:
            return
        self._count()
        if self._last is not None and outcome.kind is not Break.CUT and outcome.kind is not Break.UNREACHED:
            raise self._last
        raise HttpError(
            502, f"no replica could answer; the last one: {outcome.error} ({journey.attempts.made} attempts)"
        )

    _last: GrpcError | None = None

    async def _attempt(self, grant: Grant) -> Outcome:
        record = self._record
        metadata = [*self._metadata, *self._resume()]
        trace = record.trace.attempt(grant.replica.name) if record.trace is not None else None
        if trace is not None or self._trace:
            metadata.append(("traceparent", trace.traceparent if trace is not None else self._trace))
        call = record.served.channel(grant.replica).unary_stream(_METHOD)(self._data, metadata=metadata)
        record.sent()
        before = sum(map(len, self._tokens))
        error = "cancelled"
        try:
            await self._relay(call)
            error = ""
            return Outcome(None)
        except grpc.aio.AioRpcError as failure:
            error = failure.details() or failure.code().name
            if self._complete:
                return Outcome(None)  # the client has all of it
            kind = _BREAKS.get(failure.code(), Break.CLIENT)
            if kind is Break.CUT and not self.begun and _never_reached(failure):
                kind = Break.UNREACHED
            self._last = GrpcError(failure.code(), error, _retry_after(failure))
            return Outcome(kind, error, gained=sum(map(len, self._tokens)) > before)
        finally:
            call.cancel()
            if trace is not None:
                trace.end(error)

    async def _relay(self, call: Any) -> None:
        """Messages as they come. While the client does not take one, what follows gathers into the next."""
        write: asyncio.Task[None] | None = None
        waiting: dict[int, pb.GenerateResponse] = {}
        first = True
        while (data := await call.read()) is not grpc.aio.EOF:
            if first:
                first = False
                self._record.first_byte()
            message = self._noted(data)
            if write is not None and not write.done():
                _gather(waiting, message)
                if len(waiting) > self._answers or sum(len(m.token_ids) for m in waiting.values()) > 4096:
                    await self._taken(write)
                    write = None
                else:
                    continue
            elif waiting:
                _gather(waiting, message)
            else:
                write = await self._write(message)
                continue
            write = await self._flush(waiting)
        if write is not None:
            await self._taken(write)
        if waiting and (write := await self._flush(waiting)) is not None:
            await self._taken(write)

    async def _flush(self, waiting: dict[int, pb.GenerateResponse]) -> asyncio.Task[None] | None:
        messages = list(waiting.values())
        waiting.clear()
        write = None
        for message in messages:
            if write is not None:
                await self._taken(write)
            write = await self._write(message)
        return write

    async def _write(self, message: pb.GenerateResponse) -> asyncio.Task[None] | None:
        """Begin to write; the task that goes on with it, where the client does not take it at once."""
        self.begun = True
        if message.HasField("usage"):
            self._complete = True
            usage = message.usage
            self._record.tokens(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
        while len(self._tokens) <= message.index:
            self._tokens.append([])
        self._tokens[message.index] += message.token_ids
        if message.finish_reason:
            self._finished.add(message.index)
        if not self._passes_ids:
            message.ClearField("token_ids")
            message.ClearField("seed")
        task: asyncio.Task[None] = asyncio.ensure_future(self._context.write(message.SerializeToString()))
        await asyncio.sleep(0)
        if task.done():
            task.result()
            return None
        return task

    async def _taken(self, write: asyncio.Task[None]) -> None:
        try:
            async with asyncio.timeout(self._take_seconds):
                await write
        except TimeoutError:
            raise HttpError(408, f"the client took nothing for {self._take_seconds:g} s") from None

    def _noted(self, data: bytes) -> pb.GenerateResponse:
        message = pb.GenerateResponse.FromString(data)
        if message.HasField("seed"):
            self._seed = message.seed
        return message

    def _resume(self) -> list[tuple[str, str]]:
        if not self.begun:
            return list(self._given.items())
        values = dict(self._given)
        given = [group.strip() for group in values.pop(TOKENS, "").split(";")]
        groups = []
        for index in range(max(self._answers, len(self._tokens))):
            had = given[index] if index < len(given) else ""
            new = ",".join(map(str, self._tokens[index])) if index < len(self._tokens) else ""
            text = ",".join(filter(None, (had, new)))
            groups.append(text + "!" if index in self._finished and not text.endswith("!") else text)
        if self._seed is not None:
            values.setdefault(SEED, str(self._seed))
        return [(TOKENS, ";".join(groups)), *values.items()]

    def _count(self) -> None:
        """What the client has had of an answer that was not finished."""
        record = self._record
        record.completion_tokens = sum(map(len, self._tokens))
        record.used = prompt_estimate(record.ask.size) + record.completion_tokens if self.begun else 0


async def unary_attempt(
    method: str, data: bytes, metadata: dict[str, str], record: Record, hold: HoldSettings
) -> bytes:
    """A call with one answer. Raises HttpError."""
    result = b""
    last: GrpcError | None = None
    record.request_id = metadata.get("x-request-id") or secrets.token_hex(12)
    passed = [
        (name, value) for name, value in metadata.items() if name not in _NOT_FORWARDED and not name.startswith("grpc-")
    ]

    async def attempt(grant: Grant) -> Outcome:
        nonlocal result, last
        call = record.served.channel(grant.replica).unary_unary(method)(data, metadata=passed)
        record.sent()
        try:
            result = await call
        except grpc.aio.AioRpcError as failure:
            last = GrpcError(failure.code(), failure.details() or failure.code().name, _retry_after(failure))
            return Outcome(_BREAKS.get(failure.code(), Break.CLIENT), last.message)
        finally:
            call.cancel()
        record.first_byte()
        return Outcome(None)

    outcome = await record.journey.run(attempt, hold)
    if outcome.kind is not None:
        assert last is not None
        raise last
    return result


def _gather(waiting: dict[int, pb.GenerateResponse], message: pb.GenerateResponse) -> None:
    """Put a message to those that wait: one for each answer, which says all that its parts said."""
    held = waiting.get(message.index)
    if held is None:
        waiting[message.index] = message
        return
    text = held.text + message.text
    held.MergeFrom(message)
    held.text = text


def _never_reached(failure: grpc.aio.AioRpcError) -> bool:
    details = failure.details() or ""
    return "connect" in details.lower()


def _retry_after(failure: grpc.aio.AioRpcError) -> float | None:
    for key, value in failure.trailing_metadata() or ():
        if key == "retry-after" and isinstance(value, str) and value.isdigit():
            return float(value)
    return None
