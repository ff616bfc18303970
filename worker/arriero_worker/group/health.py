"""The standard health service on every pod's control port, for probes: the engine's verdict, not "the port is open".

`liveness` (and the empty name): the supervisor answers. It kills and restarts ranks that hang, and ends with the pod's
exit code when they can never run, so a slow start is no reason to kill the pod. `readiness`: on the leader's pod the
group serves and its HTTP face says so; on other pods their own ranks serve.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from arriero.inference.v1 import worker_pb2 as pb
from arriero_plan.launch import Launch

LIVENESS, READINESS = "liveness", "readiness"
_FACE_SECONDS = 1.0
_QUESTION = b"GET /health/ready HTTP/1.1\r\nhost: leader\r\nconnection: close\r\n\r\n"


class PodHealth(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # untyped
    """Answers Check; Watch is for clients of the public face."""

    def __init__(self, launch: Launch, pod: int, status: Callable[[], pb.StatusResponse]) -> None:
        self._status = status
        self._host = "127.0.0.1" if launch.bind_address == "0.0.0.0" else launch.bind_address
        self._face_port = launch.pods[pod].http_port if 0 in launch.pods[pod].ranks else 0

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        if request.service not in ("", LIVENESS, READINESS):
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"expected {LIVENESS} or {READINESS}, found {request.service!r}"
            )
        serving = request.service != READINESS or await self._ready()
        answer = health_pb2.HealthCheckResponse
        return answer(status=answer.SERVING if serving else answer.NOT_SERVING)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "ask Status of arriero.inference.v1.Worker, which streams")

    async def _ready(self) -> bool:
        return self._status().phase == pb.PHASE_SERVING and (not self._face_port or await self._face_answers())

    async def _face_answers(self) -> bool:
        try:
            async with asyncio.timeout(_FACE_SECONDS):
                reader, writer = await asyncio.open_connection(self._host, self._face_port)
                try:
                    writer.write(_QUESTION)
                    line = await reader.readline()
                finally:
                    writer.transport.abort()
        except (OSError, ValueError):  # TimeoutError among them; ValueError: a line without an end
            return False
        return line.split(b" ", 2)[1:2] == [b"200"]
