"""Every refusal: the status, the field, the code. One row each."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.faces.raw import events

from arriero_worker.engine.messages import Finish

from .replica import Replica

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = {"role": "user", "content": "hi"}
DEEP = b"[" * 100_000

COMMON: list[tuple[dict[str, Any], str, str | None]] = [
    # fields, param, code
    ({"model": "other"}, "model", "model_not_found"),
    ({"model": 7}, "model", None),
    ({"temprature": 1}, "temprature", "unknown_field"),
    ({"temperature": -0.1}, "temperature", None),
    ({"temperature": 101}, "temperature", None),
    ({"temperature": "1"}, "temperature", None),
    ({"temperature": True}, "temperature", None),
    ({"top_p": 0}, "top_p", None),
    ({"top_p": 1.5}, "top_p", None),
    ({"top_k": -2}, "top_k", None),
    ({"top_k": 1.5}, "top_k", None),
    ({"min_p": -1}, "min_p", None),
    ({"repetition_penalty": 0}, "repetition_penalty", None),
    ({"presence_penalty": 2.5}, "presence_penalty", None),
    ({"frequency_penalty": -2.5}, "frequency_penalty", None),
    ({"n": 0}, "n", None),
    ({"n": 129}, "n", None),
    ({"max_tokens": -1}, "max_tokens", None),
    ({"max_tokens": 10**30}, "max_tokens", None),
    ({"max_tokens": 1.5}, "max_tokens", None),
    ({"max_tokens": 2048}, "max_tokens", "context_length_exceeded"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", None),
    ({"min_tokens": -1}, "min_tokens", None),
    ({"seed": 2**64}, "seed", None),
    ({"seed": 1.5}, "seed", None),
    ({"stop": ""}, "stop", None),
    ({"stop": ["a"] * 33}, "stop", None),
    ({"stop": "a" * 257}, "stop", None),
    ({"stop": [1]}, "stop[0]", None),
    ({"stop_token_ids": [-1]}, "stop_token_ids", None),
    ({"stop_token_ids": [10**6]}, "stop_token_ids", None),
    ({"stop_token_ids": [1] * 1025}, "stop_token_ids", None),
    ({"logit_bias": {"x": 1}}, "logit_bias", None),
    ({"logit_bias": {"1000000": 1}}, "logit_bias", None),
    ({"logit_bias": {"1": 101}}, "logit_bias", None),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", None),
    ({"prompt_logprobs": 21}, "prompt_logprobs", None),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", None),
    ({"priority": 2**31}, "priority", None),
    ({"cache_salt": "s" * 257}, "cache_salt", None),
    ({"stream": "yes"}, "stream", None),
    ({"stream_options": {"include_usage": True}}, "stream_options", None),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_field"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_field"),
    ({"response_format": {}}, "response_format.type", "missing_field"),
    ({"store": True}, "store", "unsupported_field"),
    ({"service_tier": "flex"}, "service_tier", "unsupported_field"),
    ({"return_hidden_states": True}, "return_hidden_states", "unsupported_field"),
    ({"guided_json": {}}, "guided_json", "unknown_field"),
]
ONLY_CHAT: list[tuple[dict[str, Any], str, str | None]] = [
    ({"messages": []}, "messages", None),
    ({"messages": "hi"}, "messages", None),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", None),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_field"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", None),
    ({"messages": [USER, {"role": "user", "content": 7}]}, "messages[1].content", None),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", None),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", None),
    ({"messages": [{"role": "user", "content": "x", "foo": 1}]}, "messages[0].foo", "unknown_field"),
    ({"messages": [{"role": "developer", "content": "x"}]}, "messages", None),
    ({"messages": [USER] * 4097}, "messages", None),
    ({"messages": [{"role": "user", "content": "x" * 3000}]}, "messages", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": "one two " * 50_000}]}, "messages", "context_length_exceeded"),
    (
        {"messages": [USER | {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
        "messages[0].tool_calls",
        None,
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}]},
        "messages[0].tool_calls[0].function.arguments",
        None,
    ),
    ({"max_tokens": 0}, "max_tokens", None),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", None),
    ({"logprobs": 2}, "logprobs", None),
    ({"top_logprobs": 2}, "top_logprobs", None),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", None),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_field"),
    ({"tools": [{"type": "search", "function": {"name": "f"}}]}, "tools[0].type", None),
    ({"tools": [{"type": "function", "function": {"name": "bad name"}}]}, "tools[0].function.name", None),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
        "tools[0].function.strict",
        "unsupported_field",
    ),
    ({"tools": [{"type": "function", "function": {"name": "f"}}] * 129}, "tools", None),
    ({"tool_choice": "required"}, "tool_choice", "unsupported_field"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "unsupported_field"),
    ({"tool_choice": "auto"}, "tool_choice", None),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", None),
    ({"chat_template_kwargs": {"messages": []}}, "messages", None),
    ({"parallel_tool_calls": False}, "parallel_tool_calls", "unsupported_field"),
    ({"functions": [{"name": "f"}]}, "functions", "unsupported_field"),
    ({"modalities": ["audio"]}, "modalities", "unsupported_field"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_field"),
    ({"prompt": "x"}, "prompt", "unknown_field"),
]
ONLY_TEXT: list[tuple[dict[str, Any], str, str | None]] = [
    ({"prompt": None}, "prompt", None),
    ({"prompt": []}, "prompt", None),
    ({"prompt": [[]]}, "prompt", None),
    ({"prompt": ["a", 1]}, "prompt", None),
    ({"prompt": {"a": 1}}, "prompt", None),
    ({"prompt": [1, -1]}, "prompt", None),
    ({"prompt": [10**6]}, "prompt", None),
    ({"prompt": [1.5]}, "prompt[0]", None),
    ({"prompt": [1] * 2048}, "prompt", "context_length_exceeded"),
    ({"prompt": "x" * 100_000}, "prompt", "context_length_exceeded"),
    ({"prompt": ["a"] * 1025}, "prompt", None),
    ({"prompt": ["a"] * 100, "n": 11}, "prompt", None),
    ({"prompt": "", "add_special_tokens": False}, "prompt", None),
    ({"suffix": "x"}, "suffix", "unsupported_field"),
    ({"best_of": 2}, "best_of", "unsupported_field"),
    ({"logprobs": 21}, "logprobs", None),
    ({"logprobs": True}, "logprobs", None),
    ({"max_tokens": 0}, "max_tokens", None),
    ({"echo": True, "logprobs": 1, "stream": True}, "echo", None),
    ({"messages": [USER]}, "messages", "unknown_field"),
]
ROWS = [(path, *row) for path in (CHAT, TEXT) for row in COMMON]
ROWS += [(CHAT, *row) for row in ONLY_CHAT] + [(TEXT, *row) for row in ONLY_TEXT]


@pytest.mark.parametrize(("path", "fields", "param", "code"), ROWS, ids=lambda value: str(value)[:50])
def test_a_bad_field_is_named(
    replica: Replica, path: str, fields: dict[str, Any], param: str, code: str | None
) -> None:
    before = len(replica.engine.submitted)
    base = {"messages": [USER]} if path == CHAT else {"prompt": "hi"}
    response = replica.post(path, base | fields)
    error = response.json()["error"]
    assert response.status == (404 if code == "model_not_found" else 400)
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == ("not_found_error" if code == "model_not_found" else "invalid_request_error")
    assert error["message"]
    assert len(replica.engine.submitted) == before, "nothing reached the engine"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'"x"',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}',
        b'{"prompt": "a"} x',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": ' + DEEP,
        b'{"prompt": ' + DEEP + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "suffix": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a\x00b"}',
        b'{"\\u0000": 1}',
    ],
    ids=lambda body: str(body[:40]),
)
def test_bodies_that_are_not_requests(replica: Replica, body: bytes) -> None:
    response = replica.post(TEXT, body)
    assert response.status == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_an_unknown_field_is_told_its_neighbour(replica: Replica) -> None:
    error = replica.post(TEXT, {"prompt": "a", "temprature": 1}).json()["error"]
    assert error["message"] == "temprature: unknown field; did you mean temperature?"


def test_missing_fields(replica: Replica) -> None:
    assert replica.post(TEXT, {}).json()["error"]["param"] == "prompt"
    assert replica.post(CHAT, {}).json()["error"]["param"] == "messages"
    for body in ({}, {"prompt": "a", "messages": [USER]}):
        assert replica.post("/tokenize", body).json()["error"]["param"] == "prompt"


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/nothing", 404, None),
        ("GET", "/", 404, None),
        ("GET", "/v1/models/other", 404, None),
        ("GET", CHAT, 405, "POST, OPTIONS"),
        ("DELETE", "/v1/models", 405, "GET, HEAD, OPTIONS"),
        ("PUT", "/metrics", 405, "GET, HEAD, OPTIONS"),
        ("OPTIONS", CHAT, 204, "POST, OPTIONS"),
        ("HEAD", "/v1/models", 200, None),
        ("HEAD", "/nothing", 404, None),
        ("GET", "/v1/models/org%2Ftiny-alias", 200, None),
        ("GET", "/health/live?x=1", 200, None),
    ],
)
def test_routes(replica: Replica, method: str, path: str, status: int, allow: str | None) -> None:
    response = replica.request(method, path)
    assert response.status == status
    assert response.headers.get("allow") == allow
    if method in ("HEAD", "OPTIONS"):
        assert response.body == b""
    elif status >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_content_types(replica: Replica) -> None:
    body = json.dumps({"prompt": "a"}).encode()
    assert replica.post(TEXT, body, {"Content-Type": "text/plain"}).status == 415
    assert replica.post(TEXT, body, {"Content-Type": "application/json; charset=utf-8"}).status == 200
    assert replica.post(TEXT, body, {"x-request-id": "a b"}).status == 400


@pytest.mark.parametrize(
    ("refusal", "status", "code", "retry"),
    [
        ("invalid", 400, None, None),
        ("too_long", 400, "context_length_exceeded", None),
        ("queue_full", 429, "queue_full", "7"),
        ("draining", 503, "draining", "1"),
        ("not_ready", 503, "not_ready", "1"),
        ("timeout", 504, "queue_timeout", None),
        ("internal", 500, "engine_error", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_engines_refusals(
    replica: Replica, refusal: Any, status: int, code: str | None, retry: str | None, stream: bool
) -> None:
    replica.engine.refuse = (refusal, "because")
    response = replica.post(CHAT, {"messages": [USER], "stream": stream, "n": 2})
    assert response.status == status
    assert response.json()["error"]["code"] == code
    assert response.json()["error"]["message"] == "because"
    assert response.headers.get("retry-after") == retry
    replica.wait_for(lambda: replica.front.client.running == 0)


def test_a_refused_answer_takes_its_siblings_along(replica: Replica) -> None:
    replica.engine.max_running = 2
    replica.call(replica.engine.hold)
    assert replica.post(CHAT, {"messages": [USER], "n": 3}).status == 429
    replica.wait_for(lambda: not replica.engine.running)


def test_a_run_that_fails_or_times_out(replica: Replica) -> None:
    replica.engine.end = Finish(0, "error", message="the device is on fire")
    response = replica.post(CHAT, {"messages": [USER]})
    assert (response.status, response.json()["error"]["message"]) == (500, "the device is on fire")
    data = events(replica.post(TEXT, {"prompt": "one two three", "stream": True}).body)
    assert data[-2]["error"]["message"] == "the device is on fire"
    assert data[-1] == "<cut>", "no [DONE], and the body is not whole"
    replica.engine.end = Finish(0, "timeout")
    choice = replica.post(CHAT, {"messages": [USER]}).json()["choices"][0]
    assert choice["finish_reason"] == "timeout"


@pytest.mark.parametrize("phase", ["Starting", "Loading", "Warming", "Joining", "Failed", "Draining"])
def test_not_ready(replica: Replica, phase: Any) -> None:
    steps, replica.engine.steps = replica.engine.steps, 0
    replica.call(lambda: replica.engine.set_phase(phase))
    replica.wait_for(lambda: replica.front.service.unready is not None)
    response = replica.post(CHAT, {"messages": [USER]})
    assert (response.status, response.json()["error"]["code"]) == (503, "not_ready")
    assert response.headers["retry-after"] == "1"
    ready = replica.request("GET", "/health/ready")
    assert (ready.status, ready.json()["ready"], ready.json()["phase"]) == (503, False, phase)
    assert phase.lower() in ready.json()["reason"]
    assert replica.request("GET", "/health/live").status == 200
    assert replica.post(CHAT, {"messages": []}).status == 400, "what is wrong stays wrong"
    assert replica.request("GET", "/v1/models").status == 200
    replica.engine.steps = steps


def test_a_group_that_forms_again_takes_requests(replica: Replica) -> None:
    assert replica.post(TEXT, {"prompt": "a"}).status == 200
    replica.call(lambda: replica.engine.set_phase("Joining"))
    replica.wait_for(lambda: replica.front.service.unready is not None)
    assert replica.request("GET", "/health/ready").status == 503
    assert replica.request("GET", "/health").status == 503
    assert replica.post(TEXT, {"prompt": "a"}).status == 200, "clients see a pause, not an error"
