"""Following a group from outside: each pod's Worker.Status stream, and the leader's readiness over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import grpc.aio
import httpx

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


async def http_ready(base_url: str, client: httpx.AsyncClient) -> bool:
    """Whether the replica says that it takes requests now."""
    try:
        return (await client.get(f"{base_url}/health/ready")).status_code == 200
    except httpx.TransportError:
        return False
