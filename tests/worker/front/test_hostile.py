"""A random campaign of malformed and hostile requests: each is refused, and afterwards nothing is left of them.

600 by default; `--campaign 17` runs more than 10,000. The seed is printed.
"""

from __future__ import annotations

import json
import random
import re
import socket
import struct
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from tests.faces.raw import events, parse_response, read_all

from arriero.inference.v1 import inference_pb2 as pb
from arriero.inference.v1 import inference_pb2_grpc

from .process import FrontProcess, front_process

REQUESTS = 600
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JUNK = [
    None, True, -1, 0, 10**40, -(10**40), 2**63, 2**64, 1.5, -0.0, 1e308, 5e-324, "", "x", "\x00", "\uffff",
    "😀" * 50, "9" * 400, [], [[]], [[[[]]]], {}, {"": ""}, {"a": {"b": {"c": []}}}, [None], [1, "a"],
    ["a"] * 40, [-1], [1e9],
]  # fmt: skip
RAW_JUNK = [
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"-",
    b"01",
    b"'a'",
    b'"\xff"',
    b'"\\ud800"',
    b"[" * 5000,
    b'"',
    b"9" * 6000,
]
FIELDS = [
    "model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "n", "stop", "presence_penalty", "seed",
    "frequency_penalty", "logit_bias", "response_format", "top_k", "min_p", "repetition_penalty", "min_tokens", "echo",
    "stop_token_ids", "ignore_eos", "prompt_logprobs", "priority", "cache_salt", "user", "metadata", "logprobs",
    "tools", "tool_choice", "best_of", "suffix", "top_logprobs", "chat_template_kwargs", "messages", "prompt",
    "add_special_tokens", "continue_final_message", "max_completion_tokens", "parallel_tool_calls", "nonsense",
    "__class__", "",
]  # fmt: skip
RESUME = ["x-arriero-resume", "x-arriero-resume-tokens", "x-arriero-resume-seed", "x-arriero-resume-id", "x-request-id"]


