"""What happens when something goes away: the engine, the client, the whole process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import psutil
import pytest
from tests.faces.raw import dechunk, events, parse_response, read_all

from arriero.inference.v1 import inference_pb2 as pb
from arriero.inference.v1 import inference_pb2_grpc
from arriero_faces.process import EXIT_UNUSABLE
from arriero_worker.front.front import FRONT_LIMITS

from .fake_engine import FakeEngine
from .process import front_process
from .replica import Replica, launch_for

LONG = {"messages": [{"role": "user", "content": "one two three four five " * 20}]}


def post_bytes(body: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    data = b""
    while mark not in data:
        part = connection.recv(65536)
        assert part, data
        data += part
    return data


# -- clients


def test_a_client_that_disconnects_ends_its_sequences(replica: Replica) -> None:
    for stream in (False, True):
        replica.call(lambda: replica.engine.hold(5))
        with replica.connect() as connection:
            connection.sendall(post_bytes(LONG | {"stream": stream, "n": 3}))
            replica.wait_for(lambda: len(replica.engine.running) == 3)
            if stream:
                read_until(connection, b'"content":"')
        replica.wait_for(lambda: not replica.engine.running)
        assert {request.id for request in replica.engine.submitted[-3:]} <= set(replica.engine.aborted)
        replica.call(replica.engine.go)


def test_an_abandoned_official_stream_ends_its_sequence(replica: Replica) -> None:
    replica.call(lambda: replica.engine.hold(5))
    with openai.OpenAI(base_url=f"{replica.url}/v1", api_key="x") as client:
        stream = client.chat.completions.create(model="tiny", stream=True, **LONG)  # type: ignore[call-overload]
        next(iter(stream))
        stream.close()
        replica.wait_for(lambda: not replica.engine.running)


def test_a_slow_client_is_coalesced_and_then_cut_off(model: Path, tmp_path: Path) -> None:
    limits = replace(FRONT_LIMITS, stall_seconds=0.5, sweep_seconds=0.05, write_buffer=2048)
    with Replica(model, tmp_path, limits) as replica:
        replica.engine.chunk = 50
        body = {"prompt": "ab", "ignore_eos": True, "max_tokens": 2000, "stream": True, "logprobs": 5, "n": 20}
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(("127.0.0.1", replica.front.http_port))
            connection.sendall(post_bytes(body, "/v1/completions"))
            replica.wait_for(lambda: replica.engine.submitted != [])
            replica.wait_for(lambda: replica.front.http.connections == 0)
        replica.wait_for(lambda: not replica.engine.running)
        assert replica.front.client.running == 0


def test_a_grpc_client_that_does_not_read_is_cut_off(model: Path, tmp_path: Path) -> None:
    with Replica(model, tmp_path, replace(FRONT_LIMITS, stall_seconds=0.5)) as replica:
        replica.engine.chunk = 50
        sampling = pb.SamplingParameters(n=20, logprobs=20, max_tokens=2000, ignore_eos=True)
        with grpc.insecure_channel(replica.target) as channel:
            call = inference_pb2_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="ab", sampling=sampling))
            replica.wait_for(lambda: replica.engine.submitted != [])
            replica.wait_for(lambda: replica.front.grpc.busy == 0)
            assert not replica.engine.running
            with pytest.raises(grpc.RpcError) as error:
                list(call)
            assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_patient_client_gets_all_of_it_though_it_reads_late(replica: Replica) -> None:
    replica.engine.chunk = 100
    body = {"prompt": "ab", "ignore_eos": True, "max_tokens": 2000, "stream": True}
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", replica.front.http_port))
        connection.sendall(post_bytes(body, "/v1/completions"))
        replica.wait_for(lambda: bool(replica.engine.submitted) and not replica.engine.running)
        data = read_until(connection, b"0\r\n\r\n")
    pieces = events(dechunk(data.partition(b"\r\n\r\n")[2]))
    text = "".join(event["choices"][0]["text"] for event in pieces[:-1])
    assert text == ("ab" * 1000)[: len(text)]
    assert pieces[-1] == "[DONE]"
    assert len(pieces) < 2001


def test_output_that_nobody_takes_is_bounded(replica: Replica) -> None:
    from arriero_worker.engine.messages import EngineRequest, SamplingParams
    from arriero_worker.front.engine_client import MAX_PENDING, ConsumerTooSlow, Submission

    def submit() -> Submission:
        client = replica.front.client
        sampling = SamplingParams(max_tokens=10**6, logprobs=20)
        return client.submit([EngineRequest(id=id, prompt=[65, 66], sampling=sampling) for id in client.allocate(8)])

    replica.engine.chunk = 100
    submission = replica.call(submit)
    replica.wait_for(lambda: not replica.engine.running)
    with pytest.raises(ConsumerTooSlow, match=str(MAX_PENDING)):
        replica.call(submission.next)
    assert replica.front.client.running == 0


# -- the engine


def test_the_engine_dies(fresh: Replica) -> None:
    fresh.call(lambda: fresh.engine.hold(5))
    with fresh.connect() as whole, fresh.connect() as stream, grpc.insecure_channel(fresh.target) as channel:
        whole.sendall(post_bytes(LONG))
        stream.sendall(post_bytes(LONG | {"stream": True}))
        call = inference_pb2_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="one two three " * 50))
        fresh.wait_for(lambda: len(fresh.engine.running) == 3)
        fresh.call(lambda: fresh.engine.hold(5))
        begun = read_until(stream, b'"content":"')
        assert next(call).text
        began = time.monotonic()
        fresh.call(fresh.engine.die)
        response = parse_response(read_until(whole, b"}}"))
        assert (response.status, response.json()["error"]["code"]) == (503, "engine_gone")
        assert response.headers["retry-after"] == "1"
        data = (begun + read_all(stream)).partition(b"\r\n\r\n")[2]
        assert time.monotonic() - began < 5
        last = events(dechunk(data))[-2:]
        assert last[0]["error"]["code"] == "engine_gone"
        assert last[0]["error"]["type"] == "service_unavailable_error"
        assert last[1] == "<cut>"
        assert b"[DONE]" not in data
        with pytest.raises(grpc.RpcError) as error:
            list(call)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    ready = fresh.request("GET", "/health/ready")
    assert (ready.status, ready.json()["reason"]) == (503, "the engine is not there")
    assert fresh.post("/v1/chat/completions", LONG).json()["error"]["code"] == "not_ready"
    assert b'arriero_engine_connected{model="tiny"} 0.0' in fresh.request("GET", "/metrics").body
    # and comes back
    replacement = fresh.call(lambda: FakeEngine(fresh.socket_path, fresh.engine.script))
    os.unlink(fresh.socket_path)
    fresh.engine = replacement
    fresh.call(replacement.start)
    fresh.wait_for(lambda: fresh.request("GET", "/health/ready").status == 200)
    assert fresh.post("/v1/chat/completions", LONG).status == 200


def test_no_client_takes_a_broken_stream_for_a_whole_one(fresh: Replica) -> None:
    fresh.call(lambda: fresh.engine.hold(5))
    with openai.OpenAI(base_url=f"{fresh.url}/v1", api_key="x", max_retries=0) as client:
        stream = iter(client.chat.completions.create(model="tiny", stream=True, **LONG))  # type: ignore[call-overload]
        next(stream)
        fresh.call(fresh.engine.die)
        with pytest.raises(openai.APIError, match="the engine went away"):
            list(stream)
    fresh.call(fresh.engine.start)
    fresh.wait_for(lambda: fresh.front.client.status is not None)
    fresh.call(lambda: fresh.engine.hold(5))
    with httpx.stream("POST", f"{fresh.url}/v1/chat/completions", json=LONG | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        fresh.call(fresh.engine.die)
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)


def test_an_engine_that_talks_nonsense_is_dropped(fresh: Replica, caplog: pytest.LogCaptureFixture) -> None:
    def say(data: bytes) -> None:
        for writer in fresh.engine._writers:
            writer.write(data)

    for nonsense in (b"\x05\x00\x00\x00hello", b"\xff\xff\xff\xff"):
        seen = len(caplog.records)
        fresh.call(lambda: say(nonsense))  # noqa: B023
        fresh.wait_for(lambda: any("not a message" in record.message for record in caplog.records[seen:]))  # noqa: B023
        fresh.wait_for(lambda: fresh.front.client.status is not None)
    assert fresh.post("/v1/chat/completions", LONG).status == 200


# -- the process


def serving(grpc_port: int) -> bool:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status
    return bool(status == health_pb2.HealthCheckResponse.SERVING)


def test_sigterm_drains(model: Path, tmp_path: Path) -> None:
    with front_process(model, tmp_path, drain_seconds=30) as (front, http_port, grpc_port, engine, call, log):
        assert "torch" not in str(psutil.Process(front.pid).memory_maps()), "the faces never load torch"
        assert serving(grpc_port)
        url = f"http://127.0.0.1:{http_port}"
        call(lambda: engine.hold(5))
        with socket.create_connection(("127.0.0.1", http_port), timeout=20) as running:
            running.sendall(post_bytes(LONG | {"stream": True}))
            begun = read_until(running, b'"content":"')
            front.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 5
            while (ready := httpx.get(f"{url}/health/ready")).status_code == 200:
                assert time.monotonic() < deadline
            assert ready.json() == ready.json() | {"ready": False, "phase": "Draining", "reason": "draining"}
            assert not serving(grpc_port)
            while not engine.drained:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            refused = httpx.post(f"{url}/v1/chat/completions", json=LONG)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert refused.headers["connection"] == "close"
            assert httpx.get(f"{url}/health/live").status_code == 200
            assert front.poll() is None
            call(engine.go)
            data = (begun + read_all(running)).partition(b"\r\n\r\n")[2]
        assert events(dechunk(data))[-1] == "[DONE]"
        assert front.wait(10) == 0
        lines = log.read_text().splitlines()
        assert all(re.match(r"\d\d:\d\d:\d\d [DIWE] [a-z.-]+ ", line) for line in lines), lines


@pytest.mark.parametrize("how", ["second signal", "time over"])
def test_a_drain_can_be_cut_short(model: Path, tmp_path: Path, how: str) -> None:
    seconds = 60 if how == "second signal" else 0.3
    with front_process(model, tmp_path, drain_seconds=seconds) as (front, http_port, _, engine, call, _):
        call(lambda: engine.hold(5))
        with socket.create_connection(("127.0.0.1", http_port), timeout=20) as running:
            running.sendall(post_bytes(LONG | {"stream": True}))
            read_until(running, b'"content":"')
            front.send_signal(signal.SIGTERM)
            if how == "second signal":
                deadline = time.monotonic() + 5
                while not engine.drained:
                    assert time.monotonic() < deadline
                    time.sleep(0.005)
                front.send_signal(signal.SIGINT)
                time.sleep(0.1)
                assert front.poll() is None, "another kind of signal is the same wish"
                front.send_signal(signal.SIGTERM)
            assert b"[DONE]" not in read_all(running)
        assert front.wait(10) == 0


def test_a_front_that_cannot_start_says_why(model: Path, tmp_path: Path) -> None:
    def run(launch: str) -> tuple[int, str]:
        (tmp_path / "launch.json").write_text(launch)
        command = [sys.executable, "-m", "arriero_worker.front", "--launch", str(tmp_path / "launch.json")]
        done = subprocess.run([*command, "--engine", "/nowhere"], capture_output=True, text=True, timeout=60)
        assert done.stdout == ""
        return done.returncode, done.stderr

    status, message = run("{}")
    assert status == 2
    assert "launch.json: deployment: Field required" in message
    status, message = run(launch_for(tmp_path, tmp_path).model_dump_json())
    assert status == EXIT_UNUSABLE
    assert "tokenizer.json: no such file" in message
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        launch = launch_for(model, tmp_path)
        pod = launch.pods[0].model_copy(update={"http_port": taken.getsockname()[1]})
        status, message = run(launch.model_copy(update={"pods": (pod,)}).model_dump_json())
        assert status == 1
        assert "cannot open the public faces" in message
