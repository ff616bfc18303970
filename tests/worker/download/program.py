"""Starts `arriero-download` as a process, as a pod would."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 2**20


_started: list[subprocess.Popen[str]] = []


def end_all() -> None:
    """Kill what a test has left running."""
    while _started:
        process = _started.pop()
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@dataclass
class Ended:
    code: int
    out: str
    words: str
    """The termination message."""
    seconds: float


class Program:
    """One way to start it; each call is one process."""

    def __init__(self, source: str, directory: Path, environment: dict[str, str], *arguments: str) -> None:
        nearest = next(parent for parent in directory.parents if parent.is_dir())
        self._log = nearest / f"{directory.name}-termination-log"
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(nearest),
            "PYTHONUNBUFFERED": "1",
            **environment,
        }
        self._command = [sys.executable, "-m", "arriero_worker.download", "--source", source]
        self._command += ["--directory", str(directory), "--termination-log", str(self._log)]
        options = dict(zip(arguments[::2], arguments[1::2], strict=True))
        defaults = {"--control-port": "0", "--patience": "20", "--interval": "0.2", "--connections": "4"}
        for name, value in (defaults | options).items():
            self._command += [name, value]

    def start(self, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        self._log.write_text("")
        process = subprocess.Popen(
            [*prefix, *self._command],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        _started.append(process)
        return process

    def run(self, prefix: tuple[str, ...] = (), timeout: float = 60) -> Ended:
        begun = time.monotonic()
        return self.end(self.start(prefix), begun, timeout)

    def end(self, process: subprocess.Popen[str], begun: float = 0.0, timeout: float = 60) -> Ended:
        try:
            out, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
        ended = Ended(process.returncode, out, self._log.read_text(), time.monotonic() - begun)
        print(f"exit code {ended.code}\n{out}")
        return ended


def checkpoint(seed: int, shards: int = 2, shard_bytes: int = 2 * MIB) -> dict[str, bytes]:
    """Files of a repository: what a served Llama needs, and what it does not."""
    draw = random.Random(seed)
    names = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    files: dict[str, bytes] = {
        "config.json": json.dumps({"architectures": ["LlamaForCausalLM"], "vocab_size": 7}).encode(),
        "generation_config.json": b'{"eos_token_id": 2}',
        "model.safetensors.index.json": json.dumps({"weight_map": {f"layer.{n}": n for n in names}}).encode(),
        "tokenizer.json": draw.randbytes(300_000),
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": "{{ messages }} ü".encode(),
    }
    files |= {name: draw.randbytes(shard_bytes + n) for n, name in enumerate(names)}
    return files


UNNEEDED: dict[str, bytes] = {
    "README.md": b"# A model",
    ".gitattributes": b"*.safetensors lfs",
    "pytorch_model.bin": b"p" * 200_000,
    "consolidated.safetensors": b"c" * 200_000,
    "original/consolidated.00.pth": b"o" * 200_000,
    "original/params.json": b"{}",
    "onnx/model.onnx": b"x",
}


def found(directory: Path) -> dict[str, bytes]:
    """Files under their final names."""
    hidden = directory / ".arriero"
    paths = [path for path in directory.rglob("*") if path.is_file() and hidden not in path.parents]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def until(condition: Callable[[], Any], what: str, seconds: float = 30.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"not in {seconds:g} s: {what}"
        time.sleep(0.01)
