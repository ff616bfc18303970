"""`arriero up FILE`: a LlamaDeployment as processes of this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from arriero_cli.board import Board
from arriero_cli.errors import EXIT_INTERRUPTED, EXIT_USAGE, CommandError
from arriero_cli.local import LocalGroup, PodCommand, PodUnusable, worker_command
from arriero_cli.plan import load_deployment, load_shape, model_directory
from arriero_cli.ports import LOOPBACK, free_ports, is_free
from arriero_cli.rundir import run_directory
from arriero_cli.view import GroupView
from arriero_cli.watch import follow_status, http_ready
from arriero_plan.group import PodAddress, launch_for
from arriero_plan.launch import Launch
from arriero_plan.model import ModelError
from arriero_plan.plan import PlanError, make_plan
from arriero_plan.spec import LlamaDeployment, SpecError

_GLANCE = 0.1  # seconds between looks at what changed
_ONE_WISH = 0.3  # seconds within which two signals are one wish: some starters signal a process and its group
_AFTER_DRAIN = 8.0  # seconds a pod has beyond drainSeconds to end by itself
_PASSED_ON = ("PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD")
_PASSED_ON_PREFIXES = ("LC_", "ARRIERO_", "CUDA_", "NCCL_", "GLOO_")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "up",
        help="serve a deployment on this machine",
        description="Run a LlamaDeployment as processes of this machine, one pod for each stage. Ctrl-C finishes what "
        "runs and leaves; a second Ctrl-C stops at once. The model must be a directory of this machine (hostPath); a "
        "relative path begins at FILE's own directory.",
        epilog="exit status: 0 drained, 1 failed, 2 wrong usage or an invalid file, 130 stopped at once",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a LlamaDeployment in YAML")
    parser.add_argument("--http-port", type=_port, default=8000, metavar="P", help="default: 8000; 0: any free one")
    parser.add_argument("--grpc-port", type=_port, default=9000, metavar="P", help="default: 9000; 0: any free one")
    parser.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="keep the launch file and the pods' logs here (default: a private, temporary one)",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show all that the pods log")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, command: PodCommand = worker_command) -> int:
    """Serve until told to leave. `command` names the pods' program. Raises CommandError."""
    began = time.monotonic()
    deployment = _load(args.file)
    with run_directory(args.run_dir) as directory:
        launch = _launch(deployment, args, directory)
        launch_path = directory / "launch.json"
        launch_path.write_text(launch.model_dump_json(indent=2))
        console = Console()
        up = _Up(launch, launch_path, console, command, verbose=args.verbose, began=began)
        status = asyncio.run(up.run())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all that is left is tidying up
        return status


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text} is no port (0 to 65535)")
    return int(text)


def _load(path: Path) -> LlamaDeployment:
    try:
        deployment = load_deployment(path)
    except SpecError as error:
        raise CommandError(str(error), EXIT_USAGE) from error
    spec = deployment.spec
    problem = ""
    if spec.replicas > 1:
        problem = (
            f"spec.replicas is {spec.replicas}: several local replicas need the router; on one machine set it to 1"
        )
    elif spec.replicas == 0:
        problem = "spec.replicas is 0: there is nothing to start"
    elif spec.model.source.host_path is None:
        problem = "spec.model.source: on one machine the model must be a directory (hostPath)"
    elif spec.accelerator.type != "cpu":
        problem = f"spec.accelerator.type is {spec.accelerator.type}: on one machine set it to cpu"
    if problem:
        raise CommandError(f"{path}: {problem}", EXIT_USAGE)
    return deployment