class Hostile:
    """Writes one attack at a time; `must_refuse` says that an answer other than 4xx would be wrong."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def body(self) -> tuple[str, dict[str, Any]]:
        if self.rng.random() < 0.5:
            return CHAT, {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": 8}
        return TEXT, {"prompt": "one two three", "max_tokens": 8}

    def request(self, path: str, body: bytes, method: str = "POST", *headers: str) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", "Host: x", "Content-Type: application/json", "Connection: close"]
        head = "\r\n".join([*lines, *headers, f"Content-Length: {len(body)}", "", ""])
        return head.encode("utf-8", "surrogatepass") + body

    def random_bytes(self) -> tuple[bytes, bool]:
        return self.rng.randbytes(self.rng.randrange(1, 3000)), True

    def mutated(self) -> tuple[bytes, bool]:
        path, body = self.body()
        data = bytearray(self.request(path, json.dumps(body).encode()))
        for _ in range(self.rng.randrange(1, 6)):
            at = self.rng.randrange(len(data))
            kind = self.rng.randrange(3)
            if kind == 0:
                data[at] = self.rng.randrange(256)
            elif kind == 1:
                del data[at : at + self.rng.randrange(1, 8)]
            else:
                data[at:at] = self.rng.randbytes(self.rng.randrange(1, 8))
        return bytes(data), False

    def wrong_values(self) -> tuple[bytes, bool]:
        path, body = self.body()
        for _ in range(self.rng.randrange(1, 4)):
            body[self.rng.choice(FIELDS)] = self.rng.choice(JUNK)
        return self.request(path, json.dumps(body).encode("utf-8", "surrogatepass")), False

    def wrong_json(self) -> tuple[bytes, bool]:
        path, body = self.body()
        field = json.dumps(self.rng.choice(FIELDS)).encode()
        data = json.dumps(body).encode()[:-1] + b"," + field + b":" + self.rng.choice(RAW_JUNK) + b"}"
        return self.request(path, data), True

    def wrong_messages(self) -> tuple[bytes, bool]:
        message: dict[str, Any] = {"role": "user", "content": "hi"}
        message[self.rng.choice(["role", "content", "tool_calls", "name", "x"])] = self.rng.choice(JUNK)
        return self.request(CHAT, json.dumps({"messages": [message], "max_tokens": 4}).encode()), False

    def deep(self) -> tuple[bytes, bool]:
        depth = self.rng.choice([100, 1000, 100_000])
        opening, closing = self.rng.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")])
        field = self.rng.choice([b"messages", b"prompt", b"chat_template_kwargs", b"suffix", b"tools", b"logit_bias"])
        inner = opening * depth + b"1" + (closing * depth if self.rng.random() < 0.5 else b"")
        return self.request(self.rng.choice([CHAT, TEXT, "/tokenize"]), b'{"' + field + b'":' + inner + b"}"), True

    def framing(self) -> tuple[bytes, bool]:
        head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        tail = self.rng.choice(
            [
                "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                "Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
                "Content-Length: -5\r\n\r\n",
                "Content-Length: 99999999999\r\n\r\n",
                f"Content-Length: {2**64}\r\n\r\n",
                "Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
                "Transfer-Encoding: chunked\r\n\r\n-1\r\n",
                "Transfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n0\r\n\r\n",
                "Transfer-Encoding: identity\r\n\r\n",
                "Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
                "Expect: nothing\r\nContent-Length: 3\r\n\r\nabc",
                "Upgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 3\r\n\r\nabc",
                "Host: y\r\nContent-Length: 0\r\n\r\n",
                "A: b\r\n c\r\n\r\n",
                "A : b\r\n\r\n",
                "\r\n\r\n",
            ]
        )
        return (head + tail).encode(), True

    def heads(self) -> tuple[bytes, bool]:
        kind = self.rng.randrange(3)
        if kind == 0:
            return self.request(TEXT, b"{}", "POST", *[f"H{i}: {i}" for i in range(150)]), True
        if kind == 1:
            return b"GET /" + b"a" * 3_000_000, True
        return self.request(TEXT, b"{}", "POST", "A: " + "b" * 3_000_000), True

    def routes(self) -> tuple[bytes, bool]:
        path = self.rng.choice(
            ["/", "*", "/v1/models/../../etc/passwd", "/v1/models/%00", "/%ff", "/v1//completions", "x"]
        )
        method = self.rng.choice(["GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND"])
        return self.request(path, b"", method), True

    def resume(self) -> tuple[bytes, bool]:
        path, body = self.body()
        values = ["x", "-1", "1,,2", "9" * 500, "1;2;3", "\x01", "1.5", "é", "[1]", "true"]
        line = f"{self.rng.choice(RESUME[:3])}: {self.rng.choice(values)}"
        return self.request(path, json.dumps(body).encode(), "POST", line), True

    def huge(self) -> tuple[bytes, bool]:
        prompt: Any = self.rng.choice(["a" * 300_000, "one two " * 60_000, [65] * 100_000, ["a"] * 3000, [[65]] * 3000])
        return self.request(TEXT, json.dumps({"prompt": prompt}).encode()), True


ATTACKS = [
    Hostile.random_bytes, Hostile.mutated, Hostile.wrong_values, Hostile.wrong_json, Hostile.wrong_messages,
    Hostile.deep, Hostile.framing, Hostile.heads, Hostile.routes, Hostile.resume, Hostile.huge,
]  # fmt: skip
WEIGHTS = [10, 20, 20, 8, 10, 5, 8, 1, 4, 5, 1]


def over_http(front: FrontProcess, rng: random.Random) -> str:
    """One attack; what came of it, for the count."""
    attack = rng.choices(ATTACKS, WEIGHTS)[0]
    data, must_refuse = attack(Hostile(rng))
    manner = rng.random()
    with socket.create_connection(("127.0.0.1", front.http_port), timeout=30) as connection:
        try:
            if manner < 0.10:  # leaves in the middle
                connection.sendall(data[: rng.randrange(len(data))])
                if rng.random() < 0.5:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return "left"
            if manner < 0.15:  # drips
                for byte in data[:60]:
                    connection.sendall(bytes([byte]))
                data = data[60:]
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR) if manner > 0.98 else None
        except (ConnectionError, BrokenPipeError):
            pass  # refused while still talking
        if manner > 0.98:
            return "hung up"
        connection.settimeout(0.3)
        try:
            answer = connection.recv(65536)
        except TimeoutError:
            return "waits for more"  # a head or body that the mutation made longer
        except ConnectionError:
            return "closed"
        connection.settimeout(30)
        answer += read_all(connection) if b"connection: close" in answer else b""
    if not answer:
        return "closed"
    status = parse_response(answer).status
    assert status < 500 or status in (501, 505), (attack.__name__, status, answer[:500], data[:300])
    assert status >= 400 or not must_refuse, (attack.__name__, status, data[:300])
    if status >= 400 and b"HEAD" not in data[:4]:
        assert b'"error":{"message":' in answer, answer[:500]
    return str(status)


def streaming_and_gone(front: FrontProcess, rng: random.Random) -> str:
    """A valid request whose client leaves during the answer."""
    body = {
        "prompt": "ab",
        "max_tokens": 1500,
        "ignore_eos": True,
        "n": rng.randrange(1, 5),
        "stream": rng.random() < 0.7,
    }
    data = Hostile(rng).request(TEXT, json.dumps(body).encode())
    with socket.create_connection(("127.0.0.1", front.http_port), timeout=30) as connection:
        connection.sendall(data)
        if body["stream"]:
            connection.recv(rng.randrange(1, 2000))
    return "gone"


def over_grpc(front: FrontProcess, rng: random.Random, channel: grpc.Channel) -> str:
    kind = rng.randrange(5)
    if kind == 0:  # bytes that are not HTTP/2
        with socket.create_connection(("127.0.0.1", front.grpc_port), timeout=30) as connection:
            preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if rng.random() < 0.5 else b""
            try:
                connection.sendall(preface + rng.randbytes(rng.randrange(1, 2000)))
                connection.settimeout(0.05)
                while connection.recv(4096):
                    pass
            except (TimeoutError, ConnectionError):
                pass
        return "grpc closed"
    if kind == 1:  # messages that are not protobuf
        method = rng.choice(["Generate", "Tokenize", "GetModel", "Nothing"])
        call = channel.unary_stream(f"/arriero.inference.v1.Inference/{method}")
        return _status(lambda: list(call(b"\xff" + rng.randbytes(rng.randrange(100)), timeout=20)), must_fail=True)
    stub = inference_pb2_grpc.InferenceStub(channel)
    number = lambda: rng.choice([0, 1, -1, 1e308, -1e308, float("nan"), float("inf"), 0.5, 1e-300])  # noqa: E731
    whole = lambda: rng.choice([0, 1, 2, 21, 129, 2**31, 2**32 - 1])  # noqa: E731
    request = pb.GenerateRequest(
        text="one two",
        sampling=pb.SamplingParameters(max_tokens=4, temperature=number(), top_p=number(), n=whole(), stop=["\x00"]),
    )
    request.sampling.logit_bias[whole()] = number()
    if kind == 2:
        request.token_ids.ids.extend([whole() for _ in range(5)])
    elif kind == 3:
        request.conversation.messages.add(role=rng.choice(["user", "", "\x00"]), content="x" * rng.choice([1, 100_000]))
    metadata = ((rng.choice(RESUME[:4]), rng.choice(["1", "x", "-1", "1,2", "9" * 300])),)
    if rng.random() < 0.2:
        call = stub.Generate(pb.GenerateRequest(text="ab", sampling=pb.SamplingParameters(ignore_eos=True, n=2)))
        next(iter(call), None)
        call.cancel()
        return "grpc cancelled"
    return _status(lambda: list(stub.Generate(request, metadata=metadata, timeout=20)))


def _status(call: Any, must_fail: bool = False) -> str:
    try:
        call()
        name = "OK"
    except grpc.RpcError as error:
        name = error.code().name  # type: ignore[attr-defined]
    assert name in ("INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED" if must_fail else "OK"), name
    return f"grpc {name}"


def gauge(front: FrontProcess, name: str) -> float:
    text = httpx.get(f"http://127.0.0.1:{front.http_port}/metrics").text
    match = re.search(rf"^{name}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
    assert match, name
    return float(match[1])


def valid(front: FrontProcess) -> None:
    answer = httpx.post(f"http://127.0.0.1:{front.http_port}{TEXT}", json={"prompt": "one two", "stream": True})
    pieces = events(answer.content)
    assert "".join(piece["choices"][0]["text"] for piece in pieces[:-1]) == "one two"


@pytest.mark.slow
def test_hostile_requests(model: Path, tmp_path: Path, seed: int, campaign: int) -> None:
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    with front_process(model, tmp_path) as front, grpc.insecure_channel(f"127.0.0.1:{front.grpc_port}") as channel:
        process = psutil.Process(front.front.pid)
        baseline = 0
        total = REQUESTS * campaign
        for i in range(total):
            if i == min(total // 3, 1000):  # caches and allocator pools are warm by now
                baseline = process.memory_info().rss
            chance = rng.random()
            if chance < 0.80:
                outcomes[over_http(front, rng)] += 1
            elif chance < 0.85:
                outcomes[streaming_and_gone(front, rng)] += 1
            else:
                outcomes[over_grpc(front, rng, channel)] += 1
            assert front.front.poll() is None, front.log.read_text()[-3000:]
            if i % 100 == 0:
                valid(front)
        deadline = time.monotonic() + 30
        while front.engine.running:
            assert time.monotonic() < deadline, f"{len(front.engine.running)} requests were left in the engine"
            time.sleep(0.01)
        while True:
            left = gauge(front, "arriero_http_held_bytes"), gauge(front, "arriero_http_connections")
            if left[0] < 1000 and left[1] == 1:  # those of the request that asks
                break
            assert time.monotonic() < deadline, f"{left} bytes and connections were left in the front"
            time.sleep(0.05)
        valid(front)
        grown = (process.memory_info().rss - baseline) / 2**20
        print(f"{total} requests, {grown:+.1f} MiB: {dict(outcomes.most_common())}")
        assert "Traceback" not in front.log.read_text(), front.log.read_text()[-3000:]
        assert grown < 24, "memory is flat"
        assert sum(count for name, count in outcomes.items() if name.startswith("4")) > total / 4
