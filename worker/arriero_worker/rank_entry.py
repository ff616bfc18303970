"""Where a rank's process begins, and what it shares with its supervisor. No torch here: the fork server has it, the
supervisor must not.
"""

from __future__ import annotations

import os

from arriero_plan.launch import Launch

_SERVER = os.getpid()
"""In a rank: its fork server, which imported this before it forked."""


def engine_socket(launch: Launch) -> str:
    """The Unix socket between faces and engine."""
    return os.path.join(launch.run_directory, "engine.sock")


def run_rank(launch_path: str, rank: int, memory_path: str) -> None:
    """The life of a rank's process."""
    from arriero_worker.rank import main

    raise SystemExit(main(launch_path, rank, memory_path, _SERVER if os.getpid() != _SERVER else None))
