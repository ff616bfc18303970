"""The engines of simulated pods: one gRPC server that answers Worker.Status at every address of a range.

    python benchmarks/operator_engines.py RANGE

The kernel is told that the whole range is this machine's own (`ip route add local RANGE dev lo`), so whatever the
operator dials in it ends here: no packet leaves the machine. Every pod is told of as one that serves, with as many
ranks as the group has pods. Runs until SIGTERM or until its parent ends; then the route is taken back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import grpc.aio

from arriero.inference.v1 import worker_pb2, worker_pb2_grpc
from arriero_operator.wanted import CONTROL

RANKS = 2


_OPTIONS = (
    ("grpc.so_reuseport", 0),
    # As a worker's control port: whoever follows a status sends pings.
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
)


class Engines(worker_pb2_grpc.WorkerServicer):
    """Every group serves, from the first word on."""

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop

    async def Status(
        self, request: worker_pb2.StatusRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> AsyncIterator[worker_pb2.StatusResponse]:
        serving = worker_pb2.PHASE_SERVING
        ranks = [worker_pb2.RankStatus(rank=rank, pod=rank, phase=serving, epoch=1) for rank in range(RANKS)]
        yield worker_pb2.StatusResponse(phase=serving, epoch=1, ranks=ranks, run="1")
        await self._stop.wait()


@contextlib.contextmanager
def local(addresses: str) -> Iterator[None]:
    """The range is this machine's own. Needs root."""
    route = ["local", addresses, "dev", "lo"]
    subprocess.run(["ip", "route", "replace", *route], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "route", "del", *route], check=True)


async def serve(parent: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = grpc.aio.server(options=_OPTIONS)
    worker_pb2_grpc.add_WorkerServicer_to_server(Engines(stop), server)
    server.add_insecure_port(f"0.0.0.0:{CONTROL}")
    await server.start()
    print("ready", flush=True)
    while not stop.is_set() and os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 1.0)
    await server.stop(2.0)


def main() -> None:
    parent = os.getppid()
    with local(sys.argv[1]):
        asyncio.run(serve(parent))


if __name__ == "__main__":
    main()
