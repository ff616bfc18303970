"""What a stream's bytes become, cut anywhere and arriving in any pieces, without a socket."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from tests.faces.raw import events

from arriero_router.core.replay import Break
from arriero_router.front import relay as relay_module
from arriero_router.front.relay import Progress, Relay, forwarded

SSE = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-arriero-resume", b"1")]
NASTY = 'a\n\n: arriero {"tokens":[99]}\n\ndata: [DONE]\n\n"finish_reason":null data: {"error": 😀'


class Client:
    """Stands in for an Exchange."""

    def __init__(self, blocks: bool = False) -> None:
        self.started = self.finished = False
        self.blocked = blocks
        self.head = b""
        self.got = b""
        self.on_writable: Any = None

    def start_with(self, status: int, lines: bytes, data: bytes, last: bool = False) -> None:
        assert not self.started
        self.started, self.head = True, lines
        self.write(data)
        self.finished = last

    def write(self, data: bytes) -> bool:
        assert self.started
        assert not self.finished
        self.got += data
        return self.blocked

    def finish(self, data: bytes = b"") -> None:
        self.write(data)
        self.finished = True


class Upstream:
    """Stands in for a connection."""

    def __init__(self) -> None:
        self.paused = self.abandoned = False

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def abandon(self) -> None:
        self.abandoned = True


class Worker:
    """A request's events as a worker writes them, from anywhere on: `answers` are lists of (token, text)."""

    def __init__(self, answers: list[list[tuple[int, str]]], usage: bool = True, chat: bool = False) -> None:
        self.answers, self.usage, self.chat = answers, usage, chat

    def event(self, **fields: Any) -> bytes:
        return (
            b"data: "
            + json.dumps({"id": "c-1", "created": 5, **fields}, ensure_ascii=False)
            .encode()
            .replace(b": null", b":null")
            .replace(b'"finish_reason": ', b'"finish_reason":')
            + b"\n\n"
        )

    def choice(self, index: int, text: str, finish: str | None) -> bytes:
        return self.event(choices=[{"index": index, "text": text, "finish_reason": finish}])

    def comment(self, index: int, tokens: list[int], first: bool) -> bytes:
        fields: dict[str, Any] = {"index": index} if len(self.answers) > 1 else {}
        fields["tokens"] = tokens
        if first:
            fields |= {"seed": 11, "id": "c-1", "created": 5, "cached": 3}
        return b": arriero " + json.dumps(fields).encode() + b"\n\n"

    def pieces(self, headers: dict[str, str], comments: bool = True) -> list[bytes]:
        """Events with their comments, [DONE] last. Text and finish are events of their own in a chat."""
        sent = headers.get("x-arriero-resume-tokens")
        groups = sent.split(";") if sent is not None else [""] * len(self.answers)
        at = [len(group.removesuffix("!").split(",")) if group.removesuffix("!") else 0 for group in groups]
        done = [group.endswith("!") for group in groups]
        out: list[bytes] = []
        first = True
        if self.chat and sent is None:
            roles = b"".join(self.choice(index, "", None) for index in range(len(self.answers)))
            out.append(roles + (self.comment(0, [], True) if comments else b""))
            first = False
        while not all(done):
            for index, answer in enumerate(self.answers):
                if done[index]:
                    continue
                tokens, text = [], ""
                if at[index] < len(answer):
                    token, text = answer[at[index]]
                    tokens = [token]
                    at[index] += 1
                over = at[index] == len(answer)
                done[index] = over
                if self.chat and over:
                    data = self.choice(index, text, None) + self.choice(index, "", "stop")
                else:
                    data = self.choice(index, text, "stop" if over else None)
                out.append(data + (self.comment(index, tokens, first) if comments else b""))
                first = False
        last = self.event(choices=[], usage={"completion_tokens": sum(map(len, self.answers))}) if self.usage else b""
        out.append(last + b"data: [DONE]\n\n")
        return out

    def bytes(self, headers: dict[str, str], comments: bool = True) -> bytes:
        return b"".join(self.pieces(headers, comments))


def one(count: int = 4, text: str = " t") -> Worker:
    return Worker([[(100 + i, f"{text}{i}") for i in range(count)]])


CASES = {
    "one answer": one(),
    "texts with the marks in them": Worker([[(1, NASTY), (2, "x"), (3, NASTY)]]),
    "no usage": Worker([[(1, "a"), (2, "b")]], usage=False),
    "several answers, one finished early": Worker([[(1, "a")], [(2, "b"), (3, "c"), (4, "d")], [(5, "e"), (6, "")]]),
    "chat": Worker([[(1, "a"), (2, "b"), (3, "c")]], chat=True),
    "chat with several answers": Worker([[(1, "a"), (2, "b")], [(3, "c")]], chat=True),
}


def feed(relay: Relay, data: bytes, sizes: list[int]) -> None:
    """The bytes in pieces of these sizes; what is left, at once."""
    for size in [*sizes, len(data)]:
        if not data:
            return
        chunk, data = data[:size], data[size:]
        relay.body(chunk)


