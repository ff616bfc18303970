"""A whole replica as real processes: one `arriero-worker` per pod, as `arriero up` or a cluster would start them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil

from arriero.inference.v1 import worker_pb2 as pb
from arriero.inference.v1 import worker_pb2_grpc
from arriero_plan.launch import EngineSettings, Launch, Layout, Pod, Stage

_PATIENCE = 120.0


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


def stages_of(layers: int, pipeline: int) -> tuple[Stage, ...]:
    edges = [layers * i // pipeline for i in range(pipeline + 1)]
    return tuple(Stage(first_layer=first, end_layer=end) for first, end in pairwise(edges))


def launch_replica(
    model: Path,
    run_directory: str,
    *,
    layers: int,
    tensor: int = 1,
    pipeline: int = 1,
    ranks_per_pod: int | None = None,
    drain_seconds: float = 30,
    name: str = "tiny",
    **engine: Any,
) -> Launch:
    """One pod per stage unless `ranks_per_pod` says otherwise; `engine` overrides EngineSettings."""
    per_pod = ranks_per_pod or tensor
    count = tensor * pipeline // per_pod
    http, rpc, store, *control = free_ports(3 + count)
    pods = [
        Pod(
            host="127.0.0.1",
            ranks=tuple(range(i * per_pod, (i + 1) * per_pod)),
            control_port=control[i],
            store_port=store,
            http_port=http,
            grpc_port=rpc,
        )
        for i in range(count)
    ]
    settings: dict[str, Any] = {"dtype": "float32", "max_context": 256, "kv_blocks": 256, "max_running": 64}
    return Launch(
        deployment="test",
        group="test-0",
        model_path=str(model),
        served_names=(name,),
        layout=Layout(tensor=tensor, pipeline=pipeline, stages=stages_of(layers, pipeline)),
        pods=tuple(pods),
        engine=EngineSettings(**{**settings, **engine}),
        drain_seconds=drain_seconds,
        run_directory=run_directory,
    )


class Replica:
    """A context: on entry the replica is ready; on exit its processes are gone."""

    def __init__(self, model: Path, *, layers: int, wait: bool = True, **options: Any) -> None:
        self._directory = tempfile.mkdtemp(prefix="arriero-test-")
        self.launch = launch_replica(model, os.path.join(self._directory, "run"), layers=layers, **options)
        self.launch_path = os.path.join(self._directory, "launch.json")
        Path(self.launch_path).write_text(self.launch.model_dump_json())
        self._wait = wait
        self.pods: list[subprocess.Popen[bytes] | None] = [None] * len(self.launch.pods)
        self.log = Path(self._directory, "log")
        self.url = f"http://127.0.0.1:{self.launch.pods[0].http_port}"
        self.grpc_address = f"127.0.0.1:{self.launch.pods[0].grpc_port}"

    def __enter__(self) -> Replica:
        try:
            for index in range(len(self.pods)):
                self.start_pod(index)
            if self._wait:
                self.await_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for pod in self.pods:
            if pod is not None:
                pod.kill()
                pod.wait()
        shutil.rmtree(self._directory)

    def start_pod(self, index: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "arriero_worker", "--launch", self.launch_path, "--pod-index", str(index)]
        with open(self.log, "ab") as log:
            pod = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.pods[index] = pod
        return pod

    def stub(self, pod: int = 0) -> worker_pb2_grpc.WorkerStub:
        return worker_pb2_grpc.WorkerStub(grpc.insecure_channel(f"127.0.0.1:{self.launch.pods[pod].control_port}"))

    def status(self) -> pb.StatusResponse:
        return next(self.stub().Status(pb.StatusRequest(once=True), timeout=10))

    def await_ready(self, epoch: int = 1) -> None:
        """Until the faces are ready and the group serves epoch `epoch` or a later one."""

        def ready() -> bool:
            for index, pod in enumerate(self.pods):
                code = None if pod is None else pod.poll()
                assert code is None, f"pod {index} ended with {code}:\n{self.log.read_text()}"
            try:
                if httpx.get(f"{self.url}/health/ready", timeout=5).status_code != 200:
                    return False
                status = self.status()
            except (httpx.HTTPError, grpc.RpcError):
                return False
            return status.phase == pb.PHASE_SERVING and status.epoch >= epoch

        self.until(ready, "the replica to be ready")

    def until(self, condition: Any, what: str) -> None:
        limit = time.monotonic() + _PATIENCE
        while not condition():
            assert time.monotonic() < limit, f"waited {_PATIENCE:g} s for {what}:\n{self.log.read_text()}"
            time.sleep(0.02)

    def process_of(self, rank: int) -> psutil.Process:
        pod = self.pods[self.launch.pod_of(rank)]
        assert pod is not None
        wanted = f"arriero-rank{rank}"
        for process in psutil.Process(pod.pid).children(recursive=True):
            if process.name() == wanted:
                return process
        raise LookupError(f"no process {wanted}")

    def kill_rank(self, rank: int) -> None:
        self.process_of(rank).send_signal(signal.SIGKILL)
