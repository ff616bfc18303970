"""Clients of a router: a closed loop of connections for figures, single requests for a close look at the answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httptools

JSON_HEADERS = "content-type: application/json\r\n"


def post(path: str, body: dict[str, Any], headers: str = "") -> bytes:
    """The bytes of one request; `headers` are lines ended by CRLF."""
    data = json.dumps(body, separators=(",", ":")).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: router\r\n{JSON_HEADERS}{headers}content-length: {len(data)}\r\n\r\n"
    return head.encode() + data


class Answer:
    """One answer as it arrived. Times are of `time.perf_counter`, in seconds; 0.0: it did not come so far."""

    __slots__ = ("began", "ended", "error", "first", "parts", "status", "times", "whole")

    def __init__(self) -> None:
        self.began = self.first = self.ended = 0.0
        self.status = 0
        self.parts: list[bytes] = []
        """Of the body, without the framing."""
        self.times: list[float] = []
        """When each part came."""
        self.whole = False
        """Its end was marked as HTTP demands."""
        self.error = ""
        """Why there is no whole answer."""

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)


class Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.answer: Answer | None = None
        self.done: asyncio.Future[None] | None = None
        self.reusable = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.reusable = True

    def send(self, request: bytes) -> Answer:
        assert self.transport is not None
        assert self.answer is None
        self.parser = httptools.HttpResponseParser(self)
        self.answer = answer = Answer()
        answer.began = time.perf_counter()
        self.transport.write(request)
        return answer

    def data_received(self, data: bytes) -> None:
        self.now = time.perf_counter()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(f"not HTTP: {error}")

    def on_headers_complete(self) -> None:
        assert self.answer is not None
        self.answer.status = self.parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        answer = self.answer
        assert answer is not None
        if not answer.parts:
            answer.first = self.now
        answer.parts.append(data)
        answer.times.append(self.now)

    def on_message_complete(self) -> None:
        answer = self.answer
        assert answer is not None
        if answer.status == 100:
            return
        answer.whole = True
        self.reusable = self.parser.should_keep_alive()
        self.end(answer)

    def connection_lost(self, error: Exception | None) -> None:
        self.transport, self.reusable = None, False
        if self.answer is not None:
            self.fail(str(error) if error else "the connection was closed")

    def fail(self, error: str) -> None:
        answer = self.answer
        self.reusable = False
        if answer is not None:
            answer.error = error
            self.end(answer)

    def end(self, answer: Answer) -> None:
        answer.ended = time.perf_counter()
        self.answer = None
        if not self.reusable and self.transport is not None:
            self.transport.close()
        self.ready(answer)

    def ready(self, answer: Answer) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_result(None)


async def ask(port: int, request: bytes, timeout: float = 120.0) -> Answer:
    """One request on a connection of its own. What goes wrong stands in the answer."""
    loop = asyncio.get_running_loop()
    try:
        transport, connection = await loop.create_connection(Connection, "127.0.0.1", port)
    except OSError as error:
        answer = Answer()
        answer.error = str(error)
        return answer
    connection.done = loop.create_future()
    answer = connection.send(request)
    try:
        async with asyncio.timeout(timeout):
            await connection.done
    except TimeoutError:
        connection.done = None
        connection.fail(f"no whole answer after {timeout:g} s")
    finally:
        transport.close()
    return answer


class _Looping(Connection):
    """Takes the next request as soon as it is free."""

    def __init__(self, loop: ClosedLoop) -> None:
        super().__init__()
        self.loop = loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.take()

    def take(self) -> None:
        request = next(self.loop.requests, None)
        if request is None:
            assert self.transport is not None
            self.transport.close()
        else:
            self.send(request)

    def ready(self, answer: Answer) -> None:
        self.loop.answers.append(answer)
        if len(self.loop.answers) == self.loop.count:
            self.loop.finished.set()
        if self.loop.fresh or not self.reusable:
            if self.transport is not None:
                self.transport.close()
            self.loop.connect()
        else:
            self.take()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.loop.open.discard(self)


class ClosedLoop:
    """So many connections, each with one request at a time, until all requests are answered."""

    def __init__(self, port: int, requests: Sequence[bytes], connections: int, fresh: bool = False) -> None:
        self.port, self.connections, self.fresh = port, connections, fresh
        """`fresh`: a connection for each request."""
        self.count = len(requests)
        self.requests: Iterator[bytes] = iter(requests)
        self.answers: list[Answer] = []
        self.open: set[Connection] = set()
        self.finished = asyncio.Event()
        self.opening: set[asyncio.Task[None]] = set()

    async def run(self, limit: float) -> list[Answer]:
        """Raises TimeoutError after `limit` seconds, OSError when nothing listens."""
        began = time.perf_counter()
        for _ in range(min(self.connections, self.count)):
            self.connect()
        try:
            async with asyncio.timeout(limit):
                while not self.finished.is_set():
                    waiting = asyncio.create_task(self.finished.wait())
                    await asyncio.wait({waiting, *self.opening}, return_when=asyncio.FIRST_COMPLETED)
                    waiting.cancel()
                    for task in [task for task in self.opening if task.done()]:
                        self.opening.discard(task)
                        task.result()
        finally:
            for connection in list(self.open):
                if connection.transport is not None:
                    connection.transport.abort()
            self.seconds = time.perf_counter() - began
        return self.answers

    def connect(self) -> None:
        if len(self.answers) < self.count:
            self.opening.add(asyncio.get_running_loop().create_task(self._connect()))

    async def _connect(self) -> None:
        connection = _Looping(self)
        self.open.add(connection)
        await asyncio.get_running_loop().create_connection(lambda: connection, "127.0.0.1", self.port)


@dataclass
class Reading:
    """What an OpenAI client makes of an answer."""

    text: str = ""
    finish: str | None = None
    usages: list[dict[str, Any]] = field(default_factory=list)
    """Each told one; a sound answer has one."""
    ids: set[tuple[str, int]] = field(default_factory=set)
    """`id` and `created` of all events."""
    roles: int = 0
    events: int = 0
    times: list[float] = field(default_factory=list)
    """When each event with text came."""
    faults: list[str] = field(default_factory=list)
    """What a client would call a failure; empty: a sound answer."""
    cut: bool = False
    """It had begun with 200, and did not come to its end."""

    @property
    def tokens(self) -> tuple[int, int] | None:
        """Prompt and completion tokens as told, if told once."""
        if len(self.usages) != 1:
            return None
        return self.usages[0]["prompt_tokens"], self.usages[0]["completion_tokens"]


def read(answer: Answer, stream: bool) -> Reading:
    """Every fault of the answer, and what it holds."""
    reading = Reading()
    if answer.status != 200:
        reading.faults.append(f"status {answer.status}: {answer.error or answer.body[:300].decode('utf-8', 'replace')}")
        return reading
    if not answer.whole:
        reading.cut = True
        reading.faults.append(f"cut: {answer.error}")
    if not stream:
        if answer.whole:
            _read_whole(answer.body, reading)
        return reading
    done = 0
    for at, block in _blocks(answer):
        data = block.removeprefix(b"data:").strip()
        if block.startswith(b":"):
            if block.startswith(b": arriero "):
                reading.faults.append(f"a resume comment reached the client: {block[:80]!r}")
        elif data == b"[DONE]":
            done += 1
        elif block.startswith(b"data:"):
            try:
                event = json.loads(data)
            except ValueError:
                reading.faults.append(f"half an event: {block[:80]!r}")
            else:
                _read_event(event, at, reading)
        else:
            reading.faults.append(f"no event: {block[:80]!r}")
    if done != 1:
        reading.cut = True
        reading.faults.append(f"[DONE] came {done} times")
    if len(reading.ids) > 1:
        reading.faults.append(f"several ids: {sorted(reading.ids)}")
    if reading.roles > 1:
        reading.faults.append(f"the role came {reading.roles} times")
    return reading


def _blocks(answer: Answer) -> Iterator[tuple[float, bytes]]:
    """Server-sent events with the time at which each was whole."""
    rest = b""
    for at, part in zip(answer.times, answer.parts, strict=True):
        *blocks, rest = (rest + part).split(b"\n\n")
        yield from ((at, block) for block in blocks if block)
    if rest:
        yield answer.times[-1], rest


def _read_event(event: dict[str, Any], at: float, reading: Reading) -> None:
    reading.events += 1
    if "error" in event:
        reading.cut = True
        reading.faults.append(f"an error event: {event['error']}")
        return
    reading.ids.add((event["id"], event["created"]))
    if event.get("usage"):
        reading.usages.append(event["usage"])
    for choice in event["choices"]:
        delta = choice.get("delta", {})
        text = (delta.get("content") if "delta" in choice else choice["text"]) or ""
        reading.roles += "role" in delta
        if text:
            reading.times.append(at)
        reading.text += text
        reading.finish = choice.get("finish_reason") or reading.finish


def _read_whole(body: bytes, reading: Reading) -> None:
    value = json.loads(body)
    choice = value["choices"][0]
    reading.text = choice["message"]["content"] if "message" in choice else choice["text"]
    reading.finish = choice["finish_reason"]
    reading.usages.append(value["usage"])
    reading.ids.add((value["id"], value["created"]))
