"""What probes are told: the engine's verdict, over the standard health service on the control port."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.worker.group.groups import free_port, launch_of

from arriero.inference.v1 import worker_pb2 as pb
from arriero_plan.launch import Launch
from arriero_worker.group.control import Control
from arriero_worker.group.health import PodHealth
from arriero_worker.group.memory import PodMemory

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Face:
    """A leader's HTTP face that answers /health/ready with a status of the test's."""

    def __init__(self) -> None:
        face = self
        self.status = 200

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(face.status if self.path == "/health/ready" else 404)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def face() -> Iterator[Face]:
    made = Face()
    yield made
    made.close()


def launch(http_port: int) -> Launch:
    bare = launch_of(tensor=1, pipeline=2, ranks_per_pod=1)
    pods = tuple(pod.model_copy(update={"http_port": http_port}) for pod in bare.pods)
    return bare.model_copy(update={"pods": pods})


async def check(health: PodHealth, service: str) -> int:
    return int((await health.Check(health_pb2.HealthCheckRequest(service=service), None)).status)


@pytest.mark.parametrize("phase", [pb.PHASE_STARTING, pb.PHASE_LOADING, pb.PHASE_JOINING, pb.PHASE_DRAINING])
async def test_only_a_group_that_serves_is_ready_but_any_is_alive(face: Face, phase: int) -> None:
    now = [phase]
    for pod in (0, 1):
        health = PodHealth(launch(face.port), pod, lambda: pb.StatusResponse(phase=now[0]))
        assert await check(health, "readiness") == NOT_SERVING
        assert await check(health, "liveness") == await check(health, "") == SERVING
        now[0] = pb.PHASE_SERVING
        assert await check(health, "readiness") == SERVING
        now[0] = phase


async def test_a_leader_is_ready_when_its_face_is_and_others_have_none(face: Face) -> None:
    def serving() -> pb.StatusResponse:
        return pb.StatusResponse(phase=pb.PHASE_SERVING)

    face.status = 503
    assert await check(PodHealth(launch(face.port), 0, serving), "readiness") == NOT_SERVING
    assert await check(PodHealth(launch(face.port), 1, serving), "readiness") == SERVING
    nobody = launch(free_port())
    assert await check(PodHealth(nobody, 0, serving), "readiness") == NOT_SERVING
    assert await check(PodHealth(launch(0), 0, serving), "readiness") == SERVING


def test_the_control_port_answers_probes() -> None:
    made = launch(0)
    fd = PodMemory.create("test")
    control = Control(made, 1, PodMemory(PodMemory.path_of(fd), 1))
    control.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{made.pods[1].control_port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            assert stub.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=10).status == SERVING
            assert stub.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=10).status == NOT_SERVING
            with pytest.raises(grpc.RpcError, match="expected liveness or readiness") as error:
                stub.Check(health_pb2.HealthCheckRequest(service="startup"), timeout=10)
            assert error.value.code() == grpc.StatusCode.NOT_FOUND
            with pytest.raises(grpc.RpcError, match="ask Status"):
                next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=10))
    finally:
        control.stop()
        os.close(fd)