class Attempt(Relay):
    """A relay that remembers its end."""

    def __init__(self, client: Client, progress: Progress, comments: bool = False) -> None:
        self.how: Break | str | None = "under way"
        self.upstream = Upstream()
        super().__init__(client, self.upstream, progress, "r", comments, lambda: None, self.ended)  # type: ignore[arg-type]

    def ended(self, relay: Relay, how: Break | None) -> None:
        assert relay is self
        assert self.how == "under way", "an attempt ends once"
        self.how = how


def attempt(client: Client, progress: Progress, comments: bool = False) -> Attempt:
    relay = Attempt(client, progress, comments)
    relay.head(200, SSE)
    return relay


@pytest.mark.parametrize("name", CASES)
async def test_a_stream_cut_at_any_byte_goes_on_exactly(name: str) -> None:
    worker = CASES[name]
    answers = len(worker.answers)
    whole, plain = worker.bytes({}), worker.bytes({}, comments=False)
    for cut in range(len(whole)):
        client, progress = Client(), Progress({})
        relay = attempt(client, progress)
        feed(relay, whole[:cut], [])
        relay.broken("cut", False)
        assert relay.how is Break.CUT
        assert plain.startswith(client.got)
        assert progress.steps == sum(b"\n\n" in part for part in whole[:cut].split(b"\n\n: arriero ")[1:])
        again = attempt(client, progress)
        feed(again, worker.bytes(dict(progress.headers(answers))), [])
        again.end()
        assert again.how is None
        assert client.finished
        if answers == 1:
            assert client.got == plain, f"cut at byte {cut}"
        else:
            assert texts(client.got) == texts(plain), f"cut at byte {cut}"


