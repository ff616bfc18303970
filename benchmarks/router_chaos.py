"""Ours and other routers in front of two real replicas, while these are killed: who fails, cuts or falsifies answers.

    python benchmarks/router_chaos.py --rounds 50 --json benchmarks/results/router_chaos.json
    python benchmarks/router_chaos.py --rounds 5 --routers arriero sglang-router

The same harness as tests/router/test_chaos.py: two replicas of the tiny Llama, 16 clients with streams and whole
answers, kill -9 of a whole replica at a random moment, restarted at once; each answer is compared with the undisturbed
one. Then both are killed at once, and requests arrive over `--outage` seconds in which there is none. Other routers
come from PyPI: `python benchmarks/router_peers.py --install`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from router_machine import machine, without_paths  # noqa: E402
from router_peers import PEERS, Peer  # noqa: E402
from tests.router.chaos import NAME, Fleet, Outcome, kill_rounds, our_router, total_outage  # noqa: E402
from tests.router.router_process import RouterProcess  # noqa: E402
from tests.worker.replica import free_ports  # noqa: E402

OURS = "arriero"


def answers(port: int) -> Callable[[], bool]:
    """Whether a request for one token is answered: the only readiness that all routers share."""
    body = json.dumps({"model": NAME, "prompt": "ready", "max_tokens": 1}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"}
    )

    def probe() -> bool:
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    return probe


def start(name: str, fleet: Fleet, port: int, rpc: int, metrics: int) -> RouterProcess:
    if name == OURS:
        return our_router(fleet, port, rpc, hold={"timeoutSeconds": 120})
    peer = next(peer for peer in PEERS if peer.name == name)
    urls = [replica.url for replica in fleet.replicas]
    return RouterProcess(lambda _: peer.command(port, metrics, urls), port, probe=answers(port))


def obstacle(name: str, fleet: Fleet) -> str | None:
    """Why a router cannot be measured with these replicas, through no fault of its own."""
    if name == OURS:
        return None
    try:
        with urllib.request.urlopen(f"{fleet.replicas[0].url}/health", timeout=10) as response:
            status = response.status
    except urllib.error.HTTPError as error:
        status = error.code
    return None if status == 200 else f"it asks replicas for /health when it starts, and they answer {status}"


async def measure(name: str, fleet: Fleet, options: argparse.Namespace) -> dict[str, Any]:
    if (why := obstacle(name, fleet)) is not None:
        print(f"{name}: not measured: {why}", flush=True)
        return {"not_measured": why}
    port, rpc, metrics = free_ports(3)
    report: dict[str, Any] = {}
    with start(name, fleet, port, rpc, metrics) as router:
        report["command"] = without_paths(router.command)
        outcome = await kill_rounds(fleet, port, rounds=options.rounds, seed=options.seed, clients=options.clients)
        report["kills"] = figures(outcome)
        print(f"{name}: {outcome.summary()}", flush=True)
    if options.outage:
        with start(name, fleet, port, rpc, metrics):
            outage = await total_outage(fleet, port, seconds=options.outage, seed=options.seed, strict=False)
            report["outage"] = {"answered": outage.answered, **figures(outage.outcome)}
            print(f"{name}: down for {options.outage:g} s: {outage.outcome.summary()}", flush=True)
    return report


def figures(outcome: Outcome) -> dict[str, Any]:
    values = asdict(outcome)
    for key in ("pauses", "returns"):
        seconds = values.pop(key)
        values[f"{key}_median_s"] = round(statistics.median(seconds), 4) if seconds else None
        values[f"{key}_worst_s"] = round(max(seconds), 4) if seconds else None
    return values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = [OURS, *(peer.name for peer in PEERS if peer.installed)]
    parser.add_argument("--routers", nargs="+", default=there, choices=[OURS, *(peer.name for peer in PEERS)])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--outage", type=float, default=20.0, metavar="SECONDS", help="0: leave it out")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if absent := [peer.name for peer in PEERS if peer.name in options.routers and not peer.installed]:
        parser.error(f"not installed: {', '.join(absent)}; python benchmarks/router_peers.py --install")
    report: dict[str, Any] = {
        "machine": machine(),
        "versions": {peer.name: peer.version() for peer in PEERS if isinstance(peer, Peer)},
        "rounds": options.rounds,
        "clients": options.clients,
        "seed": options.seed,
        "routers": {},
    }
    for name in options.routers:
        with Fleet() as fleet:
            report["routers"][name] = asyncio.run(measure(name, fleet, options))
    columns = ("requests", "streams", "failed", "cut", "wrong", "miscounted", "pauses_median_s", "pauses_worst_s")
    columns += ("returns_median_s",)
    for part in ("kills", "outage"):
        print(f"\n{part:<14}" + "".join(f"{column:>17}" for column in columns))
        for name, found in report["routers"].items():
            if part in found:
                print(f"{name:<14}" + "".join(f"{found[part][column]!s:>17}" for column in columns))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
