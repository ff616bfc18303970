"""What a download tells while it runs, through the control port, and what it says of a disk that is too small."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from arriero.inference.v1 import worker_pb2 as pb
from arriero.inference.v1 import worker_pb2_grpc

from .program import MIB, Program, checkpoint, found, until
from .servers import Fault, Hub

SOURCE = "hf://meta-llama/tiny@main"
EAGER = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200)]


@pytest.fixture
def hub(seed: int) -> Iterator[Hub]:
    made = Hub(checkpoint(seed, shards=2, shard_bytes=4 * MIB))
    yield made
    made.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_status_follows_the_bytes(hub: Hub, tmp_path: Path) -> None:
    port = free_port()
    program = Program(SOURCE, tmp_path / "model", {"HF_ENDPOINT": hub.main.url}, "--control-port", str(port))
    hub.cdn.limit = 5 * MIB
    process = program.start()
    whole = sum(map(len, hub.files.values()))
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=EAGER) as channel:
        stream = worker_pb2_grpc.WorkerStub(channel).Status(pb.StatusRequest(), wait_for_ready=True, timeout=30)
        told: list[pb.StatusResponse] = []
        for status in stream:
            told.append(status)
            if status.phase == pb.PHASE_DOWNLOADING and status.ranks[0].bytes_loaded > 4 * MIB:
                break
        health = health_pb2_grpc.HealthStub(channel)
        for service, serving in (("liveness", True), ("", True), ("readiness", False)):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == (answer.SERVING if serving else answer.NOT_SERVING), service
        with pytest.raises(grpc.RpcError) as refused:
            next(iter(worker_pb2_grpc.WorkerStub(channel).Drain(pb.DrainRequest())))
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
        once = list(worker_pb2_grpc.WorkerStub(channel).Status(pb.StatusRequest(once=True)))
        assert len(once) == 1
        assert once[0].ranks[0].bytes_total == whole, "known from the first byte on"
        assert once[0].ranks[0].bytes_per_second > 0
        hub.cdn.limit = -1
        told += list(stream)
    assert program.end(process).code == 0
    counts = [status.ranks[0].bytes_loaded for status in told if status.phase == pb.PHASE_DOWNLOADING]
    assert counts == sorted(counts)
    assert counts[-1] == whole, "the last word is that all is there"
    assert {status.phase for status in told} <= {pb.PHASE_STARTING, pb.PHASE_DOWNLOADING}


def test_a_failure_is_the_last_word(hub: Hub, tmp_path: Path) -> None:
    port = free_port()
    hub.cdn.faults.append(Fault("model-00002", times=-1, status=404))
    program = Program(SOURCE, tmp_path / "model", {"HF_ENDPOINT": hub.main.url}, "--control-port", str(port))
    hub.main.limit = 0  # nothing is listed before somebody listens
    process = program.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=EAGER) as channel:
        stream = worker_pb2_grpc.WorkerStub(channel).Status(pb.StatusRequest(), wait_for_ready=True, timeout=30)
        told = [next(stream)]
        hub.main.limit = -1
        told += list(stream)
    ended = program.end(process)
    assert ended.code == 3
    assert told[0].phase == pb.PHASE_STARTING
    assert told[-1].phase == pb.PHASE_FAILED
    assert told[-1].reason == ended.words != ""


def test_progress_goes_on_from_what_was_there(hub: Hub, tmp_path: Path) -> None:
    model, port = tmp_path / "model", free_port()
    program = Program(SOURCE, model, {"HF_ENDPOINT": hub.main.url}, "--control-port", str(port))
    hub.cdn.limit = 6 * MIB
    first = program.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=EAGER) as channel:
        for status in worker_pb2_grpc.WorkerStub(channel).Status(pb.StatusRequest(), wait_for_ready=True, timeout=30):
            if status.ranks[0].bytes_loaded > 5 * MIB:
                break
    first.send_signal(signal.SIGKILL)
    first.communicate()
    served = hub.body_bytes
    hub.cdn.limit = served  # nothing more comes: what is told was there
    second = program.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=EAGER) as channel:
        for status in worker_pb2_grpc.WorkerStub(channel).Status(pb.StatusRequest(), wait_for_ready=True, timeout=30):
            if status.phase == pb.PHASE_DOWNLOADING:
                break
        rank = status.ranks[0]
        assert rank.bytes_loaded > 5 * MIB
        assert rank.bytes_per_second == 0, "what was there says nothing of the speed"
    hub.cdn.limit = -1
    assert program.end(second).code == 0


def test_a_taken_port_is_no_reason_to_fail(hub: Hub, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        program = Program(SOURCE, tmp_path / "model", {"HF_ENDPOINT": hub.main.url}, "--control-port", str(port))
        ended = program.run()
    assert ended.code == 0
    assert f"control port {port} is in use: progress is told here only" in ended.out


def on_small_disk(directory: Path, size: str) -> tuple[str, ...]:
    """Begins a command such that `directory` is a disk of its own, which ends with the process."""
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    script = 'mount -t tmpfs -o size="$1" none "$2" && shift 2 && exec "$@"'
    return (*unshare, "sh", "-c", script, "sh", size, str(directory))


@pytest.mark.skipif(sys.platform != "linux", reason="a small disk is a mount namespace's")
def test_a_disk_that_is_too_small_is_told_before_the_first_byte(hub: Hub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    ended = Program(SOURCE, model, {"HF_ENDPOINT": hub.main.url}).run(prefix=on_small_disk(model, "6m"))
    assert ended.code == 1
    # The index was needed to know.
    assert ended.words == f"{SOURCE}: 8.3 MiB are still to come, and the volume has 6.0 MiB free"
    assert hub.body_bytes == 0


@pytest.mark.skipif(sys.platform != "linux", reason="a small disk is a mount namespace's")
def test_a_disk_that_others_fill_is_told(hub: Hub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    hub.cdn.limit = 2 * MIB
    program = Program(SOURCE, model, {"HF_ENDPOINT": hub.main.url})
    process = program.start(prefix=on_small_disk(model, "10m"))
    until(lambda: hub.body_bytes >= 2 * MIB, "2 MiB served")
    (Path(f"/proc/{process.pid}/root") / model.relative_to("/") / "filler").write_bytes(bytes(6 * MIB))
    hub.cdn.limit = -1
    ended = program.end(process)
    assert ended.code == 1
    assert ended.words.startswith("the volume is full: ")
    assert " of 8.3 MiB (" in ended.words


def test_lines_of_progress_tell_rate_and_time_left(hub: Hub, tmp_path: Path) -> None:
    hub.cdn.limit = 3 * MIB
    program = Program(SOURCE, tmp_path / "model", {"HF_ENDPOINT": hub.main.url}, "--interval", "0.05")
    process = program.start()
    assert process.stdout is not None
    lines = iter(process.stdout)
    line = next(line for line in lines if re.match(r"[23]\.\d MiB ", line))
    assert re.fullmatch(r"[23]\.\d MiB of 8\.3 MiB \(\d\d%\), [\d.]+ [MK]iB/s, [\d.]+ \w+ left, \d of 8 files\n", line)
    hub.cdn.limit = -1
    assert "complete: " in list(lines)[-1]
    assert program.end(process).code == 0
    assert found(tmp_path / "model") == hub.files
