"""What `arriero up` says when it is ready: what runs, and how to ask it something."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arriero_cli.ports import LOOPBACK
from arriero_plan.launch import Launch


def ready_text(launches: Sequence[Launch], seconds: float) -> str:
    """What runs, on one line."""
    layout, pods = launches[0].layout, len(launches[0].pods)
    count = len(launches)
    replicas = f"{count} replicas of " if count > 1 else ""
    return (
        f"\n{launches[0].served_names[0]} is ready after {seconds:.1f} s: {replicas}tensor {layout.tensor} x pipeline "
        f"{layout.pipeline}, {_counted(count * layout.world, 'rank')} in {_counted(count * pods, 'pod')}\n"
    )


def usage_text(launch: Launch, http_port: int, grpc_port: int) -> str:
    """Addresses, and commands to paste; the ports are the router's."""
    name, url = launch.served_names[0], f"http://{LOOPBACK}:{http_port}"
    path: str
    body: dict[str, Any]
    if _has_chat_template(Path(launch.model_path)):
        path, body = "chat/completions", {"messages": [{"role": "user", "content": "What is the capital of Peru?"}]}
    else:
        path, body = "completions", {"prompt": "The capital of Peru is", "max_tokens": 64}
    request = json.dumps({"model": name, "stream": True} | body)
    command = "arriero" if shutil.which("arriero") else os.path.relpath(sys.argv[0])
    return (
        f"  OpenAI HTTP  {url}/v1\n"
        f"  gRPC         {LOOPBACK}:{grpc_port}  (arriero.inference.v1.Inference)\n\n"
        f"  curl -N {url}/v1/{path} -H 'Content-Type: application/json' -d {shlex.quote(request)}\n\n"
        f"  {command} chat --url {url}\n\n"
        "Ctrl-C finishes what runs and leaves.\n"
    )


def _counted(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _has_chat_template(model: Path) -> bool:
    if (model / "chat_template.jinja").exists():
        return True
    try:
        return "chat_template" in json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