def _launch(deployment: LlamaDeployment, args: argparse.Namespace, directory: Path) -> Launch:
    """The launch file's content: every pod on the loopback address, the public ports with the leader."""
    try:
        plan = make_plan(deployment, load_shape(deployment, args.file.parent))
        public = _public_ports(args.http_port, args.grpc_port)
        private = free_ports(2 * plan.pods_per_group, public)
        model = model_directory(deployment, args.file.parent)
        assert model is not None
        return launch_for(
            deployment,
            plan,
            f"{deployment.metadata.name}-0",
            [
                PodAddress(LOOPBACK, control, store, *(public if pod == 0 else (0, 0)))
                for pod, (control, store) in enumerate(zip(private[::2], private[1::2], strict=True))
            ],
            model_path=str(model.resolve()),
            run_directory=str(directory),
            threads=max(1, len(os.sched_getaffinity(0)) // plan.world),
            bind_address=LOOPBACK,
        )
    except ModelError as error:
        raise CommandError(str(error), EXIT_USAGE) from error
    except PlanError as error:
        raise CommandError(f"{args.file}: {error}") from error
    except OSError as error:
        raise CommandError(str(error)) from error


def _public_ports(http: int, grpc: int) -> tuple[int, int]:
    if http and http == grpc:
        raise CommandError(f"--http-port and --grpc-port are both {http}", EXIT_USAGE)
    for port, option in ((http, "--http-port"), (grpc, "--grpc-port")):
        if port and not is_free(port):
            raise CommandError(f"port {port} is in use: choose another one with {option}, or 0 for any free one")
    spare = free_ports(2, (http, grpc))
    return http or spare[0], grpc or spare[1]


def pod_environment(launch: Launch, own: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of a pod: what a process needs of `own`, and what the launch says."""
    passed = {name: value for name, value in own.items() if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)}
    cache = Path(own.get("XDG_CACHE_HOME") or Path(own.get("HOME") or "/") / ".cache") / "arriero"
    threads = str(launch.engine.threads)
    return passed | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "NUMBA_NUM_THREADS": threads,
        "NUMBA_CACHE_DIR": str(cache / "numba"),
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


class _Up:
    """One run, from the first process to the last."""

    def __init__(
        self, launch: Launch, launch_path: Path, console: Console, command: PodCommand, *, verbose: bool, began: float
    ) -> None:
        self._launch, self._began = launch, began
        self._view = GroupView(launch)
        self._board = Board(self._view, console, verbose=verbose)
        self._group = LocalGroup(launch, launch_path, pod_environment(launch, os.environ), command, self._board)
        self._base_url = f"http://{LOOPBACK}:{launch.pods[0].http_port}"
        self._leaving, self._stopping = asyncio.Event(), asyncio.Event()
        self._was_ready = False
        self._asked = 0.0

    async def run(self) -> int:
        """Returns the exit status; nothing runs any more then. Raises CommandError."""
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(signum, self._on_signal)
        self._board.open()
        keeping = asyncio.ensure_future(self._group.keep())
        watching = asyncio.gather(
            self._show(),
            self._announce(),
            *(follow_status(pod, partial(self._view.told, index)) for index, pod in enumerate(self._launch.pods)),
        )
        asked = asyncio.ensure_future(self._leaving.wait())
        try:
            done, _ = await asyncio.wait((keeping, watching, asked), return_when=asyncio.FIRST_COMPLETED)
            for task in done - {asked}:
                task.result()  # neither ends by itself: this raises
            return await self._drain(keeping)
        except PodUnusable as error:
            reason = self._view.reason or error.last_words or f"exit code {error.code}"
            raise CommandError(f"pod {error.pod} cannot run: {reason}") from error
        finally:
            self._board.close()
            self._group.kill()
            for task in (keeping, watching, asked):
                task.cancel()
            await asyncio.gather(keeping, watching, asked, return_exceptions=True)

    def _on_signal(self) -> None:
        now = time.monotonic()
        if not self._leaving.is_set():
            self._asked = now
            self._leaving.set()
        elif now - self._asked > _ONE_WISH:
            self._stopping.set()

    async def _drain(self, keeping: asyncio.Future[None]) -> int:
        self._board.close()
        if not self._was_ready:
            return 0  # nothing can be running
        limit = self._launch.drain_seconds
        self._board.say(f"draining, for at most {limit:g} s; Ctrl-C again stops at once")
        self._group.leave()
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait((keeping, stopping), timeout=limit + _AFTER_DRAIN, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if keeping.done():
            keeping.result()
            self._board.say("drained")
            return 0
        if self._stopping.is_set():
            return EXIT_INTERRUPTED
        late = ", ".join(map(str, self._group.alive))
        raise CommandError(f"pod {late} was still there {limit + _AFTER_DRAIN:g} s after being asked to drain: killed")

    async def _show(self) -> None:
        requests = 0
        while True:
            if not self._leaving.is_set():
                self._board.refresh()
            elif requests != self._view.requests:
                requests = self._view.requests
                self._board.say(f"draining: {requests} requests left")
            await asyncio.sleep(_GLANCE)

    async def _announce(self) -> None:
        """Say when the replica takes requests, the first time with how to send one."""
        since, ready = self._began, False
        leader = self._launch.pods[0]
        while True:
            if ready and not (self._view.serving or self._leaving.is_set()):
                since, ready = time.monotonic(), False
            elif not ready and self._view.serving and await http_ready(leader.host, leader.http_port):
                ready = True
                self._board.close()
                self._say_ready(time.monotonic() - since)
            await asyncio.sleep(_GLANCE)

    def _say_ready(self, seconds: float) -> None:
        if self._was_ready:
            self._board.say(f"serving again after {seconds:.1f} s", "green")
            return
        self._was_ready = True
        self._board.say(self._ready_text(seconds), "bold")
        self._board.say(self._usage_text())

    def _ready_text(self, seconds: float) -> str:
        layout = self._launch.layout
        return (
            f"\n{self._launch.served_names[0]} is ready after {seconds:.1f} s: tensor {layout.tensor} x pipeline "
            f"{layout.pipeline}, {layout.world} ranks in {len(self._launch.pods)} pods\n"
        )

    def _usage_text(self) -> str:
        name = self._launch.served_names[0]
        path: str
        body: dict[str, Any]
        if _has_chat_template(Path(self._launch.model_path)):
            path, body = "chat/completions", {"messages": [{"role": "user", "content": "What is the capital of Peru?"}]}
        else:
            path, body = "completions", {"prompt": "The capital of Peru is", "max_tokens": 64}
        request = json.dumps({"model": name, "stream": True} | body)
        command = "arriero" if shutil.which("arriero") else os.path.relpath(sys.argv[0])
        return (
            f"  OpenAI HTTP  {self._base_url}/v1\n"
            f"  gRPC         {LOOPBACK}:{self._launch.pods[0].grpc_port}  (arriero.inference.v1.Inference)\n\n"
            f"  curl -N {self._base_url}/v1/{path} -H 'Content-Type: application/json' -d {shlex.quote(request)}\n\n"
            f"  {command} chat --url {self._base_url}\n\n"
            "Ctrl-C finishes what runs and leaves.\n"
        )


def _has_chat_template(model: Path) -> bool:
    if (model / "chat_template.jinja").exists():
        return True
    try:
        return "chat_template" in json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
