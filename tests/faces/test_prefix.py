"""Marks name prefixes: what two prompts share of the marks is what they share of the text."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.inference.v1 import inference_pb2 as pb
from arriero_faces.prefix import CHUNK, Marked, RoutedFields, chat_marks, grpc_marks, prefix_marks, text_marks


def fields(body: str | dict[str, Any]) -> RoutedFields:
    text = body if isinstance(body, str) else json.dumps(body)
    return msgspec.json.decode(text.encode(), type=RoutedFields)


def shared(a: Marked, b: Marked) -> int:
    """Marks at the front that both have; behind the first that differs, none is equal."""
    count = 0
    for left, right in zip(a.marks, b.marks, strict=False):
        if left != right:
            break
        count += 1
    assert not set(a.marks[count:]) & set(b.marks[count:])
    return count


@given(st.binary(max_size=4 * CHUNK), st.binary(max_size=2 * CHUNK), st.binary(min_size=1, max_size=2 * CHUNK))
def test_prompts_share_the_marks_of_the_whole_chunks_they_share(head: bytes, left: bytes, right: bytes) -> None:
    a, b = head + left, head + right
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    marks_a, marks_b = prefix_marks(b"s", a), prefix_marks(b"s", head, right)
    assert len(marks_a) == len(a) // CHUNK
    assert shared(Marked(marks_a, 0), Marked(marks_b, 0)) == same // CHUNK
    assert all(0 <= mark < 2**64 for mark in marks_a)
    assert not set(marks_a) & set(prefix_marks(b"t", a))


def test_the_fields_are_the_bodys_own_bytes() -> None:
    routed = fields('{"messages" : [ {"role":"user", "content" : "\\u00e9"} ] , "tools":null, "x": [1], "model":"m"}')
    assert bytes(routed.messages) == b'[ {"role":"user", "content" : "\\u00e9"} ]'
    assert routed.model == "m"
    assert bytes(routed.prompt) == b""
    assert routed.chat() == chat_marks(b"", bytes(routed.messages), "")


@pytest.mark.parametrize(
    "body", ['{"messages": [1,}', '{"n": "2"}', "[]", '{"stream": 1}', "", '{"cache_salt": "\\ud800"}']
)
def test_bad_bodies_are_value_errors(body: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - whatever its message
        fields(body)


def turns(count: int, end: str = "") -> list[dict[str, str]]:
    return [{"role": "user", "content": f"turn {i} " + "words " * 60} for i in range(count)] + (
        [{"role": "user", "content": end}] if end else []
    )


def test_a_conversation_that_goes_on_shares_all_but_the_last_chunk() -> None:
    before, after = fields({"messages": turns(5)}).chat(), fields({"messages": turns(9, "end")}).chat()
    assert before.size == len(json.dumps(turns(5)))
    assert shared(before, after) >= len(before.marks) - 1 >= 6


def test_tools_come_before_messages_wherever_they_stand() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "d" * 300}}]
    first, last = fields({"tools": tools, "messages": turns(3)}), fields({"messages": turns(3), "tools": tools})
    assert first.chat() == last.chat()
    none = fields({"messages": turns(3)})
    assert shared(first.chat(), none.chat()) == 0
    assert first.chat().size == none.chat().size + len(json.dumps(tools))
    assert fields({"messages": turns(3), "tools": None}).chat() == none.chat()


def test_salts_and_apis_share_nothing() -> None:
    text = "words " * 100
    plain = fields({"prompt": text}).text()
    assert plain.marks == text_marks(json.dumps(text).encode(), "").marks
    for other in (
        fields({"prompt": text, "cache_salt": "s"}).text(),
        chat_marks(b"", json.dumps(text).encode(), ""),
        grpc_marks(pb.GenerateRequest(text=text)),
    ):
        assert len(other.marks) >= 2
        assert shared(plain, other) == 0


def test_only_a_single_prompt_has_marks() -> None:
    ids = list(range(1000, 1400))
    assert len(fields({"prompt": ids}).text().marks) == len(json.dumps(ids)) // CHUNK
    assert shared(fields({"prompt": ids}).text(), fields({"prompt": [*ids, 7]}).text()) >= 8
    assert len(fields('{"prompt": [ \n 12' + ", 13" * 200 + "]}").text().marks) == 3
    for several in ([ids, ids], ["words " * 100], [ids]):
        assert fields({"prompt": several}).text() == Marked([], len(json.dumps(several)))
    assert fields({}).text() == Marked([], 0)


def test_over_grpc_a_longer_prompt_begins_with_the_marks_of_a_shorter() -> None:
    short, long = list(range(128_000, 128_200)), list(range(128_000, 128_900))
    for ask in (
        lambda ids: pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids)),
        lambda ids: pb.GenerateRequest(text=" ".join(map(str, ids))),
        lambda ids: pb.GenerateRequest(
            conversation=pb.Conversation(
                messages=[pb.ChatMessage(role="user", content=f"turn {id}") for id in ids],
                tools_json=["{}"],
                continue_final_message=len(ids) > 500,
            )
        ),
    ):
        few, many = grpc_marks(ask(short)), grpc_marks(ask(long))
        assert len(few.marks) == few.size // CHUNK >= 3
        assert shared(few, many) == len(few.marks)
        assert many == grpc_marks(pb.GenerateRequest.FromString(ask(long).SerializeToString()))
    assert grpc_marks(pb.GenerateRequest()) == Marked([], 0)
    assert grpc_marks(pb.GenerateRequest(token_ids=pb.TokenIds(ids=short))).size == 4 * len(short)


def test_over_grpc_tools_and_turns_are_told_apart() -> None:
    long = "t" * 300
    as_tool = pb.GenerateRequest(conversation=pb.Conversation(tools_json=[long]))
    as_turn = pb.GenerateRequest(conversation=pb.Conversation(messages=[pb.ChatMessage(content=long)]))
    assert shared(grpc_marks(as_tool), grpc_marks(as_turn)) == 0
    salted = pb.GenerateRequest(conversation=as_turn.conversation, cache_salt="s")
    assert shared(grpc_marks(salted), grpc_marks(as_turn)) == 0
