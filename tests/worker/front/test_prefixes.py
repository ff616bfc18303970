"""What routers are told of the prefix cache, and what the engine is told of prompts."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from arriero.inference.v1 import inference_pb2, inference_pb2_grpc, prefixes_pb2_grpc
from arriero.inference.v1 import prefixes_pb2 as pb
from arriero_faces.prefix import CHUNK, Marked, chat_marks, grpc_marks, text_marks
from arriero_worker.engine.messages import PrefixNews
from arriero_worker.front.grpc_prefixes import MESSAGE, responses
from arriero_worker.front.marks import MAX_PENDING, MarkFeed, Watcher, mark_depths

from .replica import Replica

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WORDS = " ".join(f"word{i}" for i in range(200))


class Following:
    """One Watch, and the set as it knows it."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target)
        self._call = prefixes_pb2_grpc.PrefixesStub(self._channel).Watch(pb.WatchRequest(), timeout=60)
        self.held: set[int] = set()
        self.run = ""
        self.messages: list[pb.WatchResponse] = []

    def hear(self) -> pb.WatchResponse:
        message: pb.WatchResponse = next(self._call)
        self.messages.append(message)
        if message.reset:
            assert not message.removed
            self.held.clear()
        else:
            assert message.run == self.run
            assert self.held.isdisjoint(message.added)
            assert self.held.issuperset(message.removed)
        self.run = message.run
        self.held.update(message.added)
        self.held.difference_update(message.removed)
        return message

    def until(self, held: set[int]) -> None:
        while self.held != held:
            self.hear()

    def close(self) -> None:
        self._call.cancel()
        self._channel.close()


@pytest.fixture
def following(fresh: Replica) -> Iterator[Following]:
    watch = Following(fresh.target)
    yield watch
    watch.close()


class TestWatch:
    def test_first_the_whole_set_then_what_changes(self, fresh: Replica, following: Following) -> None:
        first = following.hear()
        assert (first.reset, list(first.added), first.run) == (True, [], "1")
        fresh.call(lambda: fresh.engine.tell_marks({1, 2, 2**64 - 1}, set()))
        following.until({1, 2, 2**64 - 1})
        fresh.call(lambda: fresh.engine.tell_marks({4}, {1}))
        following.until({2, 4, 2**64 - 1})
        assert [message.reset for message in following.messages] == [True, False, False]
        late = Following(fresh.target)
        message = late.hear()
        assert (message.reset, set(message.added)) == (True, {2, 4, 2**64 - 1})
        late.close()
        fresh.wait_for(lambda: fresh.front.client.marks.watchers == 1)

    def test_the_engines_death_empties_the_set_and_its_return_is_another_run(
        self, fresh: Replica, following: Following
    ) -> None:
        fresh.call(lambda: fresh.engine.tell_marks({1, 2}, set()))
        following.until({1, 2})
        fresh.call(fresh.engine.die)
        message = following.hear()
        assert (message.reset, list(message.added), message.run) == (True, [], "")
        fresh.engine.run, fresh.engine.marks = 2, {9}
        fresh.call(fresh.engine.start)
        message = following.hear()
        assert (message.reset, list(message.added), message.run) == (True, [9], "2")

    def test_a_lost_kv_is_a_reset_of_the_same_run(self, fresh: Replica, following: Following) -> None:
        fresh.call(lambda: fresh.engine.tell_marks({1, 2}, set()))
        following.until({1, 2})
        fresh.call(lambda: fresh.engine.tell_marks({5}, set(), reset=True))
        message = following.hear()
        assert (message.reset, list(message.added), message.run) == (True, [5], "1")

    def test_changes_are_folded(self, fresh: Replica, following: Following) -> None:
        following.hear()

        def churn() -> None:
            for mark in range(1000):
                fresh.engine.tell_marks({mark}, {mark - 1} if mark else set())

        fresh.call(churn)
        following.until({999})
        assert len(following.messages) < 50

    def test_a_large_set_comes_in_several_messages(self, fresh: Replica) -> None:
        marks = set(range(5, 5 + 2 * MESSAGE + 1))
        fresh.call(lambda: fresh.engine.tell_marks(marks, set()))
        fresh.wait_for(lambda: len(fresh.front.client.marks.held) == len(marks))
        following = Following(fresh.target)
        following.until(marks)
        assert [message.reset for message in following.messages] == [True, False, False]
        following.close()

    def test_watching_is_no_request_that_a_drain_waits_for(self, fresh: Replica, following: Following) -> None:
        following.hear()
        assert fresh.call(lambda: fresh.front.drain(5.0))
        fresh.call(lambda: fresh.engine.tell_marks({3}, set()))
        following.until({3})

    def test_garbage_is_refused(self, fresh: Replica) -> None:
        with grpc.insecure_channel(fresh.target) as channel:
            call = channel.unary_stream("/arriero.inference.v1.Prefixes/Watch")(b"\xff\xff", timeout=10)
            with pytest.raises(grpc.RpcError, match="not a WatchRequest") as error:
                next(call)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        fresh.wait_for(lambda: fresh.front.client.marks.watchers == 0)


