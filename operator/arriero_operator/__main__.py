"""`arriero-operator --config FILE`: makes of LlamaDeployments what they ask for."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from arriero_faces.process import set_process_name, set_up_logging
from arriero_operator.main import EXIT_USAGE, run_operator
from arriero_operator.runtime.config import ConfigError, load_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 stopped, 1 failed, 2 wrong usage, an invalid file or no cluster."""
    parser = argparse.ArgumentParser(
        prog="arriero-operator",
        description="Serve LlamaDeployments: in a cluster as its pod's service account, outside as KUBECONFIG says. "
        "Several may run; one leads.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the configuration, YAML: see docs/operator.md")
    parser.add_argument("--host", default="", help="address of health and metrics (all)")
    parser.add_argument("--port", type=int, default=8080, help="port of health and metrics (8080)")
    parser.add_argument("--check", action="store_true", help="only check the configuration")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    options = parser.parse_args(arguments)
    set_process_name("arriero-operator")
    set_up_logging(options.log_level)
    for noisy in ("kopf", "asyncio", "aiohttp"):
        logging.getLogger(noisy).setLevel(logging.DEBUG if options.log_level == "debug" else logging.WARNING)
    try:
        config = load_config(options.config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    if options.check:
        print(f"{options.config} is valid")
        return 0
    return run_operator(config, options.host, options.port)


if __name__ == "__main__":
    sys.exit(main())
