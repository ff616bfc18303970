"""A front over a fake engine, in a thread of its own, so that tests use plain blocking clients on real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from tests.faces.raw import Response, parse_response, read_all
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from arriero_faces.http.server import HttpLimits
from arriero_plan.launch import EngineSettings, Launch, Layout, Pod, Stage
from arriero_worker.front.front import FRONT_LIMITS, Front

from .fake_engine import FakeEngine, Script

T = TypeVar("T")

SPECIAL = ("<|bos|>", "<|eot|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|python_tag|>")
TEMPLATE = """{{- bos_token }}
{%- if tools %}
    {{- '<|system|>' + tools | tojson + '<|eot|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'developer' %}{{ raise_exception('developers are not spoken to here') }}{% endif %}
    {{- '<|' + message.role + '|>' + (message.content or '') | trim }}
    {%- for call in message.tool_calls or [] %}
        {{- call.function.name + call.function.arguments | tojson }}
    {%- endfor %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""
_CORPUS = [
    "the capital of France is Paris",
    "hello world, one two three four five",
    '{"name": "f", "parameters": {}}',
] * 20


def write_model(path: Path) -> None:
    """A model's directory without weights: a byte-level BPE tokenizer, a chat template, generation defaults."""
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    bos = ("<|bos|>", tokenizer.token_to_id("<|bos|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[bos])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "bos_token": "<|bos|>",
        "eos_token": {"__type": "AddedToken", "content": "<|eot|>"},
        "chat_template": TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    eos = tokenizer.token_to_id("<|eot|>")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos], "temperature": 0.0}))


def launch_for(model: Path, run: Path, **changes: Any) -> Launch:
    return Launch(
        deployment="test",
        group="test-0",
        model_path=str(model),
        served_names=("tiny", "org/tiny-alias"),
        layout=Layout(tensor=1, pipeline=1, stages=(Stage(first_layer=0, end_layer=2),)),
        pods=(Pod(host="127.0.0.1", ranks=(0,), http_port=0, grpc_port=0),),
        engine=EngineSettings(dtype="float32", max_context=2048, kv_blocks=100),
        run_directory=str(run),
        bind_address="127.0.0.1",
        **changes,
    )


def script_for(model: Path) -> Script:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    special = frozenset(tokenizer.token_to_id(name) for name in SPECIAL)
    return Script(
        special=special,
        user=tokenizer.token_to_id("<|user|>"),
        eos=tokenizer.token_to_id("<|eot|>"),
        digits=[tokenizer.token_to_id(str(i)) for i in range(10)],
        vocab_size=tokenizer.get_vocab_size(),
    )


class Replica:
    """`with Replica(model, run) as replica`: `engine` and `front` run on `loop`; reach them through `call`."""

    def __init__(self, model: Path, run: Path, limits: HttpLimits = FRONT_LIMITS, **changes: Any) -> None:
        self.launch = launch_for(model, run, **changes)
        self.socket_path = str(run / "engine.sock")
        self.engine: FakeEngine
        self.front: Front
        self._script = script_for(model)
        self._limits = limits
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="replica", daemon=True)

    def __enter__(self) -> Replica:
        self._thread.start()
        assert self._ready.wait(20)
        if self._error is not None:
            raise self._error
        self.wait_for(lambda: self.front.client.status is not None)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._over.set)
        self._thread.join(20)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._live())
        except BaseException as error:
            self._error = error
            self._ready.set()

    async def _live(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self.engine = FakeEngine(self.socket_path, self._script)
        await self.engine.start()
        self.front = Front(self.launch, self.socket_path, self._limits)
        await self.front.start()
        self._ready.set()
        await self._over.wait()
        await self.front.stop()
        await self.engine.die()

    # -- for tests, from their own thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.front.http_port}"

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.front.grpc_port}"

    def call(self, function: Callable[[], Awaitable[T] | T]) -> T:
        """Run on the replica's loop."""

        async def run() -> T:
            result = function()
            return await result if isinstance(result, Awaitable) else result

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(20)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true in time"
            time.sleep(0.002)

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.front.http_port), timeout=20)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def raw(self, data: bytes) -> bytes:
        """Send bytes; everything that comes back until the server closes."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_all(connection)

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Response:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = {"Host": "test", "Connection": "close", **(headers or {})}
        if body is not None:
            lines.setdefault("Content-Type", "application/json")
            lines["Content-Length"] = str(len(data))
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n"
        return parse_response(self.raw(head.encode() + data), method)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Response:
        return self.request("POST", path, body, headers)
