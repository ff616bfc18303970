"""The faces over the real engine and the tiny Llama of examples/: what the fake one cannot show."""

from __future__ import annotations

import json
import random
import re
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
import openai
import pytest
from tests.faces.raw import events
from tests.worker.replica import Replica as RealReplica

from .test_hostile import over_grpc, over_http, streaming_and_gone

CHECKPOINT = Path(__file__).resolve().parents[3] / "examples" / "tiny_llama" / "checkpoint"
LAYERS = json.loads((CHECKPOINT / "config.json").read_text())["num_hidden_layers"]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
REQUESTS = 150


class Ports(NamedTuple):
    http_port: int
    grpc_port: int


@pytest.fixture(scope="module")
def real() -> Iterator[RealReplica]:
    with RealReplica(CHECKPOINT, layers=LAYERS, max_context=1024, kv_blocks=256, max_waiting=64) as replica:
        yield replica


def gauge(real: RealReplica, name: str) -> float:
    match = re.search(rf"^{name}\{{[^}}]*\}} (\S+)$", httpx.get(f"{real.url}/metrics").text, re.MULTILINE)
    assert match, name
    return float(match[1])


def idle(real: RealReplica) -> bool:
    names = ("arriero_requests_running", "arriero_requests_waiting", "arriero_kv_blocks_used")
    return all(gauge(real, name) == 0 for name in names)


def test_the_official_client_streams_what_it_gets_whole(real: RealReplica) -> None:
    messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="none") as client:
        whole = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=60)
        stream = client.chat.completions.create(
            model="tiny", messages=messages, temperature=0, max_tokens=60, stream=True
        )
        text = "".join(piece.choices[0].delta.content or "" for piece in stream)
    assert text == whole.choices[0].message.content
    assert text
    assert "\ufffd" not in text


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 1, "seed": 7},
        {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "seed": 3},
    ],
)
def test_a_resumed_stream_goes_on_where_it_broke(real: RealReplica, fields: dict[str, Any]) -> None:
    body = {"prompt": "What is the capital of Peru? ", "max_tokens": 24, "ignore_eos": True, "stream": True} | fields
    url = f"{real.url}{TEXT}"
    pieces: list[tuple[str, list[int]]] = []
    text = ""
    for event in events(httpx.post(url, json=body, headers={"x-arriero-resume": "1"}, timeout=60).content):
        if isinstance(event, tuple):
            pieces.append((text, json.loads(event[1].removeprefix("arriero "))["tokens"]))
            text = ""
        elif isinstance(event, dict):
            text += event["choices"][0]["text"]
    tokens: list[int] = []
    for cut, (_, more) in enumerate(pieces[:-1], 1):
        tokens += more
        header = {"x-arriero-resume-tokens": ",".join(map(str, tokens))}
        answer = httpx.post(url, json=body | {"stream": False}, headers=header, timeout=60).json()
        assert answer["choices"][0]["text"] == "".join(text for text, _ in pieces[cut:]), (
            f"cut behind token {len(tokens)}"
        )
        assert answer["usage"]["completion_tokens"] == 24


def test_logprobs_agree_with_each_other(real: RealReplica) -> None:
    fields = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 3}
    prompt = "The capital of Japan is"
    answer = httpx.post(f"{real.url}{TEXT}", json={"prompt": prompt, **fields}, timeout=60).json()["choices"][0]
    for chosen, top in zip(answer["logprobs"]["token_logprobs"], answer["logprobs"]["top_logprobs"], strict=True):
        assert chosen == max(top.values()), "greedy takes the most likely token"
    scored = {"prompt": prompt + answer["text"], "echo": True, "max_tokens": 0, "logprobs": 0}
    again = httpx.post(f"{real.url}{TEXT}", json=scored, timeout=60).json()["choices"][0]["logprobs"]
    if again["tokens"][-8:] == answer["logprobs"]["tokens"]:  # else the text tokenizes differently when it is read
        assert again["token_logprobs"][-8:] == pytest.approx(answer["logprobs"]["token_logprobs"], abs=1e-3)


def test_a_client_that_goes_away_frees_its_blocks(real: RealReplica) -> None:
    body = json.dumps({"prompt": "ab", "max_tokens": 900, "ignore_eos": True, "stream": True, "n": 4}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", real.launch.pods[0].http_port)) as connection:
        connection.sendall(head.encode() + body)
        assert connection.recv(100)
    real.until(lambda: idle(real), "blocks to be free")


@pytest.mark.slow
def test_hostile_requests_leave_no_block_behind(real: RealReplica, seed: int, campaign: int) -> None:
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    front: Any = Ports(real.launch.pods[0].http_port, real.launch.pods[0].grpc_port)
    with grpc.insecure_channel(real.grpc_address) as channel:
        for _ in range(REQUESTS * campaign):
            chance = rng.random()
            if chance < 0.80:
                outcomes[over_http(front, rng)] += 1
            elif chance < 0.85:
                outcomes[streaming_and_gone(front, rng)] += 1
            else:
                outcomes[over_grpc(front, rng, channel)] += 1
    real.until(lambda: idle(real), "blocks to be free")
    print(f"{REQUESTS * campaign} requests: {dict(outcomes.most_common())}")
    assert "Traceback" not in real.log.read_text()
    assert gauge(real, "arriero_recoveries_total") == 0
