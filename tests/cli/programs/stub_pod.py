"""A pod without a model: it speaks Worker.Status and, as the leader, answers requests over HTTP with what was asked.

The test steers it through ARRIERO_STUB, a JSON object:
  hold     stay at half of the weights until this file is there
  pause    stay within each answer until this file is there
  refuse   reason for which the ranks of pod 1 fail for good
  early    the same before the control port is there: only the log tells
  child    leave a process behind that outlives the pod
  endless  never finish draining
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc

from arriero.inference.v1 import worker_pb2 as pb
from arriero.inference.v1 import worker_pb2_grpc
from arriero_plan.launch import Launch, parse_launch

WEIGHTS = 4 << 20
DONE = b"data: [DONE]\n\n"


class Pod(worker_pb2_grpc.WorkerServicer):
    def __init__(self, launch: Launch, index: int) -> None:
        self.launch, self.index = launch, index
        self.changed = threading.Condition()
        self.phase, self.loaded, self.reason = pb.PHASE_STARTING, 0, ""
        self.requests = 0
        self.failure_told = threading.Event()

    def enter(self, phase: pb.Phase, loaded: int = 0, reason: str = "") -> None:
        with self.changed:
            self.phase, self.loaded, self.reason = phase, loaded, reason
            self.changed.notify_all()

    def status(self) -> pb.StatusResponse:
        known = range(self.launch.layout.world) if self.index == 0 else self.launch.pods[self.index].ranks
        ranks = [
            pb.RankStatus(
                rank=rank,
                pod=self.launch.pod_of(rank),
                phase=self.phase,
                epoch=7,
                bytes_loaded=self.loaded,
                bytes_total=WEIGHTS,
                reason=self.reason,
            )
            for rank in known
        ]
        return pb.StatusResponse(phase=self.phase, epoch=7, ranks=ranks, running=self.requests)

    def Status(self, request, context):
        last = None
        while context.is_active():
            with self.changed:
                if (now := self.status()) == last:
                    self.changed.wait(0.1)
                    continue
            yield now
            last = now
            if now.phase == pb.PHASE_FAILED:
                self.failure_told.set()


def faces(pod: Pod, pause: Path | None) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200 if pod.phase == pb.PHASE_SERVING and self.path == "/health/ready" else 503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
            answer = f"data: {json.dumps([self.path, body['model'], asked, pod.launch.group])}\n\n".encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Content-Length", str(len(answer) + len(DONE)))
            self.end_headers()
            self.wfile.write(answer)
            while pause is not None and not pause.exists():
                time.sleep(0.02)
            self.wfile.write(DONE)

        def log_message(self, *args: object) -> None:
            pass

    return Handler


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--launch", type=Path, required=True)
    parser.add_argument("--pod-index", type=int, required=True)
    options = parser.parse_args()
    launch, index = parse_launch(options.launch.read_text(), "launch"), options.pod_index
    steer = json.loads(os.environ.get("ARRIERO_STUB", "{}"))
    leaving = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: leaving.set())
    run = Path(launch.run_directory)
    with (run / f"pids-{index}").open("a") as pids:
        pids.write(f"{os.getpid()}\n")
        if "child" in steer:
            pids.write(f"{subprocess.Popen(['sleep', '600'], start_new_session=True).pid}\n")
    (run / f"environment-{index}.json").write_text(json.dumps(dict(os.environ)))
    print(f"12:00:00 I stub pod {index} is up", flush=True)
    print(f"12:00:00 W stub a warning of pod {index}", flush=True)

    if index == 1 and "early" in steer:
        print(f"12:00:00 E arriero.rank {steer['early']}\n12:00:00 W arriero.pod going\n", flush=True)
        return 3

    pod = Pod(launch, index)
    control = grpc.server(ThreadPoolExecutor(8))
    worker_pb2_grpc.add_WorkerServicer_to_server(pod, control)
    control.add_insecure_port(f"127.0.0.1:{launch.pods[index].control_port}")
    control.start()
    pod.enter(pb.PHASE_LOADING, WEIGHTS // 2)
    while "hold" in steer and not Path(steer["hold"]).exists():
        time.sleep(0.02)
    if index == 1 and "refuse" in steer:
        pod.enter(pb.PHASE_FAILED, reason=steer["refuse"])
        pod.failure_told.wait(20)
        control.stop(0.3).wait()
        return 3
    pod.enter(pb.PHASE_SERVING, WEIGHTS)
    if index == 0:
        address = ("127.0.0.1", launch.pods[0].http_port)
        pause = Path(steer["pause"]) if "pause" in steer else None
        threading.Thread(target=ThreadingHTTPServer(address, faces(pod, pause)).serve_forever, daemon=True).start()
    leaving.wait()
    pod.requests = 3
    pod.enter(pb.PHASE_DRAINING, WEIGHTS)
    while "endless" in steer:
        signal.pause()
    control.stop(0.3).wait()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
