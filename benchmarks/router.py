"""What our router costs, beside sglang-router, vllm-router and smg: one run, the same replicas, clients and requests.

    python benchmarks/router.py --install-peers                       # once: peers from PyPI, each in an environment
    python benchmarks/router.py --json benchmarks/results/router.json
    python benchmarks/router.py --rounds 1 --scale 0.05               # a look

Two mock replicas (tests/router/mocks.py) answer at once, so what is measured is the router. Prompts of 2 KB: one of 16
tenants' beginnings, then text of their own; prefix-aware policies everywhere. Routers take turns (A B C, A B C, ...);
figures are medians over rounds. `direct` is no router; `floor` passes bytes and decides nothing.

- `whole`: answers of 16 tokens that are no stream, 16 connections at once: CPU time of the router's process tree per
  request, and requests a second.
- `fresh`: the same, with a new connection for each request.
- `paced`: streams of 32 chunks 2 ms apart, 16 at once, so each chunk is a read and a write of its own: CPU per stream.
  `arrivals` counts how many times the client heard of a stream: a router that lets chunks pile up spends less.
- `burst`: streams of 32 chunks written at once, as fast as they go.
- `one`, `one stream`: one client alone: latency, time to the first byte of a stream; `added` is what exceeds direct's.
- `gRPC`: streams of 32 messages 2 ms apart, 16 at once, through our gRPC face and through a grpc.aio passthrough.

Our replicas write a resume comment behind each chunk, which our router asks for and takes out; others do not ask. The
router has a core to itself, clients and mocks share the others; `--no-pin` lets all share all. Direct is one replica.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import uvloop

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from router_machine import machine, without_paths  # noqa: E402
from router_peers import PEERS, Peer, install_all  # noqa: E402
from tests.router.load import Answer, ClosedLoop, post  # noqa: E402
from tests.router.mocks import MODEL, MockReplica  # noqa: E402
from tests.router.router_process import Backend, RouterProcess, config  # noqa: E402
from tests.worker.replica import free_ports  # noqa: E402

from arriero.inference.v1 import inference_pb2  # noqa: E402

OURS, DIRECT, FLOOR = "arriero", "direct", "floor"
CHUNKS = 32
PROMPT = 2048
TENANTS = 16
LIMIT = 120.0
PACE = "mock pace=2000"
SETTLE = 0.2
GENERATE = "/arriero.inference.v1.Inference/Generate"


@dataclass(frozen=True)
class Scene:
    """Requests of one kind, and how many at once."""

    name: str
    count: int
    connections: int
    stream: bool = False
    orders: str = ""
    fresh: bool = False


SCENES = (
    Scene("whole", 8000, 16),
    Scene("fresh", 2000, 16, fresh=True),
    Scene("paced", 640, 16, stream=True, orders=PACE),
    Scene("burst", 800, 16, stream=True),
    Scene("one", 1000, 1),
    Scene("one stream", 100, 1, stream=True, orders=PACE),
)
GRPC_STREAMS = 320


class Prompts:
    """Requests of 2 KB; no two alike, one of 16 beginnings of 1 KB each."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.beginnings = [self.text(PROMPT // 2) for _ in range(TENANTS)]

    def text(self, length: int) -> str:
        words: list[str] = []
        size = 0
        while size < length:
            words.append(f"{self.rng.randrange(36**4):x}")
            size += len(words[-1]) + 1
        return " ".join(words)[:length]

    def prompt(self) -> tuple[str, str]:
        return self.rng.choice(self.beginnings), self.text(PROMPT // 2)

    def http(self, scene: Scene) -> bytes:
        system, user = self.prompt()
        body: dict[str, Any] = {
            "model": MODEL,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
            "max_tokens": CHUNKS if scene.stream else 16,
            "stream": scene.stream,
        }
        return post("/v1/chat/completions", body | ({"user": scene.orders} if scene.orders else {}))

    def rpc(self) -> bytes:
        request = inference_pb2.GenerateRequest(model=MODEL, text=". ".join((PACE, *self.prompt())))
        request.sampling.max_tokens = CHUNKS
        return bytes(request.SerializeToString())


@dataclass(frozen=True)
class Router:
    """One way to the replicas."""

    name: str
    version: str | None
    command: list[str] | None
    """None: no process; the port is a replica's."""
    ports: tuple[int, int]
    """HTTP and gRPC; 0: not that face."""


def routers(names: Sequence[str], mocks: Sequence[Backend], scratch: Path, pin: Sequence[str]) -> list[Router]:
    """Ports are chosen here, so that each router has its own for the whole run."""
    found = []
    upstream = [str(mock.http_port) for mock in mocks]
    for name in names:
        port, rpc, extra = free_ports(3)
        if name == DIRECT:
            found.append(Router(name, None, None, (mocks[0].http_port, mocks[0].grpc_port)))
            continue
        if name == OURS:
            path = scratch / "router.yaml"
            path.write_text(config(MODEL, mocks, port, rpc))
            command, version = [sys.executable, "-m", "arriero_router", "--config", str(path)], "this tree"
        elif name == FLOOR:
            program = str(ROOT / "benchmarks" / "router_floor.py")
            command, version = (
                [sys.executable, program, "--port", str(port), "--upstream", *upstream],
                "uvloop, httptools",
            )
            rpc = 0
        else:
            peer: Peer = next(peer for peer in PEERS if peer.name == name)
            command = peer.command(port, extra, [f"http://127.0.0.1:{mock.http_port}" for mock in mocks])
            version, rpc = peer.version() or "", 0
        found.append(Router(name, version, [*pin, *command], (port, rpc)))
    return found


def grpc_floor(mocks: Sequence[Backend], pin: Sequence[str]) -> Router:
    (port,) = free_ports(1)
    program = str(ROOT / "benchmarks" / "router_floor.py")
    upstream = [str(mock.grpc_port) for mock in mocks]
    command = [*pin, sys.executable, program, "--grpc", "--port", str(port), "--upstream", *upstream]
    return Router("grpc.aio passthrough", None, command, (0, port))


def answers(port: int, request: bytes) -> bool:
    body = request.partition(b"\r\n\r\n")[2]
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", body, {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=10) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def answers_grpc(port: int) -> bool:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_stream(GENERATE)(Prompts(0).rpc(), timeout=5)
        try:
            return len(list(call)) > 0
        except grpc.RpcError:
            return False


def started(stack: ExitStack, router: Router) -> RouterProcess | None:
    command = router.command
    if command is None:
        return None
    if router.ports[0]:
        probe = functools.partial(answers, router.ports[0], Prompts(0).http(SCENES[0]))
    else:
        probe = functools.partial(answers_grpc, router.ports[1])
    process: RouterProcess = stack.enter_context(RouterProcess(lambda _: command, *router.ports, probe=probe))
    return process


async def scene_figures(router: Router, process: RouterProcess | None, scene: Scene, requests: list[bytes]) -> Any:
    """Figures of one scene, in microseconds where not said otherwise. `failed` should be 0."""
    port = router.ports[0]
    loop = ClosedLoop(port, requests[: scene.connections], scene.connections)
    await loop.run(LIMIT)  # connections to the replicas are open now
    before = process.cpu_seconds() if process else 0.0
    loop = ClosedLoop(port, requests, scene.connections, scene.fresh)
    found = await loop.run(LIMIT)
    await asyncio.sleep(SETTLE / 10)  # what is left to do behind the last answer
    cpu = (process.cpu_seconds() if process else 0.0) - before
    latencies = sorted(answer.ended - answer.began for answer in found)
    firsts = sorted(answer.first - answer.began for answer in found if answer.first)
    return {
        "cpu_us": round(cpu / len(found) * 1e6, 1) if process else None,
        "per_second": round(len(found) / loop.seconds, 1),
        "p50_us": round(quantile(latencies, 0.5) * 1e6, 1),
        "p99_us": round(quantile(latencies, 0.99) * 1e6, 1),
        "first_p50_us": round(quantile(firsts, 0.5) * 1e6, 1) if firsts else None,
        "first_p99_us": round(quantile(firsts, 0.99) * 1e6, 1) if firsts else None,
        "arrivals": round(statistics.mean(len(set(answer.times)) for answer in found), 1),
        "failed": sum(not sound(answer, scene) for answer in found),
    }


def sound(answer: Answer, scene: Scene) -> bool:
    if answer.status != 200 or not answer.whole:
        return False
    body = answer.body
    return not scene.stream or (body.count(b'"content":" t') == CHUNKS and body.count(b"data: [DONE]") == 1)


def quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


async def rpc_figures(router: Router, process: RouterProcess | None, count: int, seed: int) -> Any:
    """Streams over gRPC, 16 at once on four channels."""
    prompts = Prompts(seed)
    requests = iter([prompts.rpc() for _ in range(count)])
    firsts: list[float] = []
    messages = wrong = 0

    async def client(channel: grpc.aio.Channel) -> None:
        nonlocal messages, wrong
        for request in requests:
            began = time.perf_counter()
            texts = []
            async for data in channel.unary_stream(GENERATE)(request, timeout=LIMIT):
                if not texts:
                    firsts.append(time.perf_counter() - began)
                texts.append(inference_pb2.GenerateResponse.FromString(data).text)
            messages += len(texts)
            wrong += "".join(texts) != "".join(f" t{i}" for i in range(CHUNKS))

    channels = [
        grpc.aio.insecure_channel(f"127.0.0.1:{router.ports[1]}", options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(4)
    ]
    for channel in channels:
        await channel.channel_ready()
    before = process.cpu_seconds() if process else 0.0
    began = time.perf_counter()
    async with asyncio.timeout(LIMIT):
        await asyncio.gather(*(client(channels[i % 4]) for i in range(16)))
    seconds = time.perf_counter() - began
    cpu = (process.cpu_seconds() if process else 0.0) - before
    for channel in channels:
        await channel.close()
    return {
        "cpu_us": round(cpu / count * 1e6, 1) if process else None,
        "cpu_per_message_us": round(cpu / (count * CHUNKS) * 1e6, 2) if process else None,
        "messages_per_stream": round(messages / count, 1),
        "first_p50_us": round(quantile(sorted(firsts), 0.5) * 1e6, 1),
        "per_second": round(count / seconds, 1),
        "failed": wrong,
    }


def round_of(router: Router, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """All scenes of one router, freshly started; prompts are the same for all routers of a round."""
    figures: dict[str, Any] = {}
    with ExitStack() as stack:
        process = started(stack, router)

        def run(name: str, measured: Callable[[], Awaitable[Any]]) -> None:
            figures[name] = uvloop.run(measured())  # type: ignore[arg-type]
            time.sleep(SETTLE)

        if router.ports[0]:
            for number, scene in enumerate(SCENES):
                prompts = Prompts(seed * 100 + number)
                requests = [
                    prompts.http(scene) for _ in range(max(scene.connections, int(scene.count * options.scale)))
                ]
                run(scene.name, functools.partial(scene_figures, router, process, scene, requests))
        if router.ports[1]:
            count = max(16, int(GRPC_STREAMS * options.scale))
            run("gRPC", functools.partial(rpc_figures, router, process, count, seed))
        if process is not None:
            before = process.cpu_seconds()
            time.sleep(1.0)
            figures["idle"] = {"cpu_share": round(process.cpu_seconds() - before, 4)}
            figures["memory"] = {"resident_mib": round(process.resident_bytes() / 2**20, 1)}
    return figures


def medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure of each scene."""
    result: dict[str, Any] = {}
    for scene in rounds[0]:
        result[scene] = {}
        for figure, value in rounds[0][scene].items():
            values = [found[scene][figure] for found in rounds]
            result[scene][figure] = None if value is None else round(statistics.median(values), 2)
            if figure == "failed":
                result[scene][figure] = sum(values)
    return result


def summarize(report: dict[str, Any]) -> None:
    """The added latencies and the ratios, and the table on standard output."""
    found = report["medians"]
    direct, ours = found.get(DIRECT), found.get(OURS)
    ratios: dict[str, Any] = {}
    for name, figures in found.items():
        for scene in ("one", "one stream"):
            if direct and name != DIRECT and scene in figures:
                for figure in ("p50_us", "p99_us", "first_p50_us"):
                    figures[scene][f"added_{figure}"] = round(figures[scene][figure] - direct[scene][figure], 1)
        if ours and name not in (OURS, DIRECT):
            ratios[name] = {
                scene: round(figures[scene]["cpu_us"] / ours[scene]["cpu_us"], 2)
                for scene in ("whole", "fresh", "paced", "burst", "gRPC")
                if scene in figures and scene in ours and ours[scene]["cpu_us"]
            }
    report["cpu_of_others_to_ours"] = ratios
    columns: tuple[tuple[str, str, str], ...] = (
        ("whole us", "whole", "cpu_us"),
        ("req/s", "whole", "per_second"),
        ("fresh us", "fresh", "cpu_us"),
        ("paced us", "paced", "cpu_us"),
        ("arrivals", "paced", "arrivals"),
        ("burst us", "burst", "cpu_us"),
        ("p50 added", "one", "added_p50_us"),
        ("p99 added", "one", "added_p99_us"),
        ("TTFT added", "one stream", "added_first_p50_us"),
        ("gRPC us/msg", "gRPC", "cpu_per_message_us"),
        ("RSS MiB", "memory", "resident_mib"),
        ("idle", "idle", "cpu_share"),
    )
    print(f"{'':<22}" + "".join(f"{title:>12}" for title, _, _ in columns) + f"{'failed':>8}")
    for name, figures in found.items():
        cells = [figures.get(scene, {}).get(figure) for _, scene, figure in columns]
        failed = sum(scene.get("failed", 0) for scene in figures.values())
        print(f"{name:<22}" + "".join(f"{'-' if cell is None else cell:>12}" for cell in cells) + f"{failed:>8}")
    for name, values in ratios.items():
        print(f"CPU of {name} to ours: " + ", ".join(f"{scene} {value:.2f}x" for scene, value in values.items()))


def main() -> int:
    there = [DIRECT, FLOOR, OURS, *(peer.name for peer in PEERS)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routers", nargs="+", choices=there, help="default: all that are there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of requests")
    parser.add_argument("--no-pin", action="store_true")
    parser.add_argument("--install-peers", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.install_peers:
        install_all()
    absent = [peer.name for peer in PEERS if not peer.installed]
    names = options.routers or [name for name in there if name not in absent]
    if missing := [name for name in names if name in absent]:
        parser.error(f"not installed: {', '.join(missing)} (--install-peers)")
    cores = sorted(os.sched_getaffinity(0))
    pinned = not options.no_pin and len(cores) > 1
    pin = ["taskset", "-c", str(cores[0])] if pinned else []
    rest = ["taskset", "-c", ",".join(map(str, cores[1:]))] if pinned else []
    if pinned:
        os.sched_setaffinity(0, cores[1:])
    with ExitStack() as stack:
        mocks = [Backend(name, *free_ports(3)) for name in ("a", "b")]
        for mock in mocks:
            stack.enter_context(MockReplica(*mock, prefix=tuple(rest)))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="arriero-bench-")))
        lines = routers(names, mocks, scratch, pin)
        if OURS in names:
            lines.append(grpc_floor(mocks, pin))
        rounds: dict[str, list[dict[str, Any]]] = {line.name: [] for line in lines}
        for number in range(options.rounds):
            for line in lines:
                began = time.perf_counter()
                rounds[line.name].append(round_of(line, options, number + 1))
                print(f"round {number + 1}: {line.name}, {time.perf_counter() - began:.1f} s", flush=True)
    report: dict[str, Any] = {
        "machine": machine(),
        "placement": "router on one core, clients and mocks on the others" if pinned else "all share all cores",
        "load_at_end": os.getloadavg(),
        "scenes": [scene.__dict__ for scene in SCENES],
        "scale": options.scale,
        "routers": {line.name: {"version": line.version, "command": without_paths(line.command)} for line in lines},
        "medians": {name: medians(found) for name, found in rounds.items()},
        "rounds": rounds,
    }
    summarize(report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
