"""A replica's faces without a model behind them: fast, and with faults on request.

    python -m tests.router.mocks --name a --http-port 8000 [--grpc-port 9000] [--control-port 9100]

Answers are the words `t0 t1 t2 ...`, so a gap, a repetition or a cut shows. The request's `max_tokens` says how many;
its field `user` may hold orders, `mock pace=2000 break=5 at=a` (any of them, any order):

- `pace`: microseconds between two pieces of a stream (0: all at once), or before an answer that is no stream.
- `break`: cut the connection behind so many tokens, unless the request resumes. `at` names the one replica that does.

With `x-arriero-resume: 1` each piece of a stream is followed by the comment that a worker writes, and
`x-arriero-resume-tokens` continues behind that many. `Prefixes.Watch` tells the last 4,096 marks of prompts seen. What
other routers ask a worker before they use it is there too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
import httptools
import uvloop

from arriero.inference.v1 import inference_pb2, prefixes_pb2, prefixes_pb2_grpc, worker_pb2, worker_pb2_grpc
from arriero_faces import resume
from arriero_faces.prefix import fields_of, grpc_marks

MODEL = "mock"
SEED = 7
PROMPT_TOKENS = 512
CREATED = 1_700_000_000
_STREAM = re.compile(rb'"stream"\s*:\s*true')
_USAGE = re.compile(rb'"include_usage"\s*:\s*true')
_TOKENS = re.compile(rb'"max(?:_completion)?_tokens"\s*:\s*(\d+)')
_ORDERS = re.compile(rb'"user"\s*:\s*"mock ([^"]*)"')
_TEXT_ORDERS = re.compile(r"mock ([a-z0-9= ]*)")
_STATUS_EVERY = 0.25
_WATCH_EVERY = 0.05
_MARKS = 4096


def text_of(tokens: int, first: int = 0) -> str:
    """The answer of so many tokens."""
    return "".join(f" t{i}" for i in range(first, tokens))


def usage_of(tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": tokens,
        "total_tokens": PROMPT_TOKENS + tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


class Orders:
    """What the request wants of the mock."""

    def __init__(self, text: str, name: str) -> None:
        words = dict(word.split("=", 1) for word in text.split())
        self.pace = int(words.get("pace", 0)) / 1e6
        self.break_at = int(words["break"]) if "break" in words and words.get("at", name) == name else None


class Mock:
    """One replica's counters, shared by its faces."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.running = 0
        self.stats = dict.fromkeys(("requests", "streams", "resumed", "broken", "left", "rpcs"), 0)
        self.ids = 0
        self.run = secrets.token_hex(8)
        self.marks: OrderedDict[int, None] = OrderedDict()
        self.watchers: list[dict[int, bool]] = []
        """For each: what has changed since it was told, true for a mark that came."""

    def hold(self, marks: Iterable[int]) -> None:
        """These prefixes are in the cache; the ones used longest ago make room."""
        for mark in marks:
            if mark in self.marks:
                self.marks.move_to_end(mark)
            else:
                self.marks[mark] = None
                self._changed(mark, True)
        while len(self.marks) > _MARKS:
            self._changed(self.marks.popitem(last=False)[0], False)

    def _changed(self, mark: int, held: bool) -> None:
        for changes in self.watchers:
            if changes.get(mark) is (not held):
                del changes[mark]  # there and gone again, or the other way round, since the last word
            else:
                changes[mark] = held

    def next_id(self, prefix: str) -> str:
        self.ids += 1
        return f"{prefix}-{self.name}{self.ids}"


