"""What the least that a router in Python can be costs: bytes to a replica and back, nothing decided.

    python benchmarks/router_floor.py --port 8000 --upstream 8001 8002           # asyncio.Protocol, httptools, uvloop
    python benchmarks/router_floor.py --port 9000 --upstream 9001 9002 --grpc    # grpc.aio, messages as bytes

Requests go round-robin. No time-outs, no backpressure, no retries: a yardstick, not a router.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httptools
import uvloop


class Upstream(asyncio.Protocol):
    """A kept connection to a replica; what it says goes to the client of the moment."""

    def __init__(self, idle: deque[Upstream]) -> None:
        self.idle = idle
        self.client: Client | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def send(self, client: Client, request: bytes) -> None:
        assert self.transport is not None
        self.client = client
        self.parser = httptools.HttpResponseParser(self)
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self.client is not None and self.client.transport is not None:
            self.client.transport.write(data)
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        self.client = None
        self.idle.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.client is not None and self.client.transport is not None:
            self.client.transport.abort()


class Replicas:
    def __init__(self, ports: list[int]) -> None:
        self.pools: deque[tuple[int, deque[Upstream]]] = deque((port, deque()) for port in ports)

    async def connect(self, port: int, idle: deque[Upstream], client: Client, request: bytes) -> None:
        loop = asyncio.get_running_loop()
        _, upstream = await loop.create_connection(lambda: Upstream(idle), "127.0.0.1", port)
        upstream.send(client, request)


class Client(asyncio.Protocol):
    def __init__(self, replicas: Replicas) -> None:
        self.replicas = replicas
        self.parser = httptools.HttpRequestParser(self)
        self.parts: list[bytes] = []
        self.transport: asyncio.Transport | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None

    def data_received(self, data: bytes) -> None:
        self.parts.append(data)
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        request = b"".join(self.parts)
        self.parts.clear()
        pools = self.replicas.pools
        pools.rotate(1)
        port, idle = pools[0]
        while idle:
            upstream = idle.pop()
            if upstream.transport is not None:
                upstream.send(self, request)
                return
        task = asyncio.get_running_loop().create_task(self.replicas.connect(port, idle, self, request))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


async def serve_http(port: int, upstream: list[int]) -> None:
    replicas = Replicas(upstream)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Client(replicas), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


async def serve_grpc(port: int, upstream: list[int]) -> None:
    channels = deque(grpc.aio.insecure_channel(f"127.0.0.1:{number}") for number in upstream)

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            async def call(request: bytes, context: Any) -> AsyncIterator[bytes]:
                channels.rotate(1)
                async for message in channels[0].unary_stream(details.method)(request):
                    yield message

            return grpc.unary_stream_rpc_method_handler(call)

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((Handler(),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", type=int, nargs="+", required=True)
    parser.add_argument("--grpc", action="store_true")
    options = parser.parse_args()
    uvloop.run((serve_grpc if options.grpc else serve_http)(options.port, options.upstream))


if __name__ == "__main__":
    main()
