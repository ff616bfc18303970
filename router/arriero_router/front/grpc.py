"""The gRPC face: arriero.inference.v1.Inference over replicas, with standard health and reflection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from arriero.inference.v1 import inference_pb2 as pb
from arriero_faces.http.errors import HttpError
from arriero_faces.http.server import ANY
from arriero_faces.prefix import NOTHING, grpc_marks
from arriero_router.core.ask import FOREVER
from arriero_router.front.grpc_forward import GrpcForward, unary_attempt
from arriero_router.front.grpc_metadata import Pairs

if TYPE_CHECKING:
    from arriero_router.router import Router
    from arriero_router.security import Certificates

log = logging.getLogger("arriero.grpc")

SERVICE = "arriero.inference.v1.Inference"
_MAX_METADATA = 2 * 1024 * 1024
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class GrpcFace:
    """A grpc.aio server; messages pass through as bytes, but for what the policy and replaying need."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._running = 0
        self._draining: asyncio.Task[None] | None = None
        self.port = 0

    @property
    def busy(self) -> int:
        """Calls being answered."""
        return self._running

    async def start(self, address: str, port: int, certificates: Certificates | None, shared: bool) -> None:
        """Listen. Raises OSError."""
        limits = self._router.config.limits
        self._server = server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", limits.max_body_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", _MAX_METADATA),
                ("grpc.absolute_max_metadata_size", _MAX_METADATA),
                ("grpc.so_reuseport", int(shared)),
                ("grpc.max_connection_idle_ms", 600_000),
                # A client whose host is gone would otherwise hold its calls for ever.
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
            maximum_concurrent_rpcs=limits.max_connections,
        )
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        methods = {
            "Generate": stream(self._generate),
            "Tokenize": unary(self._tokenize),
            "GetModel": unary(self._get_model),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        await self._set_serving(True)
        host = "[::]" if address in ANY else f"[{address}]" if ":" in address else address
        try:
            if certificates is None:
                self.port = server.add_insecure_port(f"{host}:{port}")
            else:
                self.port = server.add_secure_port(f"{host}:{port}", certificates.server_credentials())
        except RuntimeError as error:
            raise OSError(f"cannot listen for gRPC on port {port}: {error}") from error
        await server.start()

    def drain(self) -> None:
        """No longer serving, says the health service; calls go on."""
        self._draining = asyncio.get_running_loop().create_task(self._set_serving(False))

    async def leave(self, seconds: float) -> None:
        """Send clients elsewhere (GOAWAY) and take no call any more; those that run may end within `seconds`."""
        if self._server is not None:
            await self._server.stop(seconds)

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)

    async def _set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set("", status)
        await self._health.set(SERVICE, status)

    # -- methods

    async def _generate(self, data: bytes, context: Any) -> None:
        async def call() -> str:
            request = _parsed(pb.GenerateRequest, data)
            router, metadata = self._router, _metadata(context)
            principal = router.authorize(metadata.get)
            served = router.resolve(request.model, principal)
            sampling = request.sampling
            limit = sampling.max_tokens if sampling.HasField("max_tokens") else router.answer_tokens
            record = router.open(
                face="grpc",
                path=f"/{SERVICE}/Generate",
                peer=_peer(context),
                principal=principal,
                served=served,
                marked=grpc_marks(request),
                answer_tokens=limit * (sampling.n or 1),
                session=metadata.get(served.session_header.decode(), ""),
                priority=request.priority,
                streamed=True,
                trace=metadata.get,
                seconds=_remaining(context),
            )
            forward = GrpcForward(data, request, metadata, context, record)
            try:
                await forward.run(router.hold, router.config.limits.take_seconds)
                record.status = "OK"
            except HttpError as error:
                record.status, record.error = _code(error).name, error.message
                if not forward.begun:
                    record.used = 0
                raise
            except asyncio.CancelledError:
                record.status, record.error = "CANCELLED", "the client went away"
                raise
            finally:
                router.close(record)
            return served.name

        await self._guarded(context, call)

    # Coroutine functions, all of them: anything else grpc.aio would call in a thread.

    async def _tokenize(self, data: bytes, context: Any) -> bytes:
        return await self._unary("Tokenize", pb.TokenizeRequest, data, context)

    async def _get_model(self, data: bytes, context: Any) -> bytes:
        return await self._unary("GetModel", pb.GetModelRequest, data, context)

    async def _unary(self, method: str, kind: Any, data: bytes, context: Any) -> bytes:
        result = b""

        async def call() -> str:
            nonlocal result
            request = _parsed(kind, data)
            router, metadata = self._router, _metadata(context)
            principal = router.authorize(metadata.get)
            served = router.resolve(request.model, principal)
            record = router.open(
                face="grpc",
                path=f"/{SERVICE}/{method}",
                peer=_peer(context),
                principal=principal,
                served=served,
                marked=NOTHING,
                answer_tokens=0,
                session="",
                priority=0,
                streamed=False,
                trace=metadata.get,
                seconds=_remaining(context),
            )
            try:
                result = await unary_attempt(f"/{SERVICE}/{method}", data, metadata, context, record, router.hold)
                record.status = "OK"
            except HttpError as error:
                record.status, record.error = _code(error).name, error.message
                raise
            except asyncio.CancelledError:
                record.status, record.error = "CANCELLED", "the client went away"
                raise
            finally:
                record.used = 0
                router.close(record)
            return served.name

        await self._guarded(context, call)
        return result

    async def _guarded(self, context: Any, call: Callable[[], Awaitable[str]]) -> None:
        """Count the call, and turn errors into statuses."""
        model, status = "", "CANCELLED"
        self._running += 1
        try:
            model = await call()
            status = "OK"
        except HttpError as error:
            code = _code(error)
            status = code.name
            if error.status == 408:
                # A status would wait behind the messages that the client does not take: the call is dropped.
                raise asyncio.CancelledError from error
            trailing: Pairs = list(getattr(error, "trailing", ()))
            if error.retry_after is not None and not any(name == "retry-after" for name, _ in trailing):
                trailing.append(("retry-after", str(max(1, round(error.retry_after)))))
            await context.abort(code, error.message, tuple(trailing))
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception:
            status = "INTERNAL"
            log.exception("failed on a call")
            await context.abort(grpc.StatusCode.INTERNAL, "the server failed on this request")
        finally:
            self._running -= 1
            self._router.metrics.request("grpc", model, status)


def _code(error: HttpError) -> grpc.StatusCode:
    return getattr(error, "grpc_code", None) or _CODES.get(error.status, grpc.StatusCode.INTERNAL)


def _parsed(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise HttpError(400, f"the message is no {kind.DESCRIPTOR.name}") from error


def _metadata(context: Any) -> dict[str, str]:
    """Those that are text; for a key that appears more than once, the last."""
    return {str(key): value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def _remaining(context: Any) -> float:
    seconds = context.time_remaining()
    return FOREVER if seconds is None else max(0.0, float(seconds))


def _peer(context: Any) -> str:
    """The client's address, of "ipv4:127.0.0.1:1234"."""
    return str(context.peer() or "").partition(":")[2].rpartition(":")[0]