class HttpFace(asyncio.Protocol):
    """One connection; requests are answered in the order they came."""

    def __init__(self, mock: Mock) -> None:
        self.mock = mock
        self.loop = asyncio.get_running_loop()
        self.parser = httptools.HttpRequestParser(self)
        self.transport: asyncio.Transport | None = None
        self.stream: Stream | None = None
        self.late: asyncio.TimerHandle | None = None
        self.queue: list[tuple[bytes, dict[bytes, bytes], bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.queue.clear()
        if self.late is not None:
            self.late.cancel()
            self.mock.running -= 1
            self.mock.stats["left"] += 1
        if self.stream is not None:
            self.stream.stop()
            self.mock.stats["left"] += 1

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            assert self.transport is not None
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()

    def on_message_begin(self) -> None:
        self.url, self.body = b"", b""
        self.headers: dict[bytes, bytes] = {}

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value
        if name.lower() == b"expect" and self.transport is not None:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.queue.append((self.url, self.headers, self.body))
        self.go_on()

    def go_on(self) -> None:
        while self.queue and self.stream is None and self.late is None and self.transport is not None:
            self.answer(*self.queue.pop(0))

    def answer(self, url: bytes, headers: dict[bytes, bytes], body: bytes) -> None:
        path = url.partition(b"?")[0]
        if path not in (b"/v1/chat/completions", b"/v1/completions"):
            self.page(path)
            return
        chat = path == b"/v1/chat/completions"
        found = _TOKENS.search(body)
        tokens = int(found[1]) if found else 16
        given = _ORDERS.search(body)
        orders = Orders(given[1].decode(), self.mock.name) if given else Orders("", self.mock.name)
        self.mock.stats["requests"] += 1
        self.mock.running += 1
        if self.mock.watchers:
            fields = fields_of(body)
            self.mock.hold((fields.chat() if chat else fields.text()).marks)
        if _STREAM.search(body):
            self.mock.stats["streams"] += 1
            self.stream = Stream(self, chat, tokens, orders, headers, bool(_USAGE.search(body)))
            self.stream.start()
        elif orders.pace:
            self.late = self.loop.call_later(orders.pace, self.whole, chat, tokens, orders)
        else:
            self.whole(chat, tokens, orders)

    def whole(self, chat: bool, tokens: int, orders: Orders) -> None:
        assert self.transport is not None
        self.mock.running -= 1
        late, self.late = self.late, None
        if orders.break_at is not None:
            self.mock.stats["broken"] += 1
            self.transport.abort()
            return
        text = text_of(tokens)
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": "length"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        answer = {
            "id": self.mock.next_id("chatcmpl" if chat else "cmpl"),
            "object": "chat.completion" if chat else "text_completion",
            "created": CREATED,
            "model": MODEL,
            "choices": [choice],
            "usage": usage_of(tokens),
        }
        self.respond(json.dumps(answer).encode())
        if late is not None:
            self.go_on()

    def page(self, path: bytes) -> None:
        model = {"id": MODEL, "object": "model", "created": CREATED, "owned_by": "mock", "max_model_len": 131072}
        pages: dict[bytes, Any] = {
            b"/v1/models": {"object": "list", "data": [model]},
            b"/mock/stats": {**self.mock.stats, "running": self.mock.running},
            b"/get_load": [{"num_reqs": self.mock.running, "num_waiting_reqs": 0, "num_tokens": 0, "dp_rank": 0}],
        }
        about = {"model_path": MODEL, "served_model_name": MODEL, "is_generation": True, "tokenizer_path": MODEL}
        for info in (b"/get_model_info", b"/model_info", b"/get_server_info", b"/server_info"):
            pages[info] = {**about, "version": "1", "dp_size": 1, "tp_size": 1, "max_total_num_tokens": 1_000_000}
        if path in pages:
            self.respond(json.dumps(pages[path]).encode())
        elif path.startswith(b"/health"):
            self.respond(b'{"status":"ok"}')
        else:
            self.respond(b'{"error":{"message":"no such page"}}', b"404 Not Found")

    def respond(self, body: bytes, status: bytes = b"200 OK") -> None:
        assert self.transport is not None
        self.transport.write(
            b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)
        )

    def end_stream(self) -> None:
        self.stream = None
        self.go_on()


