"""The OpenAI API as its official client and plain HTTP see it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tests.faces.raw import events

from .replica import Replica

USER = [{"role": "user", "content": "hi 😀 there"}]


@pytest.fixture
def client(replica: Replica) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{replica.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(replica: Replica, content: str = "hi 😀 there", **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}
    response = replica.post("/v1/chat/completions", body)
    assert response.status == 200, response.body
    return response.json()


def completion(replica: Replica, prompt: Any, **fields: Any) -> dict[str, Any]:
    response = replica.post("/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 100, **fields})
    assert response.status == 200, response.body
    return response.json()


def chunks(replica: Replica, path: str, **fields: Any) -> list[Any]:
    response = replica.post(path, {"model": "tiny", "stream": True, **fields})
    assert response.status == 200, response.body
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events(response.body)


# -- the official client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "org/tiny-alias"]
    assert client.models.retrieve("org/tiny-alias").id == "org/tiny-alias"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="org/tiny-alias", messages=USER)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "hi 😀 there", "stop")
    assert answer.model == "org/tiny-alias"
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens // 2


def test_chat_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="tiny", messages=USER, stream=True, stream_options={"include_usage": True}
    ) as stream:
        pieces = list(stream)
    assert (pieces[0].choices[0].delta.role, pieces[0].choices[0].delta.content) == ("assistant", "")
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces[:-1]) == "hi 😀 there"
    assert [piece.choices[0].finish_reason for piece in pieces[1:-1]] == [None] * (len(pieces) - 3) + ["stop"]
    assert pieces[-1].choices == []
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == 12
    assert len({(piece.id, piece.created) for piece in pieces}) == 1


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="hello world", max_tokens=50)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("hello world", "stop")
    with client.completions.create(model="tiny", prompt="hello world", max_tokens=50, stream=True) as stream:
        assert "".join(piece.choices[0].text for piece in stream) == "hello world"


async def test_async_client(replica: Replica) -> None:
    async with openai.AsyncOpenAI(base_url=f"{replica.url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(model="tiny", messages=USER)
        assert answer.choices[0].message.content == "hi 😀 there"


def test_errors_are_the_clients_own_kinds(client: openai.OpenAI, replica: Replica) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=USER, temperature=-1)
    assert bad.value.param == "temperature"
    replica.engine.refuse = ("queue_full", "the queue is full")
    with pytest.raises(openai.RateLimitError) as full:
        client.chat.completions.create(model="tiny", messages=USER)
    assert full.value.response.headers["retry-after"] == "7"


# -- text


def test_streaming_never_cuts_a_character_and_joins_to_the_whole(replica: Replica) -> None:
    text = "a😀é𝄞漢字👩‍👩‍👧 z"
    for chunk in (1, 2, 3, 7):
        replica.engine.chunk = chunk
        data = chunks(replica, "/v1/completions", prompt=text, max_tokens=100)
        pieces = [event["choices"][0]["text"] for event in data[:-1]]
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_an_answer_cut_inside_a_character_ends_in_a_replacement_character(replica: Replica) -> None:
    whole = completion(replica, "a😀", max_tokens=3)
    assert whole["choices"][0] | {"logprobs": None} == {
        "index": 0,
        "text": "a\ufffd",
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    data = chunks(replica, "/v1/completions", prompt="a😀", max_tokens=3)
    assert [event["choices"][0]["text"] for event in data[:-1]] == ["a", "\ufffd"]


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_stop_strings_end_the_answer_and_are_not_part_of_it(replica: Replica, chunk: int) -> None:
    replica.engine.chunk = chunk
    prompt = "one two three four five"
    for stop, text, reason in [
        ("three", "one two ", "three"),
        (["four", "o t"], "one tw", "o t"),
        ("five six", prompt, None),
        (["e x", " tw"], "one", " tw"),
    ]:
        choice = completion(replica, prompt, stop=stop)["choices"][0]
        assert (choice["text"], choice["stop_reason"], choice["finish_reason"]) == (text, reason, "stop")
        data = chunks(replica, "/v1/completions", prompt=prompt, max_tokens=100, stop=stop)
        pieces = [event["choices"][0]["text"] for event in data[:-1]]
        assert "".join(pieces) == text, "nothing of a stop string was let out"
        assert data[-2]["choices"][0]["stop_reason"] == reason
    included = completion(replica, prompt, stop="three", include_stop_str_in_output=True)
    assert included["choices"][0]["text"] == "one two three"


def test_a_stop_string_is_reported_to_the_engine_and_counts_its_tokens(replica: Replica) -> None:
    replica.call(lambda: replica.engine.aborted.clear())
    answer = completion(replica, "one two three four five" * 20, stop="two", max_tokens=1000)
    replica.wait_for(lambda: not replica.engine.running)
    assert replica.engine.aborted == [replica.engine.submitted[-1].id]
    ids = replica.post("/tokenize", {"prompt": "one two", "add_special_tokens": False}).json()["count"]
    assert answer["usage"]["completion_tokens"] == ids


def test_stop_tokens(replica: Replica) -> None:
    ids = replica.post("/tokenize", {"prompt": "a b c", "add_special_tokens": False}).json()["tokens"]
    choice = completion(replica, "a b c", stop_token_ids=[ids[-1]])["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("a b ", "stop", ids[-1])
    choice = completion(replica, "a b c", stop_token_ids=[ids[-1]], include_stop_str_in_output=True)["choices"][0]
    assert choice["text"] == "a b c"


def test_min_tokens_holds_off_stop_strings_and_the_end_of_text(replica: Replica) -> None:
    choice = completion(replica, "abcabc", stop="b", min_tokens=3)["choices"][0]
    assert choice["text"] == "abca"
    choice = completion(replica, "ab", min_tokens=4)["choices"][0]
    assert choice["text"].startswith("ab")
    assert len(choice["text"]) >= 4


def test_ignore_eos_goes_on_to_max_tokens(replica: Replica) -> None:
    answer = completion(replica, "ab", ignore_eos=True, max_tokens=7)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 7
    assert answer["choices"][0]["text"] == "ababa"
    shown = completion(replica, "ab", ignore_eos=True, max_tokens=4, skip_special_tokens=False)
    assert shown["choices"][0]["text"] == "ab<|eot|>a"


def test_prompts_of_every_kind(replica: Replica) -> None:
    ids = replica.post("/tokenize", {"prompt": "xyz"}).json()["tokens"]
    assert completion(replica, ids)["choices"][0]["text"] == "xyz"
    for prompt in (["one", "two"], [ids, ids]):
        choices = completion(replica, prompt)["choices"]
        assert [choice["index"] for choice in choices] == [0, 1]
        assert [choice["text"] for choice in choices] == (["one", "two"] if prompt[0] == "one" else ["xyz", "xyz"])
    assert completion(replica, "hello world")["usage"]["prompt_tokens"] > 1
    assert completion(replica, "abc", max_tokens=None)["choices"][0]["text"] == "abc"
    submitted = replica.engine.submitted[-1]
    assert submitted.sampling.max_tokens == 16, "OpenAI's default for completions"
    assert submitted.prompt[0] == ids[0], "the beginning of text is added"
    completion(replica, "abc", add_special_tokens=False)
    assert replica.engine.submitted[-1].prompt == submitted.prompt[1:]


def test_echo(replica: Replica) -> None:
    assert completion(replica, "ab ", echo=True)["choices"][0]["text"] == "ab ab "
    data = chunks(replica, "/v1/completions", prompt=["ab", "cd"], echo=True, max_tokens=9)
    texts = ["".join(e["choices"][0]["text"] for e in data[:-1] if e["choices"][0]["index"] == i) for i in (0, 1)]
    assert texts == ["abab", "cdcd"]
    scored = completion(replica, "ab", echo=True, max_tokens=0, logprobs=1)
    assert scored["choices"][0]["text"] == "ab"
    assert scored["choices"][0]["logprobs"]["tokens"] == ["<|bos|>", "a", "b"]
    assert scored["choices"][0]["logprobs"]["token_logprobs"][0] is None
    assert scored["usage"]["completion_tokens"] == 0


def test_chat_continues_the_final_message(replica: Replica) -> None:
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "so far"}]
    fields = {"messages": messages, "continue_final_message": True, "echo": True, "add_generation_prompt": False}
    body = replica.post("/v1/chat/completions", fields).json()
    assert body["choices"][0]["message"]["content"] == "so farab"
    data = chunks(replica, "/v1/chat/completions", **fields)
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in data[:-1]) == "so farab"


# -- several answers, seeds


def test_n_answers_use_their_own_seeds(replica: Replica) -> None:
    choices = completion(replica, "ab", n=3, seed=8, temperature=1)["choices"]
    assert [choice["text"] for choice in choices] == ["8ab", "9ab", "0ab"]
    last = replica.engine.submitted[-3:]
    assert [request.sampling.seed for request in last] == [8, 9, 10]
    two = completion(replica, ["ab", "cd"], n=2, seed=3, temperature=1)["choices"]
    assert [choice["text"] for choice in two] == ["3ab", "4ab", "3cd", "4cd"]
    data = chunks(
        replica,
        "/v1/chat/completions",
        messages=USER,
        n=2,
        seed=4,
        temperature=1,
        stream_options={"include_usage": True},
    )
    texts = ["", ""]
    for event in data[:-2]:
        texts[event["choices"][0]["index"]] += event["choices"][0]["delta"].get("content", "")
    assert texts == ["4hi 😀 there", "5hi 😀 there"]
    assert data[-2]["usage"]["completion_tokens"] == 2 * 13


def test_seeds(replica: Replica) -> None:
    completion(replica, "ab", temperature=1)
    completion(replica, "ab", temperature=1)
    assert len({request.sampling.seed for request in replica.engine.submitted[-2:]}) == 2, "drawn where none is given"
    completion(replica, "ab", seed=-1)
    assert replica.engine.submitted[-1].sampling.seed == 2**64 - 1


def test_sampling_reaches_the_engine_with_the_models_defaults(replica: Replica) -> None:
    fields = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}
    more = {"presence_penalty": 0.5, "frequency_penalty": -0.5, "min_tokens": 2}
    completion(
        replica, "ab", **fields, **more, logit_bias={"5": -100}, priority=-3, cache_salt="s", stop_token_ids=[7, 7]
    )
    request = replica.engine.submitted[-1]
    for name, value in {**fields, **more}.items():
        assert getattr(request.sampling, name) == value
    assert request.sampling.logit_bias == {5: -100.0}
    assert (request.priority, request.cache_salt) == (-3, "s")
    assert request.sampling.stop_token_ids == (replica.engine.script.eos, 7)
    completion(replica, "ab", temperature=1e-9, top_k=-1)
    assert (replica.engine.submitted[-1].sampling.temperature, replica.engine.submitted[-1].sampling.top_k) == (0.0, 0)
    completion(replica, "ab")
    assert replica.engine.submitted[-1].sampling.temperature == 0.0, "generation_config.json's"
    chat(replica, max_completion_tokens=5)
    assert replica.engine.submitted[-1].sampling.max_tokens == 5
    chat(replica)
    request = replica.engine.submitted[-1]
    assert request.sampling.max_tokens == 2048 - len(request.prompt), "a chat may fill the context"
    assert request.prompt.count(request.prompt[0]) == 1, "one beginning of text: the template's"


# -- logprobs


def test_chat_logprobs(replica: Replica) -> None:
    body = chat(replica, "é", logprobs=True, top_logprobs=2)
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content[:2]] == [[0xC3], [0xA9]]
    assert [entry["token"] for entry in content] == ["\ufffd", "\ufffd", "<|eot|>"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert content[0]["top_logprobs"][0]["logprob"] == content[0]["logprob"]
    data = chunks(replica, "/v1/chat/completions", messages=[{"role": "user", "content": "é"}], logprobs=True)
    streamed = [e["choices"][0]["logprobs"] for e in data[:-1]]
    entries = [entry for part in streamed if part for entry in part["content"]]
    assert [entry["bytes"] for entry in entries] == [entry["bytes"] for entry in content]
    assert entries[0]["top_logprobs"] == []


def test_completion_logprobs(replica: Replica) -> None:
    prompt = "one é"
    choice = completion(replica, prompt, logprobs=2, echo=True)["choices"][0]
    columns = choice["logprobs"]
    assert columns["tokens"][:1] == ["<|bos|>"]
    assert columns["token_logprobs"][0] is None
    assert columns["top_logprobs"][0] is None
    assert "bytes:\\xc3" in columns["tokens"]
    assert len({len(column) for column in columns.values()}) == 1
    assert columns["text_offset"] == sorted(columns["text_offset"])
    plain = completion(replica, prompt, logprobs=0)["choices"][0]["logprobs"]
    assert plain["top_logprobs"] is None
    assert plain["text_offset"][0] == 0
    data = chunks(replica, "/v1/completions", prompt=prompt, max_tokens=100, logprobs=0)
    offsets = [o for e in data[:-1] for o in e["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == plain["text_offset"]


def test_prompt_logprobs(replica: Replica) -> None:
    choice = completion(replica, "ab", prompt_logprobs=1)["choices"][0]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    assert [next(iter(entry.values()))["decoded_token"] for entry in rest] == ["a", "b"]
    assert all(next(iter(entry.values()))["rank"] == 1 for entry in rest)
    body = chat(replica, prompt_logprobs=0)
    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]


# -- tools

TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
CALL = '{"name": "f", "parameters": {"city": "Zürich"}}'


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", [CALL, f"{CALL}; {CALL}"])
def test_tool_calls(client: openai.OpenAI, replica: Replica, chunk: int, stream: bool, text: str) -> None:
    replica.engine.chunk = chunk
    arguments: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": text}], "tools": TOOLS}
    if stream:
        pieces = list(client.chat.completions.create(stream=True, **arguments))
        calls = [call for piece in pieces for call in piece.choices[0].delta.tool_calls or []]
        content = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        finish = pieces[-1].choices[0].finish_reason
        assert [call.index for call in calls] == list(range(len(calls)))
    else:
        choice = client.chat.completions.create(**arguments).choices[0]
        calls, content, finish = choice.message.tool_calls or [], choice.message.content or "", choice.finish_reason
    assert (content, finish) == ("", "tool_calls")
    assert len(calls) == text.count("name")
    for call in calls:
        assert (call.type, call.function.name) == ("function", "f")
        assert json.loads(call.function.arguments) == {"city": "Zürich"}
    assert len({call.id for call in calls}) == len(calls)


def test_what_is_no_call_stays_text(replica: Replica) -> None:
    for text in ('{"name": "g", "parameters": {}}', "{broken", "no call"):
        choice = chat(replica, text, tools=TOOLS)["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    choice = chat(replica, CALL, tools=TOOLS, tool_choice="none")["choices"][0]
    assert choice["message"]["content"] == CALL
    assert chat(replica, CALL)["choices"][0]["message"]["content"] == CALL


def test_a_conversation_with_calls_and_results_is_accepted(replica: Replica) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3 degrees", "tool_call_id": "call_1"},
        {"role": "user", "content": "thanks", "name": "someone"},
    ]
    response = replica.post("/v1/chat/completions", {"messages": messages, "tools": TOOLS})
    assert response.json()["choices"][0]["message"]["content"] == "thanks"
    prompt = replica.front.service.tokenizer.decode(replica.engine.submitted[-1].prompt)
    assert 'f{"a": 1}' in prompt
    assert "one\ntwo" in prompt


# -- the rest


def test_request_ids_are_taken_over(replica: Replica) -> None:
    response = replica.post("/v1/completions", {"prompt": "a"}, {"x-request-id": "abc-1"})
    assert response.json()["id"] == "cmpl-abc-1"
    assert response.headers["x-request-id"] == "abc-1"


def test_neutral_values_of_unsupported_fields_are_accepted(replica: Replica) -> None:
    chat(
        replica,
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        modalities=["text"],
        response_format={"type": "text"},
        reasoning_effort=None,
        n=1,
        stream=False,
        logit_bias={},
        tool_choice="none",
    )
    completion(replica, "a", best_of=1, suffix="")


def test_what_other_routers_add_to_requests_is_accepted(replica: Replica) -> None:
    both = {"no_stop_trim": False, "ignore_eos": False, "skip_special_tokens": True, "return_hidden_states": False}
    completion(replica, "a", echo=False, **both)
    thoughts = {"separate_reasoning": True, "stream_reasoning": True, "include_reasoning": True}
    chat(replica, logprobs=False, continue_final_message=False, **both, **thoughts)


def test_tokenize(replica: Replica) -> None:
    body = replica.post("/tokenize", {"model": "tiny", "prompt": "hello 😀", "return_token_strs": True}).json()
    assert body["max_model_len"] == 2048
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["token_strs"][0] == "<|bos|>"
    conversation = replica.post("/tokenize", {"messages": USER}).json()
    chat(replica)
    assert replica.engine.submitted[-1].prompt == conversation["tokens"]


def test_metrics(replica: Replica) -> None:
    chat(replica)
    text = replica.request("GET", "/metrics").body.decode()
    for name in (
        'arriero_requests_total{face="http",model="tiny",route="/v1/chat/completions",status="200"}',
        'arriero_answers_total{finish_reason="stop",model="tiny"}',
        'arriero_time_to_first_token_seconds_bucket{le="0.005",model="tiny"}',
        'arriero_inter_token_seconds_count{model="tiny"}',
        'arriero_request_duration_seconds_sum{model="tiny"}',
        'arriero_requests_running{model="tiny"}',
        'arriero_requests_waiting{model="tiny"}',
        'arriero_kv_usage_ratio{model="tiny"}',
        'arriero_generated_tokens_total{model="tiny"}',
        'arriero_cached_tokens_total{model="tiny"}',
        'arriero_preemptions_total{model="tiny"}',
        'arriero_recoveries_total{model="tiny"}',
        'arriero_ready{model="tiny"} 1.0',
    ):
        assert name in text
