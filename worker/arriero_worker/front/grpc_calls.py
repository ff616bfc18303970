"""What the methods of all gRPC services here share: requests read, statuses told, messages written in time."""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from arriero_faces.http.errors import HttpError

_T = TypeVar("_T", bound=Message)
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.RESOURCE_EXHAUSTED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


def parsed(kind: type[_T], data: bytes) -> _T:
    """Methods parse their requests themselves: grpc.aio would call garbage an UNKNOWN error. Raises HttpError 400."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise HttpError(400, f"the request is not a {kind.__name__}") from error


async def write(context: Any, response: Message, seconds: float) -> None:
    """Raises HttpError where the client does not take it in so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            await context.write(response)
    except TimeoutError as error:
        raise HttpError(408, f"the client took nothing for {seconds:g} s") from error


async def abort(context: Any, error: HttpError) -> NoReturn:
    """End a call with the status that an HTTP answer would have had."""
    trailing = [(name, value) for name, value in error.header_lines() if name == "retry-after"]
    await context.abort(CODES.get(error.status, grpc.StatusCode.INTERNAL), error.message, tuple(trailing))
    raise AssertionError("abort raises")