class TestFeed:
    """The set and its followers, without sockets."""

    def take(self, watcher: Watcher, known: set[int]) -> bool:
        """Whether the change was a reset; `known` becomes what the follower knows."""
        change = watcher.take()
        assert not watcher.news.is_set()
        messages = list(responses(change))
        assert all(len(message.added) <= MESSAGE and len(message.removed) <= MESSAGE for message in messages)
        if change.reset:
            known.clear()
        assert known.isdisjoint(change.added)
        assert known.issuperset(change.removed)
        known.update(*(message.added for message in messages))
        known.difference_update(*(message.removed for message in messages))
        return change.reset

    def test_every_follower_ends_with_the_whole_set(self, seed: int) -> None:
        rng = random.Random(seed)
        feed, held = MarkFeed(), set[int]()
        feed.apply(PrefixNews(True, [], [], 7))
        followers: list[tuple[Watcher, set[int], float]] = []
        for turn in range(2000):
            if turn % 100 == 0:
                followers.append((feed.watch(), set(), rng.random()))
            if rng.random() < 0.01:
                held = set(rng.choices(range(50), k=5))
                feed.apply(PrefixNews(True, list(held), [], 7))
            added, removed = set(rng.choices(range(50), k=3)), set(rng.choices(range(50), k=2))
            removed -= added
            feed.apply(PrefixNews(False, list(added), list(removed), 7))
            held = (held - removed) | added
            for watcher, known, pace in followers:
                if rng.random() < pace and watcher.news.is_set():
                    self.take(watcher, known)
                    assert known == held == feed.held
        for watcher, known, _pace in followers:
            if watcher.news.is_set():
                self.take(watcher, known)
            assert known == held
            feed.leave(watcher)
        assert feed.watchers == 0

    def test_one_who_does_not_read_is_bounded(self) -> None:
        feed, known = MarkFeed(), set[int]()
        watcher = feed.watch()
        feed.apply(PrefixNews(True, [], [], 1))
        assert self.take(watcher, known)
        for start in range(0, 10 * MAX_PENDING, 100):
            gone = list(range(start - 100, start)) if start else []
            feed.apply(PrefixNews(False, list(range(start, start + 100)), gone, 1))
            assert len(watcher._added) + len(watcher._removed) <= MAX_PENDING
        assert not self.take(watcher, known), "what came and went again is no news"
        for start in range(0, 3 * MAX_PENDING, 100):
            feed.apply(PrefixNews(False, list(range(start, start + 100)), [], 1))
        assert len(watcher._added) <= 3 * MAX_PENDING
        feed.apply(PrefixNews(False, [], list(range(3 * MAX_PENDING)), 1))
        self.take(watcher, known)
        for start in range(0, 3 * MAX_PENDING, 100):
            feed.apply(PrefixNews(False, list(range(10**9 + start, 10**9 + start + 100)), [], 1))
        self.take(watcher, known)
        feed.apply(PrefixNews(False, [], list(range(10**9, 10**9 + 3 * MAX_PENDING)), 1))
        assert not watcher._removed, "more changes than the set has marks: the set itself is shorter"
        assert self.take(watcher, known)
        assert known == feed.held

    def test_what_was_meant_for_another_connection_is_not_taken(self) -> None:
        feed = MarkFeed()
        feed.apply(PrefixNews(False, [1], [2], 7))
        assert not feed.held
        feed.apply(PrefixNews(True, [3], [], 7))
        feed.apply(PrefixNews(False, [3, 4], [9], 7))
        assert feed.held == {3, 4}

    async def test_a_clear_of_nothing_wakes_nobody(self) -> None:
        feed = MarkFeed()
        watcher = feed.watch()
        watcher.take()
        feed.clear()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(watcher.news.wait(), 0)


