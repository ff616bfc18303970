"""Channels to a replica's gRPC ports, for calls that follow it."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from arriero_router.endpoints.model import address

_OPTIONS = [
    # The pod network is not for the host's proxy settings.
    ("grpc.enable_http_proxy", 0),
    # A channel belongs to one try: it shares neither a connection nor a wait with one that failed before.
    ("grpc.use_local_subchannel_pool", 1),
    # Also how long one attempt to connect may take: what a lost SYN costs is not left to the kernel's clock.
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 400),
    # A name's address may change while its pod is started again.
    ("grpc.dns_min_time_between_resolutions_ms", 500),
    ("grpc.max_receive_message_length", -1),
    # Between two pings at least what the worker's servers allow (10 s), or they end the connection.
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
]


@dataclass(frozen=True, slots=True)
class Security:
    """TLS towards the replicas' public faces, HTTP and gRPC; what is None is plain text. The control port is always
    plain: it belongs to the pod network.
    """

    http: ssl.SSLContext | None = None
    grpc: grpc.ChannelCredentials | None = None
    server_name: str = ""
    """Name that certificates must bear; empty: the endpoint's host."""


def open_channel(
    host: str, port: int, security: Security | None = None, options: Sequence[tuple[str, int]] = ()
) -> grpc.aio.Channel:
    """A channel of its own to host:port; to be closed by its user. `options` are gRPC's, besides those of all."""
    target = address(host, port)
    if security is None or security.grpc is None:
        return grpc.aio.insecure_channel(target, options=[*_OPTIONS, *options])
    named = [("grpc.ssl_target_name_override", security.server_name)] if security.server_name else []
    return grpc.aio.secure_channel(target, security.grpc, options=[*_OPTIONS, *options, *named])


async def knock(host: str, port: int, seconds: float) -> None:
    """Whether anybody listens there: connect, and hang up. Raises OSError (TimeoutError among them).

    Before a call to a replica that may well be down: it costs a tenth of a channel's first try.
    """
    async with asyncio.timeout(seconds):
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, host, port)
    transport.abort()


def unreachable(error: OSError) -> str:
    """Why nobody could be reached, in a few words."""
    if isinstance(error, socket.gaierror | ssl.SSLError) or not error.errno:
        return error.strerror or str(error) or "no answer in time"
    return os.strerror(error.errno)


def describe(error: grpc.aio.AioRpcError) -> str:
    """A failed call in one sentence."""
    details = " ".join((error.details() or "").split())
    return f"{error.code().name}: {details}" if details else str(error.code().name)