class Stream:
    """An answer in pieces of one token, in the worker's bytes."""

    def __init__(
        self,
        face: HttpFace,
        chat: bool,
        tokens: int,
        orders: Orders,
        headers: dict[bytes, bytes],
        usage: bool,
    ) -> None:
        self.face, self.chat, self.tokens, self.pace, self.usage = face, chat, tokens, orders.pace, usage
        self.comments = headers.get(resume.HEADER.encode()) == b"1"
        sent = headers.get(resume.TOKENS.encode())
        self.resumed = sent is not None
        self.next = sent.count(b",") + 1 if sent else 0
        self.break_at = None if self.resumed else orders.break_at
        if self.resumed:
            face.mock.stats["resumed"] += 1
        id = headers.get(resume.ID.encode())
        self.id = id.decode() if id else face.mock.next_id("chatcmpl" if chat else "cmpl")
        kind = "chat.completion.chunk" if chat else "text_completion"
        fixed = {"id": self.id, "object": kind, "created": CREATED, "model": MODEL}
        self.fixed = fixed
        self.prefix = b"data: " + json.dumps(fixed, separators=(",", ":")).encode()[:-1] + b',"choices":[{"index":0,'
        self.begun = False
        self.role = chat and not self.resumed
        self.timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
            b"x-accel-buffering: no\r\n%btransfer-encoding: chunked\r\n\r\n"
            % (b"x-arriero-resume: 1\r\n" if self.comments else b"")
        )
        self.step()

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
            self.face.mock.running -= 1

    def step(self) -> None:
        self.timer = None
        while self.face.transport is not None:
            if self.next == self.break_at:
                self.face.mock.running -= 1
                self.face.mock.stats["broken"] += 1
                self.face.transport.abort()
                return
            last = self.next >= self.tokens - 1
            data = self.piece(last)
            if last:
                usage = (
                    b"data: %b\n\n" % json.dumps({**self.fixed, "choices": [], "usage": usage_of(self.tokens)}).encode()
                )
                done = (usage if self.usage else b"") + b"data: [DONE]\n\n"
                self.face.mock.running -= 1
                self.write(b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(data), data, len(done), done))
                self.face.end_stream()
                return
            self.write(b"%x\r\n%b\r\n" % (len(data), data))
            if self.pace:
                self.timer = self.face.loop.call_later(self.pace, self.step)
                return

    def piece(self, last: bool) -> bytes:
        out = []
        if self.role:
            self.role = False
            out.append(
                b'%b"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n' % self.prefix
            )
            if self.comments:
                out.append(self.comment(b""))
        if self.next < self.tokens:
            shape = b'"delta":{"content":" t%d"}' if self.chat else b'"text":" t%d"'
            shape = b"%b" + shape + b',"logprobs":null,"finish_reason":%b}]}\n\n'
            out.append(shape % (self.prefix, self.next, b'"length"' if last else b"null"))
            if self.comments:
                out.append(self.comment(b"%d" % self.next))
            self.next += 1
        return b"".join(out)

    def comment(self, tokens: bytes) -> bytes:
        if self.begun:
            return b': arriero {"tokens":[%b]}\n\n' % tokens
        self.begun = True
        return b': arriero {"tokens":[%b],"seed":%d,"id":"%b","created":%d}\n\n' % (
            tokens,
            SEED,
            self.id.encode(),
            CREATED,
        )

    def write(self, data: bytes) -> None:
        assert self.face.transport is not None
        self.face.transport.write(data)


class GrpcFace:
    """`Inference.Generate`: as many messages as tokens, the orders in the prompt's text."""

    def __init__(self, mock: Mock) -> None:
        self.mock = mock
        self.pieces: dict[tuple[int, bool, bool], bytes] = {}

    def handler(self) -> Any:
        methods = {"Generate": grpc.unary_stream_rpc_method_handler(self.generate)}
        return grpc.method_handlers_generic_handler("arriero.inference.v1.Inference", methods)

    async def generate(self, data: bytes, context: Any) -> AsyncIterator[bytes]:
        request = inference_pb2.GenerateRequest.FromString(data)
        found = _TEXT_ORDERS.search(request.text)
        orders = Orders(found[1] if found else "", self.mock.name)
        metadata = dict(context.invocation_metadata())
        ids = metadata.get(resume.HEADER) == "1"
        sent = metadata.get(resume.TOKENS)
        first = sent.count(",") + 1 if sent else 0
        tokens = request.sampling.max_tokens or 16
        self.mock.stats["rpcs"] += 1
        self.mock.hold(grpc_marks(request).marks)
        self.mock.stats["resumed"] += sent is not None
        self.mock.running += 1
        try:
            for index in range(first, tokens):
                if index == orders.break_at and sent is None:
                    self.mock.stats["broken"] += 1
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "broken on request")
                yield self.piece(index, index == tokens - 1, ids)
                if orders.pace:
                    await asyncio.sleep(orders.pace)
        finally:
            self.mock.running -= 1

    def piece(self, index: int, last: bool, ids: bool) -> bytes:
        key = index, last, ids
        data = self.pieces.get(key)
        if data is None:
            message = inference_pb2.GenerateResponse(text=f" t{index}", token_ids=[index] if ids else [])
            if ids and index == 0:
                message.seed = SEED
            if last:
                message.finish_reason = inference_pb2.FINISH_REASON_LENGTH
                message.usage.prompt_tokens, message.usage.completion_tokens = PROMPT_TOKENS, index + 1
            data = self.pieces[key] = message.SerializeToString()
        return data


