"""Following a group from outside: each pod's Worker.Status stream, and the leader's readiness over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import grpc.aio

from arriero.inference.v1 import worker_pb2 as pb
from arriero.inference.v1 import worker_pb2_grpc
from arriero_plan.launch import Pod

Deliver = Callable[[pb.StatusResponse], None]

_CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    # A pod that is being started again should be heard of at once.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 250),
]
_PAUSE = 0.05
_PATIENCE = 5.0


async def follow_status(pod: Pod, deliver: Deliver) -> None:
    """Deliver a pod's status at each change, through its restarts, until cancelled."""
    async with grpc.aio.insecure_channel(f"{pod.host}:{pod.control_port}", options=_CHANNEL_OPTIONS) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        while True:
            try:
                async for status in stub.Status(pb.StatusRequest(), wait_for_ready=True):
                    deliver(status)
            except grpc.aio.AioRpcError:
                pass
            await asyncio.sleep(_PAUSE)


async def http_ready(host: str, port: int) -> bool:
    """Whether the replica says that it takes requests now. (A client library costs more than the question.)"""
    try:
        async with asyncio.timeout(_PATIENCE):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(f"GET /health/ready HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
                return (await reader.readline()).split()[1:2] == [b"200"]
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
