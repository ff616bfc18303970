"""`arriero up`, with pods that are stub_pod.py. With ARRIERO_STUB_ROUTER, the router is that Python code."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from arriero_cli import main, up
from arriero_cli.local import Commands, router_command

STUB = Path(__file__).with_name("stub_pod.py")


def pod(launch: Path, index: int) -> list[str]:
    return [sys.executable, str(STUB), "--launch", str(launch), "--pod-index", str(index)]


def router(config: Path) -> list[str]:
    code = os.environ.get("ARRIERO_STUB_ROUTER")
    return list(router_command(config)) if code is None else [sys.executable, "-c", code]


args = main.build_parser(["up"]).parse_args(["up", *sys.argv[1:]])
args.run = partial(up.run, commands=Commands(pod, router))
raise SystemExit(main.execute(args))