class Cache(prefixes_pb2_grpc.PrefixesServicer):  # type: ignore[misc]
    """`Prefixes.Watch`: all of it, then the changes."""

    def __init__(self, mock: Mock) -> None:
        self.mock = mock

    async def Watch(
        self, request: prefixes_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[prefixes_pb2.WatchResponse]:
        changes: dict[int, bool] = {}
        self.mock.watchers.append(changes)
        try:
            yield prefixes_pb2.WatchResponse(reset=True, added=list(self.mock.marks), run=self.mock.run)
            while True:
                await asyncio.sleep(_WATCH_EVERY)
                if changes:
                    added = [mark for mark, held in changes.items() if held]
                    removed = [mark for mark, held in changes.items() if not held]
                    changes.clear()
                    yield prefixes_pb2.WatchResponse(added=added, removed=removed, run=self.mock.run)
        finally:
            self.mock.watchers = [other for other in self.mock.watchers if other is not changes]


class Control(worker_pb2_grpc.WorkerServicer):  # type: ignore[misc]
    """`Worker.Status`: always serving."""

    def __init__(self, mock: Mock) -> None:
        self.mock = mock

    async def Status(self, request: worker_pb2.StatusRequest, context: Any) -> AsyncIterator[worker_pb2.StatusResponse]:
        while True:
            yield worker_pb2.StatusResponse(
                phase=worker_pb2.PHASE_SERVING, epoch=1, running=self.mock.running, kv_blocks=1000, run=self.mock.run
            )
            if request.once:
                return
            await asyncio.sleep(_STATUS_EVERY)


async def serve(options: argparse.Namespace) -> None:
    mock = Mock(options.name)
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    servers = []
    if options.grpc_port:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers((GrpcFace(mock).handler(),))
        prefixes_pb2_grpc.add_PrefixesServicer_to_server(Cache(mock), server)
        server.add_insecure_port(f"127.0.0.1:{options.grpc_port}")
        servers.append(server)
    if options.control_port:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        worker_pb2_grpc.add_WorkerServicer_to_server(Control(mock), server)
        server.add_insecure_port(f"127.0.0.1:{options.control_port}")
        servers.append(server)
    for server in servers:
        await server.start()
    http = await loop.create_server(lambda: HttpFace(mock), "127.0.0.1", options.http_port, backlog=1024)
    await stopped.wait()
    http.close()
    for server in servers:
        await server.stop(None)


class MockReplica:
    """A context: the mock as a process of its own, listening on entry."""

    def __init__(
        self, name: str, http_port: int, grpc_port: int = 0, control_port: int = 0, prefix: tuple[str, ...] = ()
    ):
        self.name, self.http_port, self.grpc_port, self.control_port = name, http_port, grpc_port, control_port
        self.url = f"http://127.0.0.1:{http_port}"
        ports = ["--http-port", http_port, "--grpc-port", grpc_port, "--control-port", control_port]
        self.command = [*prefix, sys.executable, "-m", "tests.router.mocks", "--name", name, *map(str, ports)]
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> MockReplica:
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        self.process = subprocess.Popen(self.command, cwd=root)
        limit = time.monotonic() + 30
        while True:
            try:
                self.stats()
                return self
            except OSError:
                assert self.process.poll() is None, f"mock {self.name} ended with {self.process.returncode}"
                assert time.monotonic() < limit, f"mock {self.name} does not listen"
                time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def stats(self) -> dict[str, int]:
        """Requests, streams, resumed, broken, left (by their client), rpcs; running."""
        with urllib.request.urlopen(f"{self.url}/mock/stats", timeout=5) as response:
            result: dict[str, int] = json.load(response)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="mock")
    parser.add_argument("--http-port", type=int, required=True)
    parser.add_argument("--grpc-port", type=int, default=0)
    parser.add_argument("--control-port", type=int, default=0)
    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
