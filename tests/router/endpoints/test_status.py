"""Following Worker.Status: what a replica says arrives at once, and so does its silence."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import pytest
from tests.router.endpoints.fakes import Replica, Told, replica, running, until, wire

from arriero.inference.v1 import worker_pb2 as pb
from arriero_router.core.replica import Endpoint
from arriero_router.endpoints.status import StatusFollower, StatusLimits, report_of

BRISK = StatusLimits(silence=0.2, answer=0.5)


def endpoint(port: int, name: str = "a") -> Endpoint:
    return Endpoint(name=name, host="127.0.0.1", http_port=1, control_port=port)


@pytest.mark.parametrize(
    ("phase", "ready", "draining", "reason"),
    [
        (pb.PHASE_STARTING, False, False, "starting"),
        (pb.PHASE_LOADING, False, False, "loading"),
        (pb.PHASE_WARMING, False, False, "warming"),
        (pb.PHASE_JOINING, False, False, "joining"),
        (pb.PHASE_SERVING, True, False, ""),
        (pb.PHASE_DRAINING, False, True, "draining"),
        (pb.PHASE_FAILED, False, False, "failed"),
        (77, False, False, "phase 77"),
    ],
)
def test_only_a_serving_replica_is_ready(phase: Any, ready: bool, draining: bool, reason: str) -> None:
    report = report_of(pb.StatusResponse(phase=phase))
    assert (report.ready, report.draining, report.reason) == (ready, draining, reason)


def test_a_report_carries_load_and_life() -> None:
    status = pb.StatusResponse(phase=pb.PHASE_SERVING, running=3, waiting=2, kv_blocks=200, kv_blocks_used=50, run="x")
    report = report_of(status)
    assert (report.running, report.waiting, report.kv_used, report.run) == (3, 2, 0.25, "x")
    assert report_of(pb.StatusResponse()).kv_used == 0.0
    assert report_of(pb.StatusResponse(phase=pb.PHASE_FAILED, reason="no memory")).reason == "failed: no memory"


async def test_every_status_is_told() -> None:
    told = Told()
    async with replica() as server, running(StatusFollower(endpoint(server.port), told).run()):
        await told.until(lambda: told.ready("a"))
        await server.set(running=4)
        await told.until(lambda: told.reports["a"].running == 4)
        await server.set(phase=pb.PHASE_DRAINING)
        await told.until(lambda: told.reports["a"].draining)
        await server.set(phase=pb.PHASE_SERVING, run="2")
        await told.until(lambda: told.ready("a") and told.reports["a"].run == "2")
    assert told.losses == []


async def test_a_stopped_replica_is_lost_and_taken_back_within_a_second() -> None:
    told = Told()
    async with replica() as server, running(StatusFollower(endpoint(server.port), told).run()):
        await told.until(lambda: told.ready("a"))
        for _ in range(3):
            losses = len(told.losses)
            await server.stop()
            await told.until(lambda losses=losses: len(told.losses) > losses)
            await asyncio.sleep(0.7)  # long enough for the waits between tries to be at their longest
            await server.start()
            began = time.monotonic()
            await told.until(lambda: told.ready("a"))
            took = time.monotonic() - began
            print(f"told {took * 1000:.0f} ms after the restart")
            assert took < 1.0
    assert len(told.losses) == 3, "a loss is told once, however many tries fail"


async def test_a_replica_that_is_not_there_yet_is_lost_with_the_reason_and_found_later() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    told = Told()
    async with running(StatusFollower(endpoint(port), told).run()):
        await told.until(lambda: told.losses)
        assert told.losses == [("a", "Connection refused")]
        server = Replica()
        server.port = port
        await server.start()
        try:
            await told.until(lambda: told.ready("a"))
        finally:
            await server.stop()


async def test_a_quiet_replica_is_asked_and_kept() -> None:
    told = Told()
    async with replica() as server, running(StatusFollower(endpoint(server.port), told, BRISK).run()):
        await told.until(lambda: told.ready("a"))
        await until(lambda: server.asked >= 3)
        await server.set(running=1)
        await told.until(lambda: told.reports["a"].running == 1)
    assert told.losses == []


async def test_a_host_that_dies_in_silence_is_lost() -> None:
    told = Told()
    async with (
        replica() as server,
        wire(server.port) as line,
        running(StatusFollower(endpoint(line.port), told, BRISK).run()),
    ):
        await told.until(lambda: told.ready("a"))
        line.freeze()
        await told.until(lambda: told.losses, 10)
        assert told.losses == [("a", "silent for 0.7 s")]
        line.thaw()
        await told.until(lambda: told.ready("a"))
    assert len(told.losses) == 1


async def test_a_replica_that_takes_calls_and_says_nothing_is_lost() -> None:
    told = Told()
    async with replica() as server:
        server.mute = True
        async with running(StatusFollower(endpoint(server.port), told, BRISK).run()):
            await told.until(lambda: told.losses)
            assert told.losses == [("a", "no word within 0.5 s")]
            server.mute = False
            await told.until(lambda: told.ready("a"))


async def test_what_is_no_grpc_server_is_lost() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    told = Told()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, running(StatusFollower(endpoint(server.sockets[0].getsockname()[1]), told, BRISK).run()):
        await told.until(lambda: told.losses)
    assert told.reports == {}


def test_the_defaults_notice_a_dead_host_within_five_seconds() -> None:
    limits = StatusLimits()
    assert limits.silence + limits.answer <= 5
    assert limits.longest_wait < 0.5
