"""A router process from its start to its end: signals, reload, several processes, exit statuses."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.faces.raw import events, parse_response, read_all
from tests.router.mocks import MODEL, MockReplica, text_of
from tests.router.router_process import Backend, RouterProcess, config, parse_metrics
from tests.worker.replica import free_ports

from .running import PATIENCE, TEXT, ask, prompt, request, send, until


@pytest.fixture(scope="module")
def mock() -> Iterator[MockReplica]:
    with MockReplica("a", *free_ports(1)) as replica:
        yield replica


@contextmanager
def process(mock: MockReplica, tmp_path: Path, grpc: bool = False, **changes: Any) -> Iterator[RouterProcess]:
    """The router as a program, with its configuration at tmp_path/router.yaml."""
    port, rpc = free_ports(2)
    router = RouterProcess(
        lambda _: [sys.executable, "-m", "arriero_router", "--config", str(tmp_path / "router.yaml")], port, rpc * grpc
    )
    write(mock, tmp_path, port, rpc * grpc, **changes)
    with router:
        yield router


def write(mock: MockReplica, tmp_path: Path, port: int, rpc: int = 0, **changes: Any) -> None:
    text = config(MODEL, [Backend("a", mock.http_port)], port, rpc, **{"leaveSeconds": 0, **changes})
    (tmp_path / "router.yaml").write_text(text)


def signalled(router: RouterProcess, number: int) -> None:
    assert router.process is not None
    router.process.send_signal(number)


def models(mock: MockReplica, *names: str, **fields: Any) -> list[dict[str, Any]]:
    place = {"host": "127.0.0.1", "httpPort": mock.http_port, "grpcPort": 0, "controlPort": 0}
    return [{"name": name, "endpoints": {"static": [place]}, **fields} for name in names]


def streaming(router: RouterProcess, tokens: int = 60, pace: int = 20_000, **fields: Any) -> socket.socket:
    """A client whose stream has begun."""
    client = send(router.http_port, request(TEXT, prompt(tokens, f"pace={pace}", stream=True, **fields)))
    client.recv(10, socket.MSG_PEEK)
    return client


def text(client: socket.socket) -> str:
    """What it was told to the end, which must be a sound one."""
    with client:
        found = events(parse_response(read_all(client)).body)
    assert found[-1] == "[DONE]"
    return "".join(event["choices"][0]["text"] for event in found[:-1])


def test_a_stopped_router_lets_streams_end(mock: MockReplica, tmp_path: Path) -> None:
    with process(mock, tmp_path) as router:
        assert router.process is not None
        client = streaming(router)
        with send(router.http_port, request("/health/live", close=False)) as kept:
            assert kept.recv(1000).startswith(b"HTTP/1.1 200")
            signalled(router, signal.SIGTERM)
            until(lambda: ask(router.http_port, "/health/ready").status == 503, "it drains")
            assert kept.recv(1000) == b"", "an idle connection has nothing to lose"
        assert router.process.poll() is None
        assert text(client) == text_of(60)
        assert router.process.wait(PATIENCE) == 0


def test_a_second_signal_stops_at_once(mock: MockReplica, tmp_path: Path) -> None:
    with process(mock, tmp_path) as router:
        assert router.process is not None
        client = streaming(router, 10_000, 100_000)
        signalled(router, signal.SIGTERM)
        until(lambda: ask(router.http_port, "/health/ready").status == 503, "it drains")
        signalled(router, signal.SIGTERM)
        assert router.process.wait(PATIENCE) == 0
        with client:
            assert b"[DONE]" not in read_all(client)


def test_the_time_for_draining_is_bounded(mock: MockReplica, tmp_path: Path) -> None:
    with process(mock, tmp_path, drainSeconds=0.3) as router:
        assert router.process is not None
        with streaming(router, 10_000, 100_000):
            signalled(router, signal.SIGINT)
            assert router.process.wait(PATIENCE) == 0
        assert "1 requests are cut off" in router.last_words()


def test_models_come_and_go_without_a_stream_dropped(mock: MockReplica, tmp_path: Path) -> None:
    def listed() -> list[str]:
        return [card["id"] for card in ask(router.http_port, "/v1/models").json()["data"]]

    with process(mock, tmp_path, models=models(mock, "one", "two")) as router:
        clients = [streaming(router, model=name) for name in ("one", "two", "one")]
        write(mock, tmp_path, router.http_port, models=models(mock, "three", "one", policy="round-robin"))
        signalled(router, signal.SIGHUP)
        until(lambda: listed() == ["three", "one"], "the new ones are there")
        assert ask(router.http_port, TEXT, prompt(2, model="two")).status == 404
        for name in ("one", "three"):
            assert ask(router.http_port, TEXT, prompt(2, model=name)).status == 200
        for client in clients:
            assert text(client) == text_of(60)

        def told() -> set[str]:
            text = ask(router.http_port, "/metrics").body.decode()
            return {labels["model"] for name, labels, _ in parse_metrics(text) if name == "arriero_router_held"}

        until(lambda: told() == {"one", "three"}, "the one that went is forgotten")
        assert "Traceback" not in router.last_words(), router.last_words()


def test_a_bad_file_changes_nothing(mock: MockReplica, tmp_path: Path) -> None:
    with process(mock, tmp_path) as router:
        client = streaming(router)
        path = tmp_path / "router.yaml"
        for bad in ("{", "models: []", path.read_text().replace("httpPort", "httpsPort", 1)):
            path.write_text(bad)
            asked = router.last_words().count("stays as it was")
            signalled(router, signal.SIGHUP)
            until(lambda asked=asked: router.last_words().count("stays as it was") > asked, "it says so")  # type: ignore[misc]
        path.unlink()
        signalled(router, signal.SIGHUP)
        until(lambda: "No such file" in router.last_words(), "it says so")
        assert ask(router.http_port, TEXT, prompt(2)).status == 200
        assert text(client) == text_of(60)


def test_what_needs_a_restart_is_said(mock: MockReplica, tmp_path: Path) -> None:
    with process(mock, tmp_path) as router:
        write(mock, tmp_path, router.http_port + 1, limits={"maxBodyBytes": 2048}, workers=2)
        signalled(router, signal.SIGHUP)
        until(lambda: "reloaded" in router.last_words(), "it is read")
        assert "listen.httpPort changed" in router.last_words()
        assert "workers changed from 1 to 2: that takes a restart" in router.last_words()
        assert ask(router.http_port, TEXT, b"x" * 4000).status == 413, "limits hold for new connections"


def test_the_access_log_is_opened_again(mock: MockReplica, tmp_path: Path) -> None:
    path = tmp_path / "log" / "access.log"
    path.parent.mkdir()

    def lines(file: Path) -> list[str]:
        return [json.loads(line)["request_id"] for line in file.read_text().splitlines()] if file.exists() else []

    with process(mock, tmp_path, accessLog={"path": str(path)}) as router:
        ask(router.http_port, TEXT, prompt(1), "x-request-id: r1")
        until(lambda: lines(path) == ["r1"], "it is written")
        path.rename(tmp_path / "old.log")
        signalled(router, signal.SIGHUP)
        until(path.exists, "it is opened again")
        ask(router.http_port, TEXT, prompt(1), "x-request-id: r2")
        until(lambda: lines(path) == ["r2"], "it is written")
        path.unlink()
        path.parent.rename(tmp_path / "gone")
        signalled(router, signal.SIGHUP)
        until(lambda: "the access log cannot be opened again" in router.last_words(), "it says so")
        assert ask(router.http_port, TEXT, prompt(1)).status == 200
        write(mock, tmp_path, router.http_port, accessLog={"path": str(tmp_path / "new.log")})
        signalled(router, signal.SIGHUP)
        until((tmp_path / "new.log").exists, "another file may be named")
        ask(router.http_port, TEXT, prompt(1), "x-request-id: r3")
        until(lambda: lines(tmp_path / "new.log") == ["r3"], "it is written")
        assert lines(tmp_path / "old.log") == ["r1"]


def test_several_processes_are_one_router(mock: MockReplica, tmp_path: Path) -> None:
    with process(mock, tmp_path, grpc=True, workers=2) as router:
        assert router.process is not None
        parent = psutil.Process(router.process.pid)
        until(lambda: router.last_words().count("listening") == 2, "both listen")
        for _ in range(40):
            assert ask(router.http_port, TEXT, prompt(1)).status == 200

        def told(name: str, **labels: str) -> float:
            found = parse_metrics(ask(router.http_port, "/metrics").body.decode())
            return sum(value for key, has, value in found if key == name and labels.items() <= has.items())

        for _ in range(10):  # whichever is asked
            assert told("arriero_router_requests_total", model=MODEL) == 40
            assert told("arriero_router_added_latency_seconds_count") == 40
            assert told("arriero_router_replica_ready") == 1, "what both see alike is not added up"
        children = parent.children()
        assert len(children) == 2
        children[0].kill()
        until(
            lambda: len(alive(parent)) == 2 and children[0].pid not in [c.pid for c in alive(parent)], "started again"
        )
        until(lambda: router.last_words().count("listening") == 3, "it listens")
        for _ in range(20):
            assert ask(router.http_port, TEXT, prompt(1)).status == 200
        client = streaming(router)
        signalled(router, signal.SIGTERM)
        assert text(client) == text_of(60)
        assert router.process.wait(PATIENCE) == 0
        assert "Traceback" not in router.last_words(), router.last_words()


def alive(parent: psutil.Process) -> list[psutil.Process]:
    return [child for child in parent.children() if child.status() != psutil.STATUS_ZOMBIE]


def test_all_processes_end_with_their_parent(mock: MockReplica, tmp_path: Path) -> None:
    with process(mock, tmp_path, workers=2) as router:
        assert router.process is not None
        children = psutil.Process(router.process.pid).children()
        assert len(children) == 2
        router.process.kill()
        psutil.wait_procs(children, timeout=PATIENCE)
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_all_processes_take_a_new_configuration(mock: MockReplica, tmp_path: Path) -> None:
    with process(mock, tmp_path, workers=2) as router:
        until(lambda: router.last_words().count("listening") == 2, "both listen")
        write(mock, tmp_path, router.http_port, workers=2, models=models(mock, "new"))
        signalled(router, signal.SIGHUP)
        until(lambda: router.last_words().count("reloaded") == 2, "both have read it")
        for _ in range(20):
            assert ask(router.http_port, "/v1/models").json()["data"][0]["id"] == "new"


def run(*arguments: str) -> tuple[int, str]:
    """Exit status and all that was said."""
    done = subprocess.run(
        [sys.executable, "-m", "arriero_router", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_wrong_usage_is_2(mock: MockReplica, tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    status, said = run("--config", str(path))
    assert (status, "No such file" in said) == (2, True)
    write(mock, tmp_path, 8000, tls={"certFile": "none.pem", "keyFile": "none.pem"})
    status, said = run("--config", str(path))
    assert (status, "none.pem" in said, "Traceback" in said) == (2, True, False)
    write(mock, tmp_path, 8000, auth={"keysFile": "none.yaml"})
    status, said = run("--config", str(path))
    assert (status, "none.yaml" in said, "Traceback" in said) == (2, True, False)


def test_a_configuration_can_be_checked(mock: MockReplica, tmp_path: Path) -> None:
    write(mock, tmp_path, 8000)
    status, said = run("--config", str(tmp_path / "router.yaml"), "--check")
    assert (status, "is valid: 1 models" in said) == (0, True)


@pytest.mark.parametrize(("workers", "face"), [(1, "http"), (2, "grpc")])
def test_a_port_in_use_is_1(mock: MockReplica, tmp_path: Path, workers: int, face: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken, free = other.getsockname()[1], free_ports(1)[0]
        ports = (taken, 0) if face == "http" else (free, taken)
        write(mock, tmp_path, *ports, workers=workers)
        began = time.monotonic()
        status, said = run("--config", str(tmp_path / "router.yaml"))
        assert status == 1, said
        assert "cannot start" in said
        assert "Traceback" not in said
        assert time.monotonic() - began < 30