def texts(data: bytes) -> dict[int, tuple[str, list[str]]]:
    """Text and finishes of each answer."""
    found: dict[int, tuple[str, list[str]]] = {}
    for event in events(data):
        for choice in event["choices"] if isinstance(event, dict) else ():
            text, finishes = found.get(choice["index"], ("", []))
            if choice["finish_reason"]:
                finishes = [*finishes, choice["finish_reason"]]
            found[choice["index"]] = (text + choice["text"], finishes)
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
async def test_it_does_not_matter_in_which_pieces_bytes_come(name: str, size: int) -> None:
    worker = CASES[name]
    client = Client()
    relay = attempt(client, Progress({}))
    data = worker.bytes({})
    feed(relay, data, [size] * (len(data) // size))
    relay.end()
    assert relay.how is None
    assert client.got == worker.bytes({}, comments=False)


@pytest.mark.parametrize("name", CASES)
async def test_random_cuts_and_pieces_through_many_replicas(name: str, seed: int, campaign: int) -> None:
    """Every attempt but the last is cut at a random byte; nothing is lost, repeated, or shown before its tokens."""
    rng = random.Random(seed)
    worker = CASES[name]
    plain = worker.bytes({}, comments=False)
    for _ in range(100 * campaign):
        client, progress = Client(), Progress({})
        while not client.finished:
            relay = attempt(client, progress)
            data = worker.bytes(dict(progress.headers(len(worker.answers))))
            data = data[: rng.randrange(len(data) + 200)]
            feed(relay, data, [rng.choice((1, 5, 50, 500)) for _ in range(60)])
            relay.broken("cut", False)
            known = sum(len(ids.removesuffix("!").split(",")) for ids in _groups(progress) if ids.removesuffix("!"))
            assert known == progress.tokens
            assert relay.how is (None if client.finished else Break.CUT)
        assert texts(client.got) == texts(plain)
        assert client.got.count(b'"completion_tokens"') == plain.count(b'"completion_tokens"')
        assert client.got.count(b"[DONE]\n\n") == plain.count(b"[DONE]\n\n")


def _groups(progress: Progress) -> list[str]:
    return dict(progress.headers(1)).get("x-arriero-resume-tokens", "").split(";")


async def test_text_whose_tokens_are_not_known_is_kept_back() -> None:
    client = Client()
    relay = attempt(client, Progress({}))
    pieces = one().pieces({})
    event, _, comment = pieces[0].partition(b": arriero ")
    feed(relay, event, [])
    assert client.got == b""
    feed(relay, b": arriero " + comment[:-1], [])
    assert client.got == b""
    feed(relay, comment[-1:], [])
    assert client.got == event


async def test_a_finished_answer_is_not_asked_for_again() -> None:
    worker = CASES["several answers, one finished early"]
    progress = Progress({})
    relay = attempt(Client(), progress)
    feed(relay, b"".join(worker.pieces({})[:4]), [])
    assert dict(progress.headers(3)) == {
        "x-arriero-resume-tokens": "1!;2,3;5",
        "x-arriero-resume-cached": "3",
        "x-arriero-resume-seed": "11",
        "x-arriero-resume-id": "c-1",
        "x-arriero-resume-created": "5",
    }


async def test_a_finish_behind_other_events_of_its_piece_counts() -> None:
    worker = CASES["chat"]
    progress = Progress({})
    relay = attempt(Client(), progress)
    feed(relay, b"".join(worker.pieces({})[:-1]), [])
    assert dict(progress.headers(1))["x-arriero-resume-tokens"] == "1,2,3!"


async def test_headers_of_the_clients_own_come_first() -> None:
    given = {"x-arriero-resume-tokens": "8, 9 ;7!", "x-arriero-resume-seed": "1", "x-arriero-resume-cached": "6"}
    progress = Progress(given)
    assert dict(progress.headers(0)) == given
    relay = attempt(Client(), progress)
    feed(relay, b'data: {"choices":[]}\n\n: arriero {"tokens":[10],"seed":2,"id":"x"}\n\n', [])
    assert dict(progress.headers(3)) == {
        "x-arriero-resume-tokens": "8, 9,10;7!;",
        "x-arriero-resume-seed": "1",
        "x-arriero-resume-id": "x",
        "x-arriero-resume-cached": "6",
    }


async def test_a_client_that_asks_for_comments_gets_them() -> None:
    client = Client()
    relay = attempt(client, Progress({}), comments=True)
    data = one().bytes({})
    feed(relay, data, [5] * 50)
    relay.end()
    assert client.got == data
    assert client.head.endswith(b"x-arriero-resume: 1\r\n")


async def test_what_follows_the_end_is_not_shown() -> None:
    client = Client()
    relay = attempt(client, Progress({}))
    feed(relay, one().bytes({}), [])
    assert relay.how is None
    got = client.got
    feed(relay, b"data: more\n\n", [])
    relay.broken("reset", False)
    assert client.got == got


async def test_an_end_without_done_is_a_break() -> None:
    client = Client()
    relay = attempt(client, Progress({}))
    feed(relay, b"".join(one().pieces({})[:-1]), [])
    relay.end()
    assert relay.how is Break.CUT
    assert not client.finished


@pytest.mark.parametrize(
    "comment",
    [
        b"{", b"[]", b'{"tokens":[-1]}', b'{"tokens":["x"]}', b'{"tokens":[1],"index":-1}', b'{"index":99999999}',
        b'{"tokens":[1],"id":"a\\r\\nb: c"}', b'{"tokens":[1],"id":""}', b'{"seed":-1}', b'{"tokens":[1.5]}', b"\xff",
    ],
)  # fmt: skip
async def test_a_comment_that_nobody_can_use_ends_the_attempt(comment: bytes) -> None:
    client, progress = Client(), Progress({})
    relay = attempt(client, progress)
    good = one().pieces({})[0]
    feed(relay, good + b'data: {"choices":[]}\n\n: arriero ' + comment + b"\n\n" + b"data: [DONE]\n\n", [])
    assert relay.how is Break.FAILED
    assert relay.upstream.abandoned
    assert client.got == good.partition(b": arriero")[0], "what was known before is shown, and nothing else"
    assert dict(progress.headers(1))["x-arriero-resume-tokens"] == "100"


async def test_a_stream_without_comments_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "MAX_EVENT", 1000)
    client = Client()
    relay = attempt(client, Progress({}))
    feed(relay, b"data: " + b"x" * 2000, [100] * 20)
    assert relay.how is Break.FAILED
    assert client.got == b""


async def test_an_answer_too_large_to_be_kept_is_passed_on_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "MAX_ANSWER", 1000)
    client = Client()
    relay = Attempt(client, Progress({}))
    relay.head(200, [(b"content-type", b"application/json"), (b"content-length", b"2000")])
    feed(relay, b"x" * 900, [])
    assert not client.started, "it could still be replayed"
    feed(relay, b"x" * 1100, [100] * 11)
    relay.end()
    assert relay.how is None
    assert client.got == b"x" * 2000
    assert relay.passed


async def test_a_slow_client_stops_the_replica() -> None:
    client = Client(blocks=True)
    relay = attempt(client, Progress({}))
    upstream = relay.upstream
    feed(relay, one().pieces({})[0], [])
    assert upstream.paused
    client.on_writable()
    assert not upstream.paused
    feed(relay, b"".join(one().pieces({})[1:]), [])
    assert not upstream.paused, "nobody would wake it behind the end"


async def test_only_what_concerns_the_client_is_passed_on_of_a_head() -> None:
    headers = [
        (b"connection", b"close"), (b"content-type", b"text/plain"), (b"x-a", b"1"), (b"transfer-encoding", b"chunked"),
        (b"date", b"then"), (b"x-request-id", b"theirs"), (b"content-length", b"3"), (b"x-arriero-resume", b"1"),
        (b"x-b", b"\xe9"),
    ]  # fmt: skip
    assert forwarded(headers, "mine") == b"content-type: text/plain\r\nx-request-id: mine\r\nx-a: 1\r\nx-b: \xe9\r\n"
