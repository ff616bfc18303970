"""`arriero-router --config FILE`: the router, in one process or several."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from arriero_faces.process import set_process_name, set_up_logging
from arriero_router.config import ConfigError, load_config
from arriero_router.main import EXIT_USAGE, run_router
from arriero_router.observe.siblings import Siblings
from arriero_router.processes import run_processes

log = logging.getLogger("arriero.router")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 drained, 1 failed, 2 wrong usage or an invalid configuration."""
    parser = argparse.ArgumentParser(
        prog="arriero-router",
        description="Balance requests over the replicas of Llama models. SIGTERM drains, a second one stops at once; "
        "SIGHUP reads the configuration again and reopens the access log.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the configuration, YAML: see docs/router.md")
    parser.add_argument("--check", action="store_true", help="only check the configuration")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--process", help=argparse.SUPPRESS)  # I/N, of a process that another one started
    parser.add_argument("--siblings", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    set_process_name("arriero-router")
    set_up_logging(options.log_level)
    try:
        config = load_config(options.config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    if options.check:
        print(f"{options.config} is valid: {len(config.models)} models, {config.workers} processes")
        return 0
    if options.process is not None:
        index, _, count = options.process.partition("/")
        return run_router(options.config, config, Siblings(options.siblings, int(index), int(count)))
    if config.workers == 1:
        return run_router(options.config, config)
    return run_processes(options.config, config.workers, options.log_level)


if __name__ == "__main__":
    sys.exit(main())