class TestDepths:
    def test_depths_follow_the_text_by_proportion(self) -> None:
        assert mark_depths(Marked([1, 2, 3], 4 * CHUNK), 100) == [(25, 1), (50, 2), (75, 3)]
        assert mark_depths(Marked([1, 2], 2 * CHUNK), 9) == [(5, 1), (9, 2)]
        assert mark_depths(Marked([], 100), 50) == []

    def test_a_text_much_longer_than_its_prompt_has_none(self) -> None:
        assert mark_depths(Marked([1, 2, 3], 3 * CHUNK), 12) != []
        assert mark_depths(Marked([1, 2, 3], 3 * CHUNK), 11) == []


class TestRequests:
    """The engine gets the marks that a router computes from the same body."""

    def check(self, replica: Replica, marked: Marked) -> None:
        request = replica.engine.submitted[-1]
        assert len(marked.marks) >= 3
        assert [mark for _depth, mark in request.marks] == marked.marks
        depths = [depth for depth, _mark in request.marks]
        assert depths == sorted(depths)
        assert 0 < depths[0] < depths[-1] <= len(request.prompt)

    def test_chat(self, replica: Replica) -> None:
        messages = [{"role": "user", "content": WORDS}]
        tools: list[Any] = [{"type": "function", "function": {"name": "f"}}]
        body = '{"model": "tiny", "max_tokens":1, "messages" : %s , "cache_salt": "s", "tools": %s}'
        replica.post(CHAT, (body % (json.dumps(messages), json.dumps(tools))).encode())
        self.check(replica, chat_marks(json.dumps(tools).encode(), json.dumps(messages).encode(), "s"))
        replica.post(CHAT, (body % (json.dumps(messages, indent=1), "null")).encode())
        self.check(replica, chat_marks(b"", json.dumps(messages, indent=1).encode(), "s"))

    def test_completions(self, replica: Replica) -> None:
        ids = [7 + i % 200 for i in range(600)]
        for prompt in (WORDS, ids):
            httpx.post(f"{replica.url}{TEXT}", content=json.dumps({"prompt": prompt, "max_tokens": 1}))
            self.check(replica, text_marks(json.dumps(prompt).encode(), ""))
        replica.post(TEXT, {"prompt": [WORDS, WORDS], "max_tokens": 1})
        assert [request.marks for request in replica.engine.submitted[-2:]] == [[], []]

    def test_grpc(self, replica: Replica) -> None:
        conversation = inference_pb2.Conversation(messages=[inference_pb2.ChatMessage(role="user", content=WORDS)])
        sampling = inference_pb2.SamplingParameters(max_tokens=1)
        with grpc.insecure_channel(replica.target) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            for request in (
                inference_pb2.GenerateRequest(text=WORDS, sampling=sampling, cache_salt="s"),
                inference_pb2.GenerateRequest(conversation=conversation, sampling=sampling),
                inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=range(10, 300)), sampling=sampling),
            ):
                list(stub.Generate(request))
                self.check(replica, grpc_marks(request))

    def test_one_of_several_answers_brings_them(self, replica: Replica) -> None:
        replica.post(TEXT, {"prompt": WORDS, "max_tokens": 1, "n": 3})
        assert [bool(request.marks) for request in replica.engine.submitted[-3:]] == [True, False, False]
