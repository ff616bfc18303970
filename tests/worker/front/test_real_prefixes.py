"""What a real replica tells of its prefix cache is what the next request finds there."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from tests.worker.replica import Replica

from arriero.inference.v1 import prefixes_pb2 as pb
from arriero.inference.v1 import prefixes_pb2_grpc
from arriero_faces.prefix import CHUNK, fields_of
from arriero_worker.front.marks import mark_depths

CHECKPOINT = Path(__file__).resolve().parents[3] / "examples" / "tiny_llama" / "checkpoint"
LAYERS = json.loads((CHECKPOINT / "config.json").read_text())["num_hidden_layers"]
BLOCK, BLOCKS = 16, 96
WORDS = ("mountain", "river", "city", "train", "water", "stone", "bread", "music", "winter", "market", "garden")


class Following(threading.Thread):
    """A Watch that is always read."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.channel = grpc.insecure_channel(address)
        self.held: set[int] = set()
        self.runs: list[str] = []
        self.removed = 0

    def run(self) -> None:
        try:
            for message in prefixes_pb2_grpc.PrefixesStub(self.channel).Watch(pb.WatchRequest()):
                held = set() if message.reset else self.held
                self.held = (held | set(message.added)) - set(message.removed)
                self.removed += len(message.removed)
                if message.run not in self.runs[-1:]:
                    self.runs.append(message.run)
        except (grpc.RpcError, ValueError):  # the channel was closed
            pass


class Talk:
    """Requests to the replica, one at a time, and what they tell."""

    def __init__(self, real: Replica, following: Following) -> None:
        self.real, self.following = real, following

    def ask(self, messages: list[dict[str, str]], **fields: Any) -> tuple[int, int, int]:
        """(prompt tokens that the marks held predict, those found in the cache, all). Returns when its own are told."""
        request = {"messages": messages, "max_tokens": 1, "temperature": 0, **fields}
        body = json.dumps(request).encode()
        marked = fields_of(body).chat()
        known = 0
        while known < len(marked.marks) and marked.marks[known] in self.following.held:
            known += 1
        answer = httpx.post(f"{self.real.url}/v1/chat/completions", content=body, timeout=60).json()
        usage = answer["usage"]
        tokens = usage["prompt_tokens"]
        whole = tokens // BLOCK * BLOCK
        depths = mark_depths(marked, tokens)
        own = {mark for depth, mark in depths if depth <= whole}
        self.real.until(lambda: own <= self.following.held, "the request's marks to be told")
        predicted = depths[known - 1][0] if known else 0
        return predicted, usage["prompt_tokens_details"]["cached_tokens"], tokens


@pytest.fixture(scope="module")
def real() -> Iterator[Replica]:
    with Replica(CHECKPOINT, layers=LAYERS, max_context=1024, kv_blocks=BLOCKS, block_size=BLOCK) as replica:
        yield replica


@pytest.fixture
def talk(real: Replica) -> Iterator[Talk]:
    following = Following(real.grpc_address)
    following.start()
    real.until(lambda: bool(following.runs), "the first message of the watch")
    yield Talk(real, following)
    following.channel.close()
    following.join(20)


def text(rng: random.Random, size: int) -> str:
    words = ""
    while len(words) < size:
        words += rng.choice(WORDS) + " "
    return words


def test_marks_predict_what_the_next_request_finds(talk: Talk, seed: int) -> None:
    """Conversations that go on, more of them than the cache holds; every prediction is compared."""
    rng = random.Random(seed)
    talks: list[list[dict[str, str]]] = [
        [{"role": "system", "content": text(rng, rng.randint(300, 900))}] for _ in range(6)
    ]
    hits = misses = 0
    for _ in range(60):
        messages = rng.choice(talks)
        if len(json.dumps(messages)) > 2200:
            del messages[1:]
        messages.append({"role": "user", "content": text(rng, rng.randint(30, 500))})
        predicted, found, tokens = talk.ask(messages)
        # What lies behind the last whole chunk is in no mark; where a chunk ends in tokens is known by proportion.
        chunk = -(-CHUNK * tokens // len(json.dumps(messages)))
        assert predicted - 3 * BLOCK <= found <= predicted + chunk + 3 * BLOCK, (predicted, found, tokens)
        hits += predicted > 2 * BLOCK
        misses += predicted == 0
        messages.append({"role": "assistant", "content": text(rng, 40)})
    assert hits >= 10
    assert misses >= 5
    assert talk.following.removed > 20


def test_evicted_marks_are_gone_and_salts_are_apart(talk: Talk, seed: int) -> None:
    rng = random.Random(seed + 1)
    messages = [{"role": "user", "content": text(rng, 1200)}]
    assert talk.ask(messages)[1] < 2 * BLOCK
    predicted, found, tokens = talk.ask(messages)
    assert tokens - 2 * BLOCK <= found <= tokens
    assert predicted > tokens / 2
    assert talk.ask(messages, cache_salt="another")[:2] == (0, 0)
    mine = set(fields_of(json.dumps({"messages": messages}).encode()).chat().marks)
    assert mine & talk.following.held
    for _ in range(2 * BLOCKS * BLOCK // tokens):
        talk.ask([{"role": "user", "content": text(rng, 1200)}])
    assert not mine & talk.following.held
    assert talk.ask(messages)[1] < 2 * BLOCK


def test_a_leader_started_again_is_another_run_with_nothing(talk: Talk) -> None:
    messages = [{"role": "user", "content": text(random.Random(5), 1200)}]
    talk.ask(messages)
    before = talk.real.status().run
    assert talk.following.runs == [before] != [""]
    talk.real.kill_rank(0)
    talk.real.until(lambda: len(talk.following.runs) == 3, "the engine to come back")
    assert talk.following.runs[1] == ""
    talk.real.await_ready(epoch=2)
    assert talk.real.status().run == talk.following.runs[2] != before
    assert not talk.following.held
    assert talk.ask(messages)[:2] == (0, 0)
