"""API keys and their limits at both faces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.faces.raw import Response
from tests.router.mocks import PROMPT_TOKENS

from arriero.inference.v1 import inference_pb2 as pb

from .running import MODEL, TEXT, Loop, Running, ask, mocked, prompt, request, send, until
from .test_grpc import Fleet, code, fleet
from .test_http import error

SECRET = {name: f"secret-of-{name}-0123456789" for name in ("plain", "other", "tokens", "requests", "one", "low")}
KEYS: list[dict[str, Any]] = [
    {"name": "plain", "key": SECRET["plain"]},
    {"name": "other", "key": SECRET["other"], "models": ["another-model"]},
    {"name": "tokens", "key": SECRET["tokens"], "tokensPerMinute": 600},
    {"name": "requests", "key": SECRET["requests"], "requestsPerMinute": 2},
    {"name": "one", "key": SECRET["one"], "maxConcurrent": 1},
]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": KEYS}))
    return path


@pytest.fixture
def guarded(loop: Loop, keys: Path) -> Iterator[Running]:
    with mocked(loop, 1, auth={"keysFile": str(keys)}, answerTokens=16) as (router, _):
        yield router


def by(name: str) -> str:
    return f"authorization: Bearer {SECRET[name]}"


def limited(answer: Response) -> dict[str, Any]:
    assert answer.status == 429
    assert int(answer.headers["retry-after"]) >= 1
    fields = error(answer)
    assert fields["code"] == "rate_limit_exceeded"
    return fields


def test_nobody_asks_without_a_key(guarded: Running) -> None:
    for path, body in ((TEXT, prompt()), ("/v1/models", None), (f"/v1/models/{MODEL}", None), ("/tokenize", {})):
        for headers in ((), ("authorization: Bearer wrong",), ("x-api-key: wrong",), ("authorization: Basic x",)):
            answer = ask(guarded.port, path, body, *headers)
            assert answer.status == 401
            assert error(answer)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    assert ask(guarded.port, TEXT, b"{").status == 401, "what is in the body is nobody's business yet"
    assert ask(guarded.port, TEXT, prompt(), by("plain")).status == 200
    assert ask(guarded.port, TEXT, prompt(), f"x-api-key: {SECRET['plain']}").status == 200
    for path in ("/health/live", "/health/ready", "/metrics"):
        assert ask(guarded.port, path).status == 200


def test_a_key_may_use_its_models_alone(guarded: Running) -> None:
    answer = ask(guarded.port, TEXT, prompt(), by("other"))
    assert (answer.status, error(answer)["code"]) == (403, "model_not_allowed")
    assert ask(guarded.port, "/v1/models", None, by("other")).json()["data"] == []
    assert ask(guarded.port, f"/v1/models/{MODEL}", None, by("other")).status == 403
    assert len(ask(guarded.port, "/v1/models", None, by("plain")).json()["data"]) == 1


def test_requests_per_minute(guarded: Running) -> None:
    for _ in range(2):
        assert ask(guarded.port, TEXT, prompt(1), by("requests")).status == 200
    assert "2 requests per minute" in limited(ask(guarded.port, TEXT, prompt(1), by("requests")))["message"]
    assert ask(guarded.port, TEXT, prompt(1), by("plain")).status == 200, "another key is another matter"


def test_tokens_are_counted_as_they_were_used(guarded: Running) -> None:
    """A small estimate lets the first in; what it really used keeps the next one out."""
    assert ask(guarded.port, TEXT, prompt(100), by("tokens")).json()["usage"]["total_tokens"] == PROMPT_TOKENS + 100
    limited(ask(guarded.port, TEXT, prompt(10), by("tokens")))


def test_what_failed_costs_nothing(loop: Loop, keys: Path) -> None:
    with mocked(loop, 1, auth={"keysFile": str(keys)}, replay={"attempts": 0}) as (router, _):
        for _ in range(4):
            assert ask(router.port, TEXT, prompt(300, "break=1"), by("tokens")).status == 502
        assert ask(router.port, TEXT, prompt(1), by("tokens")).status == 200


def test_a_stream_is_counted_by_what_the_client_had(guarded: Running) -> None:
    """Without usage in it: by its tokens, which the resume comments tell."""
    for _ in range(5):
        assert ask(guarded.port, TEXT, prompt(100, stream=True), by("tokens")).status == 200
    limited(ask(guarded.port, TEXT, prompt(150, stream=True), by("tokens")))


def test_requests_at_once(guarded: Running) -> None:
    with send(guarded.port, request(TEXT, prompt(1000, "pace=20000", stream=True), by("one"))) as client:
        client.recv(100)
        assert "1 requests at once" in limited(ask(guarded.port, TEXT, prompt(1), by("one")))["message"]
    guarded.idle()
    assert ask(guarded.port, TEXT, prompt(1), by("one")).status == 200, "the client that left is not counted for ever"


def test_keys_may_change(guarded: Running, keys: Path) -> None:
    keys.write_text(json.dumps({"keys": [*KEYS, {"name": "low", "key": SECRET["low"]}][1:]}))
    until(lambda: ask(guarded.port, TEXT, prompt(1), by("low")).status == 200, "the new key holds")
    assert ask(guarded.port, TEXT, prompt(1), by("plain")).status == 401


def test_the_log_names_the_key_and_never_tells_it(loop: Loop, keys: Path, tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    with mocked(loop, 1, auth={"keysFile": str(keys)}, accessLog={"path": str(path)}) as (router, _):
        assert ask(router.port, TEXT, prompt(1), by("plain")).status == 200
        router.idle()
    assert json.loads(path.read_text())["key"] == "plain"
    assert SECRET["plain"] not in path.read_text()


def test_keys_at_the_grpc_face(loop: Loop, keys: Path) -> None:
    def metadata(name: str) -> tuple[str, str]:
        return ("authorization", f"Bearer {SECRET[name]}")

    def refused(f: Fleet, *given: tuple[str, str]) -> tuple[str, dict[str, str]]:
        status, _, trailing = code(lambda: list(f.generate(100, "", *given)))
        return status, trailing

    with fleet(loop, 1, auth={"keysFile": str(keys)}) as f:
        assert refused(f)[0] == "UNAUTHENTICATED"
        assert refused(f, ("x-api-key", "wrong"))[0] == "UNAUTHENTICATED"
        assert code(lambda: f.stub.Tokenize(pb.TokenizeRequest(), timeout=20))[0] == "UNAUTHENTICATED"
        assert refused(f, metadata("other"))[0] == "PERMISSION_DENIED"
        assert len(list(f.generate(100, "", metadata("tokens")))) == 100
        status, trailing = refused(f, metadata("tokens"))
        assert status == "RESOURCE_EXHAUSTED"
        assert int(trailing["retry-after"]) >= 1
        assert len(list(f.generate(5, "", metadata("plain")))) == 5
        f.router.idle()
