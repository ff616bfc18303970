"""One gRPC call on its way to replicas and back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from arriero.inference.v1 import inference_pb2 as pb
from arriero_faces.http.errors import HttpError
from arriero_faces.resume import HEADER, SEED, TOKENS
from arriero_router.core.replay import Break
from arriero_router.front.forward import prompt_estimate
from arriero_router.front.grpc_metadata import Pairs, to_client, to_replica
from arriero_router.front.journey import HoldSettings, Outcome

if TYPE_CHECKING:
    from arriero_router.core.dispatch import Grant
    from arriero_router.front.record import Record
    from arriero_router.served import Served

_METHOD = "/arriero.inference.v1.Inference/Generate"
_LOOK_SECONDS = 1.0
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

    def __init__(self, failure: grpc.aio.AioRpcError) -> None:
        code = failure.code()
        super().__init__(_STATUSES.get(code, 400), _words(failure), retry_after=_retry_after(failure))
        self.grpc_code = code
        self.trailing = to_client(failure.trailing_metadata())


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
        record.request_id = metadata.get("x-request-id") or record.request_id
        self._metadata: Pairs = to_replica(context.invocation_metadata() or ())
        self._metadata += [(HEADER, "1"), ("x-request-id", record.request_id)]
        self._tokens: list[list[int]] = []
        self._received = 0
        """Tokens, of all answers."""
        self._finished: set[int] = set()
        self._seed: int | None = None
        self._complete = False
        self._last: GrpcError | None = None
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
        if self._last is not None and outcome.kind not in (Break.CUT, Break.UNREACHED):
            raise self._last
        raise HttpError(
            502, f"no replica could answer; the last one: {outcome.error} ({journey.attempts.made} attempts)"
        )

    async def _attempt(self, grant: Grant) -> Outcome:
        record = self._record
        metadata = [*self._metadata, *self._resume()]
        trace = record.trace.attempt(grant.replica.name) if record.trace is not None else None
        if trace is not None or self._trace:
            metadata.append(("traceparent", trace.traceparent if trace is not None else self._trace))
        call = record.served.channel(grant.replica).unary_stream(_METHOD)(
            self._data, metadata=metadata, timeout=self._context.time_remaining()
        )
        record.sent()
        before = self._received
        watch = _Watch(call, grant, self._take_seconds, record.served)
        error = "cancelled"
        try:
            await self._relay(call, watch)
            await _end(call, self._context)
            error = ""
            return Outcome(None)
        except asyncio.CancelledError:
            if watch.late_client:
                error = f"the client took nothing for {self._take_seconds:g} s"
                raise HttpError(408, error) from None
            if not watch.silent:
                raise
            error = watch.silent
            return Outcome(Break.CUT, error, gained=self._received > before)
        except grpc.aio.AioRpcError as failure:
            error = _words(failure)
            if self._complete:
                return Outcome(None)  # the client has all of it
            self._last = GrpcError(failure)
            return Outcome(_kind_of(failure, self.begun), error, gained=self._received > before)
        finally:
            watch.stop()
            call.cancel()
            if trace is not None:
                trace.end(error)

    async def _relay(self, call: Any, watch: _Watch) -> None:
        """Messages one after the other: while the client does not take one, the replica is not read, and gathers what
        it has to say in fewer of them.
        """
        read, write = call.read, self._context.write
        while (data := await read()) is not grpc.aio.EOF:
            if not watch.heard:
                self._record.first_byte()
                if not self.begun:
                    await _begin(call, self._context)
            message = pb.GenerateResponse.FromString(data)
            self._note(message)
            if not self._passes_ids:
                message.ClearField("token_ids")
                message.ClearField("seed")
                data = message.SerializeToString()
            watch.heard = watch.writing = watch.now()
            await write(data)
            watch.writing = 0.0
            self._complete = self._complete or message.HasField("usage")

    def _note(self, message: pb.GenerateResponse) -> None:
        """What the client has from now on."""
        self.begun = True
        index, tokens = message.index, self._tokens
        while len(tokens) <= index:
            tokens.append([])
        ids = message.token_ids
        tokens[index] += ids
        self._received += len(ids)
        if message.finish_reason:
            self._finished.add(index)
        if message.HasField("seed"):
            self._seed = message.seed
        if message.HasField("usage"):
            usage = message.usage
            self._record.tokens(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)

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
    method: str, data: bytes, metadata: dict[str, str], context: Any, record: Record, hold: HoldSettings
) -> bytes:
    """A call with one answer. Raises HttpError."""
    result = b""
    last: GrpcError | None = None
    record.request_id = metadata.get("x-request-id") or record.request_id
    passed = to_replica(context.invocation_metadata() or ())
    passed.append(("x-request-id", record.request_id))
    given = metadata.get("traceparent", "")

    async def attempt(grant: Grant) -> Outcome:
        nonlocal result, last
        trace = record.trace.attempt(grant.replica.name) if record.trace is not None else None
        parent = trace.traceparent if trace is not None else given
        own = [("traceparent", parent)] if parent else []
        call = record.served.channel(grant.replica).unary_unary(method)(
            data, metadata=[*passed, *own], timeout=context.time_remaining()
        )
        record.sent()
        watch = _Watch(call, grant, 0.0, record.served)
        error = "cancelled"
        try:
            result = await call
            await _begin(call, context)
            await _end(call, context)
            error = ""
        except asyncio.CancelledError:
            if not watch.silent:
                raise
            error = watch.silent
            return Outcome(Break.CUT, error)
        except grpc.aio.AioRpcError as failure:
            error = _words(failure)
            last = GrpcError(failure)
            return Outcome(_kind_of(failure, begun=False), error)
        finally:
            watch.stop()
            call.cancel()
            if trace is not None:
                trace.end(error)
        record.first_byte()
        return Outcome(None)

    outcome = await record.journey.run(attempt, hold)
    if outcome.kind is None:
        return result
    raise last or HttpError(502, f"no replica could answer; the last one: {outcome.error}")


async def _begin(call: Any, context: Any) -> None:
    """The client gets the initial metadata of the replica that gave it its first message."""
    if initial := to_client(await call.initial_metadata()):
        await context.send_initial_metadata(initial)


async def _end(call: Any, context: Any) -> None:
    if trailing := to_client(await call.trailing_metadata()):
        context.set_trailing_metadata(trailing)


class _Watch:
    """Looks now and then whether one attempt stands still, and ends it: `silent` or `late_client` then say so."""

    def __init__(self, call: Any, grant: Grant, take_seconds: float, served: Served) -> None:
        self._loop = served.loop
        self.now = served.loop.time
        self.heard = 0.0
        """When the last message came; 0: none has."""
        self.writing = 0.0
        """Since when the client does not take a message; 0: it has them all."""
        self.silent = ""
        self.late_client = False
        self._call, self._replica, self._served = call, grant.replica, served
        self._take_seconds = take_seconds
        self._began = self.now()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._timer = self._loop.call_later(_LOOK_SECONDS, self._look)

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        now = self.now()
        if self.writing:
            if now - self.writing > self._take_seconds:
                self.late_client = True
                self._task.cancel()
                return
        else:
            limit = self._served.silence_of(self._replica, begun=bool(self.heard))
            if limit and now - (self.heard or self._began) > limit:
                self.silent = f"the replica said nothing for {limit:g} s"
                self._call.cancel()
                return
        self._timer = self._loop.call_later(_LOOK_SECONDS, self._look)


def _kind_of(failure: grpc.aio.AioRpcError, begun: bool) -> Break:
    """What a failed call says of the attempt; `begun`: the client has had something."""
    code = failure.code()
    if code is grpc.StatusCode.UNAVAILABLE and not begun:
        if (failure.details() or "").startswith("failed to connect"):
            return Break.UNREACHED
        if _retry_after(failure) is not None:
            return Break.REFUSED
    return _BREAKS.get(code, Break.CLIENT)


def _words(failure: grpc.aio.AioRpcError) -> str:
    return failure.details() or str(failure.code().name)


def _retry_after(failure: grpc.aio.AioRpcError) -> float | None:
    for key, value in failure.trailing_metadata() or ():
        if key == "retry-after" and isinstance(value, str) and value.isdigit():
            return float(value)
    return None
