"""A cluster for a person.

python -m tests.cluster up [--nodes N] [--gpus N] [--cpus N] [--kwok]    start one, print its KUBECONFIG
python -m tests.cluster down [KUBECONFIG]                                  end that one; every cluster started so
python -m tests.cluster sweep                                              remove what crashed clusters left
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.cluster import machine, slots, sweep
from tests.cluster.cluster import ROOT, start_cluster
from tests.cluster.layout import Layout
from tests.cluster.processes import ClusterError, wait_until

OWNER = "owner.pid"


def up(arguments: argparse.Namespace) -> int:
    """Start an owner in the background and wait for its word."""
    command = [sys.executable, "-m", "tests.cluster", "own"]
    command += [f"--{name}={getattr(arguments, name)}" for name in ("nodes", "gpus", "cpus")]
    command += ["--kwok"] if arguments.kwok else []
    began = time.monotonic()
    # The owner outlives us: with our own stderr, whoever reads that would wait for its end.
    with tempfile.TemporaryFile() as errors:
        owner = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
        assert owner.stdout is not None
        line = owner.stdout.readline().decode().strip()
        if not line:
            owner.wait()
            errors.seek(0)
            raise ClusterError(errors.read().decode().strip().removeprefix("cluster: "))
    print(f"cluster ready in {time.monotonic() - began:.1f} s; `make cluster-down` ends it", file=sys.stderr)
    tools = machine.program("kubectl").parent
    print(f"kubectl and helm that fit it: {tools}", file=sys.stderr)
    print(f"export KUBECONFIG={line}")
    return 0


def own(arguments: argparse.Namespace) -> int:
    """Hold a cluster until told to end."""
    ended: list[int] = []
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, lambda number, _: ended.append(number))
    cluster = start_cluster(arguments.nodes, gpus=arguments.gpus, cpus=arguments.cpus)
    try:
        if arguments.kwok:
            cluster.start_kwok()
        (cluster.layout.home / OWNER).write_text(str(os.getpid()))
        print(cluster.kubeconfig, flush=True)
        while not ended:
            time.sleep(0.2)
    finally:
        cluster.close()
    return 0


def down(arguments: argparse.Namespace) -> int:
    """End the owners of clusters that `up` started, and wait until nothing is left of them."""
    layouts = [Layout(number, 0, slots.base_folder()) for number in slots.used()]
    wanted = [layout for layout in layouts if arguments.kubeconfig in (None, layout.kubeconfig)]
    if arguments.kubeconfig and not wanted:
        raise ClusterError(f"{arguments.kubeconfig} is not the KUBECONFIG of a cluster of this machine")
    for layout in wanted:
        end_owner(layout)
    sweep.sweep_all()
    return 0


def end_owner(layout: Layout) -> None:
    note = layout.home / OWNER
    if note.exists() and slots.is_held(layout.slot):
        os.kill(int(note.read_text()), signal.SIGTERM)
        wait_until(lambda: not note.exists(), "end of the cluster", 60.0)
        print(f"cluster {layout.slot} ended", file=sys.stderr)


def sweep_command(_: argparse.Namespace) -> int:
    for number in sweep.sweep_all():
        print(f"cluster {number} swept", file=sys.stderr)
    return 0


def reap(arguments: argparse.Namespace) -> int:
    sweep.sweep_when_free(arguments.slot)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    commands = parser.add_subparsers(required=True)
    for name, action in (("up", up), ("own", own)):
        command = commands.add_parser(name)
        command.add_argument("--nodes", type=int, default=2, choices=range(5), help="real nodes (default: 2)")
        command.add_argument("--gpus", type=int, default=8, help="GPUs of each node, counted only (default: 8)")
        command.add_argument("--cpus", type=int, default=8, help="processors of each node, counted only (default: 8)")
        command.add_argument("--kwok", action="store_true", help="simulate nodes that have the label type=kwok")
        command.set_defaults(action=action)
    command = commands.add_parser("down")
    command.add_argument("kubeconfig", nargs="?", type=Path, help="of the one to end (default: all that `up` started)")
    command.set_defaults(action=down)
    commands.add_parser("sweep").set_defaults(action=sweep_command)
    command = commands.add_parser("reap")
    command.add_argument("slot", type=int)
    command.set_defaults(action=reap)
    arguments = parser.parse_args()
    try:
        status: int = arguments.action(arguments)
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
