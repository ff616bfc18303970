"""`arriero up FILE`: a LlamaDeployment as processes of this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time
from pathlib import Path

from rich.console import Console

from arriero_cli.errors import CommandError
from arriero_cli.launches import load_local, local_launches, public_ports
from arriero_cli.local import Commands, check_installed
from arriero_cli.router_file import as_yaml, router_config
from arriero_cli.rundir import run_directory
from arriero_cli.running import Running, Started


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "up",
        help="serve a deployment on this machine",
        description="Run a LlamaDeployment as processes of this machine: the router, and behind it spec.replicas "
        "copies of the model, each with one pod for each stage. Every copy takes its own memory, and all ranks share "
        "the cores. What ends is started again. Ctrl-C finishes what runs and leaves; a second Ctrl-C stops at once. "
        "The model must be a directory of this machine (hostPath); a relative path begins at FILE's own directory.",
        epilog="exit status: 0 drained, 1 failed, 2 wrong usage or an invalid file, 130 stopped at once",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a LlamaDeployment in YAML")
    parser.add_argument(
        "--http-port", type=_port, default=8000, metavar="P", help="of the router; default: 8000; 0: any free one"
    )
    parser.add_argument(
        "--grpc-port", type=_port, default=9000, metavar="P", help="of the router; default: 9000; 0: any free one"
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="keep the configurations and logs of all processes here, and a line for each request "
        "(default: a private, temporary directory)",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show all that the processes log")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, commands: Commands | None = None) -> int:
    """Serve until told to leave. `commands` names the programs. Raises CommandError."""
    began = time.monotonic()
    deployment = load_local(args.file)
    check_installed()
    with run_directory(args.run_dir) as directory:
        ports = public_ports(args.http_port, args.grpc_port)
        cores = len(os.sched_getaffinity(0))
        launches = local_launches(deployment, args.file, ports, directory, cores)
        access_log = "off" if args.run_dir is None else "access.log"
        started = Started(
            launches=tuple(launches),
            launch_paths=tuple(Path(launch.run_directory, "launch.json") for launch in launches),
            router_path=directory / "router.yaml",
            http_port=ports[0],
            grpc_port=ports[1],
        )
        _write(started.router_path, as_yaml(router_config(deployment, launches, *ports, access_log)))
        for launch, path in zip(launches, started.launch_paths, strict=True):
            _write(path, launch.model_dump_json(indent=2))
        running = Running(started, Console(), commands or Commands(), verbose=args.verbose, began=began)
        status = asyncio.run(running.run())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all that is left is tidying up
        return status


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{path}: {(error.strerror or str(error)).lower()}") from error


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text} is no port (0 to 65535)")
    return int(text)
