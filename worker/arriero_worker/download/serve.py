"""Status and health of a download on the control port, where the worker's own will be: so whoever follows a pod reads
one stream from the first byte fetched to the last request served.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from arriero.inference.v1 import worker_pb2 as pb
from arriero.inference.v1 import worker_pb2_grpc
from arriero_worker.download.progress import Snapshot

LIVENESS, READINESS = "liveness", "readiness"
_GLANCE = 0.5  # seconds between looks at the progress
_STREAMS = 16
_PHASES = {
    "Starting": pb.PHASE_STARTING,
    "Downloading": pb.PHASE_DOWNLOADING,
    "Failed": pb.PHASE_FAILED,
}


class StatusServer(worker_pb2_grpc.WorkerServicer):
    """Answers Status; whatever else a worker answers is UNIMPLEMENTED."""

    def __init__(self, port: int, look: Callable[[], Snapshot], host: str = "0.0.0.0") -> None:
        """Raises OSError if the port is taken."""
        self._look = look
        self._stopped = threading.Event()
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=_STREAMS, thread_name_prefix="status"), options=[("grpc.so_reuseport", 0)]
        )
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(_Health(), self._server)
        try:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError:
            bound = 0
        if bound != port:
            raise OSError(f"control port {port} is in use")
        self._server.start()

    def stop(self) -> None:
        """Streams get the last state first."""
        self._stopped.set()
        self._server.stop(grace=1.0).wait()

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> Iterator[pb.StatusResponse]:
        told: Snapshot | None = None
        while context.is_active():
            last = self._stopped.is_set()
            seen = self._look()
            if told is None or _matters(seen) != _matters(told):
                yield to_wire(seen)
                told = seen
            if request.once or last:
                return
            self._stopped.wait(_GLANCE)


def to_wire(seen: Snapshot) -> pb.StatusResponse:
    """A download is told as one rank's, for the pod's ranks are not there yet; what failed is not theirs."""
    phase = _PHASES[seen.phase]
    if seen.phase == "Failed":
        return pb.StatusResponse(phase=phase, reason=seen.reason)
    rank = pb.RankStatus(
        phase=phase,
        bytes_loaded=seen.bytes_done,
        bytes_total=seen.bytes_total,
        bytes_per_second=round(seen.bytes_per_second),
        phase_seconds=seen.phase_seconds,
    )
    return pb.StatusResponse(phase=phase, ranks=[rank])


def _matters(seen: Snapshot) -> tuple[object, ...]:
    return seen.phase, seen.bytes_done, seen.bytes_total, seen.reason


class _Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # untyped
    """Alive, and not ready: there is no model yet."""

    def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in ("", LIVENESS, READINESS):
            context.abort(grpc.StatusCode.NOT_FOUND, f"expected {LIVENESS} or {READINESS}, found {request.service!r}")
        answer = health_pb2.HealthCheckResponse
        return answer(status=answer.NOT_SERVING if request.service == READINESS else answer.SERVING)
