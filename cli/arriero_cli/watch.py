"""Following a deployment from outside: each pod's Worker.Status stream, and what the router says over HTTP."""

from __future__ import annotations

import asyncio
import json
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
_PATIENCE = 2.0


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


async def http_ready(pod: Pod) -> bool:
    """Whether a leader's public face says that it takes requests now."""
    return await _ready(pod.host, pod.http_port) is not None


async def ready_replicas(host: str, port: int, model: str) -> int | None:
    """How many replicas of the model the router would send a request to now; None where it does not say so."""
    try:
        return int(json.loads(await _ready(host, port) or b"")["ready_replicas"][model])
    except (ValueError, KeyError, TypeError):
        return None


async def _ready(host: str, port: int) -> bytes | None:
    """The body of /health/ready where the answer is yes. (A client library costs more than the question.)"""
    try:
        async with asyncio.timeout(_PATIENCE):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(f"GET /health/ready HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return None
    return body if head.split(maxsplit=2)[1:2] == [b"200"] else None
