"""A deployment file whose checkpoint is a config.json, programs under a terminal, and a server of OpenAI's API."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 30.0

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
}
DEPLOYMENT = {
    "apiVersion": "serving.arriero.dev/v1alpha1",
    "kind": "LlamaDeployment",
    "metadata": {"name": "small"},
    "spec": {
        "model": {"name": "org/small", "source": {"hostPath": {"path": "checkpoint"}}, "maxContext": 64},
        "parallelism": {"tensor": 2, "pipeline": 2},
        "accelerator": {"type": "cpu"},
        "rollout": {"drainSeconds": 5},
    },
}


@pytest.fixture
def deployment_file(tmp_path: Path) -> Callable[..., Path]:
    """deployment_file(spec__field=value): a valid file in a directory of its own, with fields changed."""

    def write(**changes: Any) -> Path:
        resource = json.loads(json.dumps(DEPLOYMENT))
        for path, value in changes.items():
            *parents, last = path.split("__")
            target = resource
            for parent in parents:
                target = target.setdefault(parent, {})
            target[last] = value
        checkpoint = tmp_path / "checkpoint"
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / "config.json").write_text(json.dumps(CONFIG))
        (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
        file = tmp_path / "small.yaml"
        file.write_text(json.dumps(resource))  # JSON is YAML
        return file

    return write


class Program:
    """A process whose output is read as it comes; with `terminal`, under one of its own."""

    def __init__(self, command: list[str], *, terminal: bool = False, **environment: str) -> None:
        self.output = ""
        env = {"TERM": "xterm", **{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, **environment}
        if terminal:
            self._read_fd, far = pty.openpty()
            self.write_fd = self._read_fd
        else:
            self._read_fd, far = os.pipe()
            self.write_fd = -1
        self.process = subprocess.Popen(
            command,
            stdin=far if terminal else subprocess.DEVNULL,
            stdout=far,
            stderr=far,
            env=env,
            # With a terminal of its own a program gets its Ctrl-C, too.
            preexec_fn=_own_terminal if terminal else None,
        )
        os.close(far)

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_for(self, pattern: str, since: int = 0, patience: float = PATIENCE) -> re.Match[str]:
        """Read until a pattern stands in the output behind `since` characters, for so many seconds at most."""
        deadline = time.monotonic() + patience
        while not (found := re.compile(pattern).search(self.output, since)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.output}"
            if not self._read(patience) and not re.compile(pattern).search(self.output, since):
                raise AssertionError(f"ended with {self.process.wait()} without {pattern!r}: {self.output}")
        return found

    def type(self, text: str) -> None:
        os.write(self.write_fd, text.encode())

    def type_until(self, text: str, pattern: str, since: int = 0) -> None:
        """Type it, and again after a while, until a pattern stands in the output: a signal that comes between the
        prompt and the wait for keys is noticed at the next one only.
        """
        deadline = time.monotonic() + PATIENCE
        while not re.compile(pattern).search(self.output, since):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.output}"
            self.type(text)
            if select.select([self._read_fd], [], [], 0.5)[0]:
                self._read()

    def end(self) -> int:
        """Read to the end; the exit status."""
        while self._read():
            pass
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._read_fd)

    def _read(self, patience: float = PATIENCE) -> bool:
        ready, _, _ = select.select([self._read_fd], [], [], patience)
        assert ready, f"silent for {patience:g} s after {self.output}"
        try:
            data = os.read(self._read_fd, 65536)
        except OSError:  # how a terminal ends
            data = b""
        self.output += data.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(data)


def _own_terminal() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    """start(script or module, *words, terminal=False, **environment) -> Program."""
    programs: list[Program] = []

    def run(what: str | Path, *words: object, terminal: bool = False, **environment: str) -> Program:
        begin = [str(what)] if isinstance(what, Path) else ["-m", what]
        program = Program([sys.executable, *begin, *map(str, words)], terminal=terminal, **environment)
        programs.append(program)
        return program

    yield run
    for program in programs:
        program.close()


class OpenAiServer:
    """Answers like a server of OpenAI's API; a test changes what it answers and looks at what it was asked."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.arrivals: list[float] = []
        self.pieces: Callable[[dict[str, Any]], list[str]] = lambda body: ["Hello", " there"]
        self.status: Callable[[int], int] = lambda number: 200
        """Of the request with this number, from 0."""
        self.before_piece: Callable[[int, int], None] = lambda number, piece: None
        """Called before each piece of an answer: with the request's and the piece's number."""
        self.last_event = "data: [DONE]\n\n"
        self.tokens: list[int] | None = [5, 9, 7, 5]
        self.gone = threading.Event()
        """Set when a client left in the middle of an answer."""
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(200, {"data": [{"id": "org/small"}]})

            def do_POST(self) -> None:
                outer.serve(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, status: int, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, request: object, client_address: object) -> None:
                outer.gone.set()

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def serve(self, handler: Any, body: dict[str, Any]) -> None:
        if handler.path == "/tokenize":
            found = {"tokens": self.tokens} if self.tokens is not None else {"error": {"message": "nothing here"}}
            handler.answer(200 if self.tokens is not None else 404, found)
            return
        with self.lock:
            number = len(self.requests)
            self.requests.append(body)
            self.arrivals.append(time.perf_counter())
            self.busy += 1
            self.busiest = max(self.busy, self.busiest)
        try:
            status = self.status(number)
            if status != 200:
                handler.answer(status, {"error": {"message": f"refused with {status}", "type": "x"}})
                return
            self.stream(handler, body, number)
        finally:
            with self.lock:
                self.busy -= 1

    def stream(self, handler: Any, body: dict[str, Any], number: int) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()

        def send(text: str) -> None:
            data = text.encode()
            handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            handler.wfile.flush()

        pieces = self.pieces(body)
        for index, piece in enumerate(pieces):
            self.before_piece(number, index)
            choice = {"delta": {"content": piece}} if "messages" in body else {"text": piece}
            finish = "stop" if index == len(pieces) - 1 else None
            send(f"data: {json.dumps({'choices': [{'index': 0, **choice, 'finish_reason': finish}]})}\n\n")
        if body.get("stream_options", {}).get("include_usage"):
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
            send(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n")
        if self.last_event:
            send(self.last_event)
            handler.wfile.write(b"0\r\n\r\n")
        else:
            handler.close_connection = True


@pytest.fixture
def server() -> Iterator[OpenAiServer]:
    """A server of OpenAI's API without a model behind it."""
    found = OpenAiServer()
    yield found
    found.close()
