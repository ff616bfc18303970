"""The public faces of a replica as one object: start, drain, stop."""

from __future__ import annotations

import asyncio
import logging

from arriero_faces.http.server import HttpLimits, HttpServer, bind
from arriero_plan.launch import Launch
from arriero_worker.engine.messages import EngineStatus
from arriero_worker.front.engine_client import EngineClient
from arriero_worker.front.grpc_api import GrpcFace
from arriero_worker.front.http_api import HttpApi
from arriero_worker.front.service import Service

log = logging.getLogger("arriero.front")

FRONT_LIMITS = HttpLimits(max_head=2 * 1024 * 1024)
"""A long answer's tokens in `x-arriero-resume-tokens` need a large head; like bodies, heads share one budget."""


class Front:
    """HTTP and gRPC over one Service, which talks to the engine behind `socket_path`."""

    def __init__(self, launch: Launch, socket_path: str, limits: HttpLimits = FRONT_LIMITS) -> None:
        """Raises TokenizerError where the model's directory does not serve."""
        self.launch = launch
        self.client = EngineClient(socket_path, self._on_status)
        self.service = Service(launch, self.client)
        api = HttpApi(self.service)
        self.http = HttpServer(api, limits, api.refused)
        self.service.metrics.watch_http(lambda: self.http.connections, lambda: self.http.unanswered)
        self.grpc = GrpcFace(self.service, limits)
        self.http_port = 0
        self.grpc_port = 0
        self._phase = ""

    async def start(self) -> None:
        """Listen on the leader's ports (0: any free one, then told by `http_port` and `grpc_port`). Raises OSError."""
        pod = self.launch.pods[0]
        address = self.launch.bind_address
        listener = bind(address, pod.http_port)
        self.http_port = listener.getsockname()[1]
        await self.http.start(listener)
        self.grpc_port = await self.grpc.start(address, pod.grpc_port)
        self.client.start()
        log.info("listening http_port=%d grpc_port=%d", self.http_port, self.grpc_port)

    async def drain(self, seconds: float) -> bool:
        """Take no new request and let the running ones end, for so long at most. Whether all ended."""
        log.info("draining, for %g s at most", seconds)
        self.service.draining = True
        self.client.drain()
        await self.grpc.set_serving(False)
        self.http.drain()
        deadline = asyncio.get_running_loop().time() + seconds
        while self.http.busy or self.grpc.busy:
            if asyncio.get_running_loop().time() >= deadline:
                log.warning("the drain's time is over; %d requests are cut off", self.http.busy + self.grpc.busy)
                return False
            await asyncio.sleep(0.02)
        return True

    async def stop(self) -> None:
        """Cut off what is left, and stop listening."""
        await self.http.stop()
        await self.grpc.stop()
        await self.client.close()
        self.service.tokenizer.close()

    def _on_status(self, status: EngineStatus | None) -> None:
        phase = status.phase if status is not None else "gone"
        if phase != self._phase:
            self._phase = phase
            log.info("engine %s", phase)
            self.grpc.serving_soon(self.service.unready is None)
