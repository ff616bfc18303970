"""The front as its supervisor starts it, a process of its own, over a fake engine in the test's process."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from .fake_engine import FakeEngine
from .replica import launch_for, script_for


class FrontProcess(NamedTuple):
    front: subprocess.Popen[bytes]
    http_port: int
    grpc_port: int
    engine: FakeEngine
    call: Any
    """Runs a function on the engine's loop."""
    log: Path
    """Everything the process printed."""


@contextmanager
def front_process(model: Path, run: Path, **changes: Any) -> Iterator[FrontProcess]:
    (run / "launch.json").write_text(launch_for(model, run, **changes).model_dump_json())
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def call(function: Any) -> Any:
        async def invoke() -> Any:
            result = function()
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(invoke(), loop).result(20)

    engine = call(lambda: FakeEngine(str(run / "engine.sock"), script_for(model)))
    call(engine.start)
    log = run / "front.log"
    command = [sys.executable, "-m", "arriero_worker.front", "--launch", str(run / "launch.json")]
    with log.open("wb") as output:
        front = subprocess.Popen([*command, "--engine", str(run / "engine.sock")], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while not (match := re.search(r"listening http_port=(\d+) grpc_port=(\d+)", log.read_text())):
            assert front.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        http_port, grpc_port = int(match[1]), int(match[2])
        while httpx.get(f"http://127.0.0.1:{http_port}/health/ready").status_code != 200:
            assert time.monotonic() < deadline
        yield FrontProcess(front, http_port, grpc_port, engine, call, log)
    finally:
        front.kill()
        front.wait()
        call(engine.die)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
