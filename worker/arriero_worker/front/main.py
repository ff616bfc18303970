"""The front's process: signals in, exit status out."""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

import uvloop

from arriero_faces.leave import Leave
from arriero_faces.process import EXIT_UNUSABLE, die_with_parent, set_process_name, set_up_logging
from arriero_plan.launch import Launch, LaunchError, parse_launch
from arriero_worker.front.front import Front
from arriero_worker.front.text.vocabulary import TokenizerError

log = logging.getLogger("arriero.front")


def run_front(launch: Launch, socket_path: str) -> int:
    """Serve until told to stop; the process's exit status.

    The first SIGTERM (or SIGINT) drains: not ready at once, running requests may end within `launch.drain_seconds`. A
    second one of the same kind stops now. Either way the status is 0; it is 1 where the faces could not be opened, and
    EXIT_UNUSABLE where the tokenizer cannot be read.
    """
    try:
        front = Front(launch, socket_path)
    except TokenizerError as error:
        log.error("%s", error)
        return EXIT_UNUSABLE
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(front))


async def _serve(front: Front) -> int:
    leave = Leave()
    try:
        await front.start()
    except OSError as error:
        log.error("cannot open the public faces: %s", error)
        await front.stop()
        return 1
    await leave.asked()
    await leave.drain(front.drain(front.launch.drain_seconds))
    await front.stop()
    log.info("stopped")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m arriero_worker.front --launch FILE --engine SOCKET`."""
    parser = argparse.ArgumentParser(prog="arriero-front", description="The public faces of a replica.")
    parser.add_argument("--launch", required=True, type=Path, help="the launch file")
    parser.add_argument("--engine", required=True, help="the engine's Unix socket")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)  # process id of who started this
    options = parser.parse_args(arguments)
    die_with_parent(options.parent)
    set_process_name("arriero-front")
    set_up_logging(options.log_level)
    try:
        launch = parse_launch(options.launch.read_text(encoding="utf-8"), str(options.launch))
    except (OSError, LaunchError) as error:
        log.error("%s", error)
        return 2
    return run_front(launch, options.engine)
