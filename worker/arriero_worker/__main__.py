"""`arriero-worker --launch FILE --pod-index I`: one pod of a group."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from arriero_faces.process import set_up_logging
from arriero_plan.launch import LaunchError, parse_launch
from arriero_worker.rank_entry import engine_socket

_SOCKET_LIMIT = 107  # bytes of a Unix socket's path (unix(7))


def main(arguments: list[str] | None = None) -> int:
    """Run the pod. Exit codes: 0 after a drain, 1 stopped or failed, 2 wrong usage or launch file, 3 the model
    cannot be run.
    """
    parser = argparse.ArgumentParser(prog="arriero-worker", description="Run one pod of an Arriero group.")
    parser.add_argument("--launch", required=True, metavar="FILE", help="the launch file (JSON)")
    parser.add_argument(
        "--pod-index", required=True, type=int, metavar="I", help="which of the launch file's pods this is"
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    options = parser.parse_args(arguments)
    set_up_logging(options.log_level)
    try:
        launch = parse_launch(Path(options.launch).read_text(), options.launch)
        if not 0 <= options.pod_index < len(launch.pods):
            raise LaunchError(
                f"{options.launch}: --pod-index {options.pod_index} is not one of its {len(launch.pods)} pods"
            )
        if len(os.fsencode(engine_socket(launch))) > _SOCKET_LIMIT:
            raise LaunchError(
                f"{options.launch}: run_directory: too long for a Unix socket, {_SOCKET_LIMIT - 12} bytes at most"
            )
        os.makedirs(launch.run_directory, mode=0o700, exist_ok=True)
    except (OSError, LaunchError) as error:
        print(f"arriero-worker: {error}", file=sys.stderr)
        return 2
    # Forks of a process with gRPC's threads are made by the fork server only, which has none.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("OMP_NUM_THREADS", str(launch.engine.threads))
    os.environ.setdefault("ARRIERO_LOG_LEVEL", options.log_level)
    from arriero_worker.pod import Pod

    try:
        return Pod(launch, options.launch, options.pod_index).run()
    except OSError as error:
        logging.getLogger("arriero.pod").error("%s", error)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
