"""The resume contract: for every cut point of an answer, what follows is exactly what was missing."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest
from tests.faces.raw import events

from arriero.inference.v1 import inference_pb2 as pb
from arriero.inference.v1 import inference_pb2_grpc

from .replica import Replica

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
ASK = {"x-arriero-resume": "1"}
CALL = '{"name": "f", "parameters": {"a": 1}}'
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def prompt_for(path: str, text: str) -> dict[str, Any]:
    return {"prompt": text} if path == TEXT else {"messages": [{"role": "user", "content": text}]}


def blocks_of(body: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """(bytes, comment) of each piece: all events up to a comment, which vouches for them. The tail has {}."""
    result, pending = [], b""
    for block in body.split(b"\n\n")[:-1]:
        if block.startswith(b": arriero "):
            result.append((pending, json.loads(block[10:])))
            pending = b""
        else:
            pending += block + b"\n\n"
    return [*result, (pending, {})]


CASES = [
    ("plain", "one two three", {}),
    ("utf-8", "a😀é𝄞漢 👩‍👩‍👧!", {}),
    ("stop string", "one two three four five", {"stop": ["hree f"]}),
    ("stop that does not come", "one two three", {"stop": ["three four", "e t!"]}),
    ("stop and tail cut in a character", "ab😀", {"stop": ["b\ufffd\ufffd"], "max_tokens": 4}),
    ("length", "one two three four", {"max_tokens": 4}),
    ("sampled", "one two", {"temperature": 1.0}),
    ("min_tokens", "abcabcabc", {"stop": ["b"], "min_tokens": 4}),
    ("stop token", "a b c", {"stop_token_ids": [66]}),
]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(("name", "text", "fields"), CASES, ids=[case[0] for case in CASES])
def test_every_cut_of_a_stream(replica: Replica, path: str, name: str, text: str, fields: dict[str, Any]) -> None:
    body = (
        prompt_for(path, text) | {"max_tokens": 50, "stream": True, "stream_options": {"include_usage": True}} | fields
    )
    whole = replica.post(path, body, ASK).body
    blocks = blocks_of(whole)
    first = blocks[0][1]
    assert {"seed", "id", "created", "cached"} <= set(first)
    tokens: list[int] = []
    for cut, (_, comment) in enumerate(blocks[:-1], 1):
        assert "index" not in comment
        tokens += comment["tokens"]
        resumed = ASK | {
            "x-arriero-resume-tokens": ",".join(map(str, tokens)),
            "x-arriero-resume-seed": str(first["seed"]),
            "x-arriero-resume-id": first["id"],
            "x-arriero-resume-created": str(first["created"]),
            "x-arriero-resume-cached": str(first["cached"]),
        }
        rest = b"".join(data for data, _ in blocks[cut:])
        if cut == len(blocks) - 1:
            resumed["x-arriero-resume-tokens"] += "!"
        got = blocks_of(replica.post(path, body, resumed).body)
        assert b"".join(data for data, _ in got) == rest, f"cut behind piece {cut}"
        again = [token for _, comment in got for token in comment.get("tokens", [])]
        assert tokens + again == [token for _, comment in blocks for token in comment.get("tokens", [])]
    assert replica.engine.submitted[-1].output == tokens or blocks[-2][1]["tokens"]


@pytest.mark.parametrize("text", ["a😀é b", "one two three four five"])
@pytest.mark.parametrize("stop", [[], ["three f"], ["ree", " tw!"]])
def test_every_token_is_a_cut_point(replica: Replica, text: str, stop: list[str]) -> None:
    body = {"prompt": text, "max_tokens": 50, "stop": stop}
    whole = replica.post(TEXT, body).json()["choices"][0]["text"]
    ids = replica.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]
    produced = [*ids, replica.engine.script.eos]
    before = ""
    for cut in range(len(produced) + 1):
        header = ",".join(map(str, produced[:cut]))
        answer = replica.post(TEXT, body, {"x-arriero-resume-tokens": header}).json()
        rest = answer["choices"][0]["text"]
        assert whole.endswith(rest)
        emitted = whole[: len(whole) - len(rest)]
        assert emitted.startswith(before), "a longer prefix never emits less"
        before = emitted
        assert answer["choices"][0]["finish_reason"] == "stop"
        used = replica.post(TEXT, body).json()["usage"]["completion_tokens"]
        assert answer["usage"]["completion_tokens"] == used, "counted as if nothing had broken"
    assert before == whole


def test_tool_calls_resume_with_the_same_ids(replica: Replica) -> None:
    body = prompt_for(CHAT, CALL) | {"tools": TOOLS, "stream": True}
    whole = replica.post(CHAT, body, ASK).body
    blocks = blocks_of(whole)
    first = blocks[0][1]
    assert len(blocks) == 3, "role; calls and finish; [DONE]"
    headers = ASK | {"x-arriero-resume-id": first["id"], "x-arriero-resume-created": str(first["created"])}
    for cut in range(len(blocks[1][1]["tokens"])):
        tokens = ",".join(map(str, blocks[1][1]["tokens"][:cut]))
        got = blocks_of(replica.post(CHAT, body, headers | {"x-arriero-resume-tokens": tokens}).body)
        assert b"".join(data for data, _ in got) == blocks[1][0] + blocks[2][0]


def test_several_answers_resume_each_from_its_place(replica: Replica) -> None:
    body = {"prompt": ["one two", "ab"], "n": 2, "temperature": 1.0, "max_tokens": 50, "stream": True, "logprobs": 0}
    body |= {"stream_options": {"include_usage": True}}
    data = events(replica.post(TEXT, body, ASK).body)
    comments = [json.loads(event[1].removeprefix("arriero ")) for event in data if isinstance(event, tuple)]
    produced: list[list[int]] = [[], [], [], []]
    for comment in comments:
        produced[comment["index"]] += comment["tokens"]
    texts, offsets = [["", "", "", ""], [[], [], [], []]]
    for event in data:
        if isinstance(event, dict) and event["choices"]:
            choice = event["choices"][0]
            texts[choice["index"]] += choice["text"]
            offsets[choice["index"]] += choice["logprobs"]["text_offset"]
    seed = str(comments[0]["seed"])
    groups = ";".join(
        [",".join(map(str, produced[0][:2])), "", ",".join(map(str, produced[2])) + "!", str(produced[3][0])]
    )
    headers = ASK | {"x-arriero-resume-tokens": groups, "x-arriero-resume-seed": seed}
    resumed = events(replica.post(TEXT, body, headers).body)
    rest, more = [["", "", "", ""], [[], [], [], []]]
    for event in resumed:
        if isinstance(event, dict) and event["choices"]:
            choice = event["choices"][0]
            rest[choice["index"]] += choice["text"]
            more[choice["index"]] += choice["logprobs"]["text_offset"]
    assert rest[1] == texts[1]
    assert rest[2] == ""
    assert texts[0].endswith(rest[0])
    assert texts[3] == texts[3][0] + rest[3]
    assert more[0] == offsets[0][2:]
    assert [event for event in resumed if isinstance(event, dict)][-1]["usage"] | {"prompt_tokens_details": None} == [
        event for event in data if isinstance(event, dict)
    ][-1]["usage"] | {"prompt_tokens_details": None}


def test_an_answer_that_was_all_delivered_owes_only_its_usage(replica: Replica) -> None:
    before = len(replica.engine.submitted)
    body = {"prompt": "ab", "stream": True, "stream_options": {"include_usage": True}}
    data = events(replica.post(TEXT, body, {"x-arriero-resume-tokens": f"65,66,{replica.engine.script.eos}!"}).body)
    assert data[0]["choices"] == []
    assert data[0]["usage"]["completion_tokens"] == 3
    assert data[1:] == ["[DONE]"]
    assert len(replica.engine.submitted) == before, "the engine has nothing to do"


def test_long_answers_fit_into_the_header(replica: Replica) -> None:
    tokens = ",".join(["65"] * 2000)
    assert len(tokens) > 5000
    body = {"prompt": "ab", "ignore_eos": True, "max_tokens": 2004}
    answer = replica.post(TEXT, body, {"x-arriero-resume-tokens": tokens}).json()
    assert answer["usage"]["completion_tokens"] == 2004
    assert replica.engine.submitted[-1].output == [65] * 2000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-arriero-resume", "2"),
        ("x-arriero-resume", "yes"),
        ("x-arriero-resume-tokens", "a"),
        ("x-arriero-resume-tokens", "1,,2"),
        ("x-arriero-resume-tokens", "-1"),
        ("x-arriero-resume-tokens", "1.5"),
        ("x-arriero-resume-tokens", "99999999"),
        ("x-arriero-resume-tokens", "9" * 5000),
        ("x-arriero-resume-tokens", "1;2"),
        ("x-arriero-resume-seed", "-1"),
        ("x-arriero-resume-seed", str(2**64)),
        ("x-arriero-resume-id", "a b"),
        ("x-arriero-resume-id", "a" * 200),
        ("x-arriero-resume-created", "now"),
    ],
)
def test_wrong_headers_are_named(replica: Replica, name: str, value: str) -> None:
    response = replica.post(TEXT, {"prompt": "ab"}, {name: value})
    assert response.status == 400
    assert response.json()["error"]["param"] == name


def test_a_sampled_answer_needs_its_seed(replica: Replica) -> None:
    body = {"prompt": "ab", "temperature": 1.0}
    response = replica.post(TEXT, body, {"x-arriero-resume-tokens": "65"})
    assert response.json()["error"]["param"] == "x-arriero-resume-seed"
    assert replica.post(TEXT, body | {"seed": 3}, {"x-arriero-resume-tokens": "65"}).status == 200


def test_grpc_streams_resume(replica: Replica) -> None:
    request = pb.GenerateRequest(
        text="a😀 one two three", sampling=pb.SamplingParameters(stop=["thr"], temperature=1, max_tokens=60)
    )
    with grpc.insecure_channel(replica.target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        whole = list(stub.Generate(request, metadata=(("x-arriero-resume", "1"),)))
        seed = whole[0].seed
        assert not any(response.HasField("seed") for response in whole[1:])
        tokens: list[int] = []
        for cut, response in enumerate(whole, 1):
            tokens += response.token_ids
            done = "!" if cut == len(whole) else ""
            metadata = (
                ("x-arriero-resume-tokens", ",".join(map(str, tokens)) + done),
                ("x-arriero-resume-seed", str(seed)),
            )
            got = list(stub.Generate(request, metadata=metadata))
            assert "".join(r.text for r in got) == "".join(r.text for r in whole[cut:])
            assert got[-1].usage.completion_tokens == whole[-1].usage.completion_tokens
            assert not any(r.token_ids for r in got), "ids only for those who ask"
