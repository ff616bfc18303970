"""`arriero up`, with pods that are stub_pod.py."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from arriero_cli import main, up

STUB = Path(__file__).with_name("stub_pod.py")


def command(launch: Path, pod: int) -> list[str]:
    return [sys.executable, str(STUB), "--launch", str(launch), "--pod-index", str(pod)]


args = main.build_parser(["up"]).parse_args(["up", *sys.argv[1:]])
args.run = partial(up.run, command=command)
raise SystemExit(main.execute(args))
