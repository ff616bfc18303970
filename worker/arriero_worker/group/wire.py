"""Between the package's own words and those on the wire."""

from __future__ import annotations

from arriero.inference.v1 import worker_pb2 as pb
from arriero_worker.engine.messages import RankStatus
from arriero_worker.group.memory import PHASES

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", 1 << 16),
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A service mesh or proxy setting of the host is not for the ranks of a group.
    ("grpc.enable_http_proxy", 0),
]


def from_wire(status: pb.RankStatus) -> RankStatus:
    return RankStatus(
        status.rank,
        status.pod,
        PHASES[status.phase - 1],
        status.epoch,
        status.step,
        status.bytes_loaded,
        status.bytes_total,
        status.memory_bytes,
        status.reason,
    )


def to_wire(status: RankStatus, phase_seconds: float) -> pb.RankStatus:
    return pb.RankStatus(
        rank=status.rank,
        pod=status.pod,
        phase=PHASES.index(status.phase) + 1,  # type: ignore[arg-type]
        epoch=status.epoch,
        step=status.step,
        bytes_loaded=status.bytes_loaded,
        bytes_total=status.bytes_total,
        memory_bytes=status.memory_bytes,
        reason=status.reason,
        phase_seconds=phase_seconds,
    )
