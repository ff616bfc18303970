"""The control port under watchers: how late a step plan reaches another pod, how fast a loss is told, what it costs.

    python benchmarks/control.py [--watchers 0 30 300] [--seconds 4] [--json FILE]

A leader's control server runs as a process of its own; this one plays engine (it writes plans to the ring every 5 ms),
the other pod (it reads them from `Run`), the ranks (`Join`, a status every 0.25 s) and the watchers of `Status`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grpc
import psutil
from tests.worker.group.groups import launch_of

from arriero.inference.v1 import worker_pb2 as pb
from arriero.inference.v1 import worker_pb2_grpc
from arriero_plan.launch import parse_launch
from arriero_worker.group.control import Control
from arriero_worker.group.memory import PodMemory
from arriero_worker.group.ring import Ring, pack_plan

STEP = 0.005
LOSSES = 20


def serve() -> None:
    """The leader's control server; prints the path of its memory."""
    logging.disable(logging.WARNING)
    launch = parse_launch(sys.stdin.readline(), "benchmark")
    fd = PodMemory.create("benchmark")
    path = PodMemory.path_of(fd)
    control = Control(launch, 0, PodMemory(path, 1))
    control.start()
    print(path, flush=True)
    sys.stdin.readline()
    control.stop()


class Rank:
    """A rank's stream."""

    def __init__(self, stub: Any, rank: int, digest: str) -> None:
        self.outbox: queue.SimpleQueue[pb.JoinRequest | None] = queue.SimpleQueue()
        self.outbox.put(pb.JoinRequest(hello=pb.Hello(rank=rank, launch_digest=digest, pid=1)))
        self.call = stub.Join(iter(self.outbox.get, None))
        self.rank = rank
        self.over = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def say(self, **event: Any) -> None:
        self.outbox.put(pb.JoinRequest(**event))

    def _beat(self) -> None:
        while not self.over.wait(0.25):
            now = time.monotonic()
            self.say(status=pb.RankStatus(rank=self.rank, phase=pb.PHASE_SERVING, epoch=1, phase_seconds=now))


def form(ranks: list[Rank]) -> int:
    for rank in ranks:
        rank.say(ready=pb.Ready(weights_digest="w"))
    epoch = 0
    for rank in ranks:
        while not epoch or rank.rank:
            answer = next(rank.call)
            if answer.HasField("form"):
                epoch = answer.form.epoch
                break
        rank.say(formed=pb.Formed(epoch=epoch))
        rank.say(status=pb.RankStatus(rank=rank.rank, phase=pb.PHASE_SERVING, epoch=epoch))
    return epoch


def watch(target: str, count: int, told: list[int]) -> list[Any]:
    """So many Status streams over ten channels, read by as many threads."""
    channels = [
        grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(min(10, count))
    ]

    def read(channel: Any) -> None:
        try:
            for _ in worker_pb2_grpc.WorkerStub(channel).Status(pb.StatusRequest()):
                told[0] += 1
        except (grpc.RpcError, ValueError):
            pass

    for index in range(count):
        threading.Thread(target=read, args=(channels[index % len(channels)],), daemon=True).start()
    return channels


def measure(watchers: int, seconds: float) -> dict[str, Any]:
    launch = launch_of(tensor=1, pipeline=2, ranks_per_pod=1)
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(launch.model_dump_json() + "\n")
    server.stdin.flush()
    memory = PodMemory(server.stdout.readline().strip(), 1)
    target = f"127.0.0.1:{launch.pods[0].control_port}"
    channel = grpc.insecure_channel(target)
    stub = worker_pb2_grpc.WorkerStub(channel)
    ranks = [Rank(stub, rank, launch.digest) for rank in range(2)]
    epoch = form(ranks)
    told = [0]
    channels = watch(target, watchers, told)
    time.sleep(1.0)

    run = stub.Run(pb.RunRequest(epoch=epoch, pod=1))
    next(run)
    late: list[float] = []
    steps = int(seconds / STEP)

    def read() -> None:
        for _ in range(steps):
            plan = next(run).plan
            late.append(time.perf_counter() - float(plan))

    reading = threading.Thread(target=read)
    writer = Ring(memory).writer(3)
    process = psutil.Process(server.pid)
    cpu, first_told = sum(process.cpu_times()[:2]), told[0]
    reading.start()
    for step in range(steps):
        writer.write(pack_plan(epoch, step, repr(time.perf_counter()).encode()), lambda: False)
        time.sleep(STEP)
    reading.join()
    cpu = sum(process.cpu_times()[:2]) - cpu
    messages = told[0] - first_told
    threads, resident = process.num_threads(), process.memory_info().rss

    noticed = []
    for _ in range(LOSSES):
        status = stub.Status(pb.StatusRequest())
        next(answer for answer in status if answer.phase == pb.PHASE_SERVING)
        began = time.perf_counter()
        ranks[1].over.set()
        ranks[1].call.cancel()
        next(answer for answer in status if answer.phase != pb.PHASE_SERVING)
        noticed.append(time.perf_counter() - began)
        status.cancel()
        ranks[1] = Rank(stub, 1, launch.digest)
        form(ranks)
    for rank in ranks:
        rank.over.set()
        rank.call.cancel()
    for other in [*channels, channel]:
        other.close()
    server.stdin.write("\n")
    server.stdin.flush()
    server.wait()
    late.sort()
    return {
        "watchers": watchers,
        "plan_us_median": round(1e6 * statistics.median(late)),
        "plan_us_p99": round(1e6 * late[int(0.99 * len(late))]),
        "loss_told_ms_median": round(1e3 * statistics.median(noticed), 1),
        "loss_told_ms_worst": round(1e3 * max(noticed), 1),
        "statuses_per_watcher_and_second": round(messages / watchers / seconds, 1) if watchers else 0,
        "server_cpu_percent": round(100 * cpu / seconds, 1),
        "server_threads": threads,
        "server_mib": round(resident / 2**20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--watchers", type=int, nargs="+", default=[0, 30, 300])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    found = []
    for watchers in options.watchers:
        found.append(measure(watchers, options.seconds))
        print(json.dumps(found[-1]))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    main()
