"""`arriero up`: real processes, a real control port, a real terminal; the pods' program is a stub."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
from tests.cli.processes import PATIENCE, child, eventually, first_event, is_there, pids

from arriero_cli.errors import CommandError
from arriero_cli.local import check_installed, process_environment
from arriero_cli.main import main
from arriero_plan.launch import parse_launch

RUN_UP = Path(__file__).parent / "programs" / "run_up.py"
PORTS = ("--http-port", "0", "--grpc-port", "0")


def test_serves_shows_each_rank_and_drains(start, deployment_file, tmp_path):
    run = tmp_path / "run"
    go = tmp_path / "go"
    up = start(RUN_UP, deployment_file(), *PORTS, "--run-dir", run, ARRIERO_STUB=json.dumps({"hold": str(go)}))
    ranks = list(enumerate(["stage 0, tensor 0", "stage 0, tensor 1", "stage 1, tensor 0", "stage 1, tensor 1"]))
    for rank, place in ranks:
        up.wait_for(f"rank {rank} \\({place}\\): starting\n")
        up.wait_for(f"rank {rank} \\({place}\\): loading, 2.0 of 4.0 MiB\n")
    assert "ready" not in up.output
    go.touch()
    up.wait_for("Ctrl-C finishes")
    for rank, place in ranks:
        up.wait_for(f"rank {rank} \\({place}\\): serving, epoch 7\n")
    assert "org/small is ready after" in up.output
    assert "tensor 2 x pipeline 2, 4 ranks in 2 pods" in up.output
    assert "\x1b" not in up.output
    assert "a warning of pod 1" in up.output
    assert "is up" not in up.output

    curl = up.wait_for(r"  (curl .*)\n")[1]
    answer = subprocess.run(shlex.split(curl), capture_output=True, text=True, check=True).stdout
    path, model, asked, group = first_event(answer)
    assert (path, model, group) == ("/v1/chat/completions", "org/small", "small-0")
    assert "capital" in asked

    launch = parse_launch((run / "replica-0" / "launch.json").read_text(), "launch")
    assert launch.model_path == str(tmp_path / "checkpoint")
    assert {pod.host for pod in launch.pods} == {"127.0.0.1"}
    assert f"127.0.0.1:{launch.pods[0].http_port}" not in curl
    assert "pod 1 is up" in (run / "replica-0" / "pod-1.log").read_text()
    assert "listening" in (run / "router.log").read_text()

    os.kill(up.pid, signal.SIGINT)
    assert up.end() == 0
    assert up.output.rstrip().endswith("drained")
    assert "3 requests left" in up.output
    assert json.loads((run / "access.log").read_text())["path"] == "/v1/chat/completions"
    assert not any(is_there(pid) for pid in pids(run))


def test_leaves_no_directory_behind(start, deployment_file, tmp_path):
    up = start(RUN_UP, deployment_file(), *PORTS, TMPDIR=str(tmp_path))
    up.wait_for("is ready")
    (run,) = tmp_path.glob("arriero-up-*")
    assert run.stat().st_mode & 0o777 == 0o700
    left = pids(run)
    assert len(left) == 2
    os.kill(up.pid, signal.SIGTERM)
    assert up.end() == 0
    assert list(tmp_path.glob("arriero-up-*")) == []
    assert not any(is_there(pid) for pid in left)


def test_second_ctrl_c_stops_at_once(start, deployment_file, tmp_path):
    run = tmp_path / "run"
    steer = json.dumps({"endless": True, "child": True})
    up = start(RUN_UP, deployment_file(), *PORTS, "--run-dir", run, terminal=True, ARRIERO_STUB=steer)
    up.wait_for("Ctrl-C finishes")
    up.type("\x03")
    up.wait_for("draining, for at most 5 s")
    assert up.process.poll() is None
    deadline = time.monotonic() + PATIENCE
    while up.process.poll() is None:  # two signals at the same moment would be one wish
        up.type("\x03")
        time.sleep(0.1)
        assert time.monotonic() < deadline
    assert up.end() == 130
    left = pids(run)
    assert len(left) == 4
    assert not any(is_there(pid) for pid in left)


def test_ctrl_c_before_it_is_ready_leaves(start, deployment_file, tmp_path):
    run = tmp_path / "run"
    steer = json.dumps({"hold": str(tmp_path / "never")})
    up = start(RUN_UP, deployment_file(), *PORTS, "--run-dir", run, ARRIERO_STUB=steer)
    up.wait_for("loading, ")
    os.kill(up.pid, signal.SIGINT)
    assert up.end() == 0
    assert not any(is_there(pid) for pid in pids(run))


def test_lost_pod_is_started_again_and_its_processes_do_not_stay(start, deployment_file, tmp_path):
    run = tmp_path / "run"
    up = start(RUN_UP, deployment_file(), *PORTS, "--run-dir", run, ARRIERO_STUB='{"child": true}')
    up.wait_for("Ctrl-C finishes")
    leader, left = map(int, (run / "replica-0" / "pids-0").read_text().split())
    seen = len(up.output)
    os.kill(leader, signal.SIGKILL)
    up.wait_for(r"pod 0 ended \(SIGKILL\); it starts again at once")
    up.wait_for("pod 0 was started again")
    up.wait_for(r"rank 0 .*: serving", seen)
    up.wait_for("serving again after", seen)
    assert not is_there(left)
    again = int((run / "replica-0" / "pids-0").read_text().split()[2])
    assert is_there(again)
    os.kill(up.pid, signal.SIGTERM)
    assert up.end() == 0
    assert not any(is_there(pid) for pid in pids(run))


def test_nothing_outlives_a_killed_starter_and_the_next_one_cleans_up(start, deployment_file, tmp_path):
    file = deployment_file()
    up = start(RUN_UP, file, *PORTS, TMPDIR=str(tmp_path))
    up.wait_for("is ready")
    (run,) = tmp_path.glob("arriero-up-*")
    left = pids(run)
    up.process.kill()
    eventually(lambda: not any(is_there(pid) for pid in left))
    assert run.exists()

    other = start(RUN_UP, file, *PORTS, TMPDIR=str(tmp_path))
    other.wait_for("is ready")
    assert not run.exists()
    os.kill(other.pid, signal.SIGTERM)
    assert other.end() == 0


def test_replicas_stand_behind_one_router(start, deployment_file, tmp_path):
    """Each has ports, a directory and cores of its own; a lost one is said, and the others go on."""
    run = tmp_path / "run"
    file = deployment_file(spec__replicas=2, spec__router={"policy": "round-robin"})
    up = start(RUN_UP, file, *PORTS, "--run-dir", run)
    up.wait_for("Ctrl-C finishes")
    assert "2 replicas of tensor 2 x pipeline 2, 8 ranks in 4 pods" in up.output
    for replica in (0, 1):
        up.wait_for(f"replica {replica} rank 3 \\(stage 1, tensor 1\\): serving, epoch 7\n")
    launches = [parse_launch((run / f"replica-{i}" / "launch.json").read_text(), "launch") for i in (0, 1)]
    assert [launch.group for launch in launches] == ["small-0", "small-1"]
    assert [launch.run_directory for launch in launches] == [str(run / f"replica-{i}") for i in (0, 1)]
    pods = [pod for launch in launches for pod in launch.pods]
    ports = [port for pod in pods for port in (pod.control_port, pod.store_port, pod.http_port, pod.grpc_port) if port]
    assert len(ports) == len(set(ports)) == 2 * (2 * 2 + 2)
    curl = shlex.split(up.wait_for(r"  (curl .*)\n")[1])

    def groups(count: int) -> set[str]:
        run_curl = partial(subprocess.run, capture_output=True, text=True, check=True)
        return {first_event(run_curl(curl).stdout)[3] for _ in range(count)}

    assert groups(2) == {"small-0", "small-1"}
    seen = len(up.output)
    os.kill(int((run / "replica-1" / "pids-0").read_text()), signal.SIGKILL)
    up.wait_for(r"replica 1 pod 0 ended \(SIGKILL\); it starts again at once", seen)
    up.wait_for("replica 1 is not serving: 1 of 2 serve", seen)
    up.wait_for(r"replica 1 is serving again after .* s: 2 of 2 serve", seen)
    assert groups(4) == {"small-0", "small-1"}
    os.kill(up.pid, signal.SIGTERM)
    assert up.end() == 0
    assert "6 requests left" in up.output
    left = pids(run)
    assert len(left) == 5
    assert not any(is_there(pid) for pid in left)


def test_lost_router_is_started_again(start, deployment_file):
    up = start(RUN_UP, deployment_file(), *PORTS)
    up.wait_for("Ctrl-C finishes")
    curl = shlex.split(up.wait_for(r"  (curl .*)\n")[1])
    router = child(up.pid, "arriero_router")
    os.kill(router, signal.SIGKILL)
    up.wait_for(r"router ended \(SIGKILL\); it starts again at once")
    up.wait_for("the router answers again after")
    answer = subprocess.run(curl, capture_output=True, text=True, check=True).stdout
    assert first_event(answer)[3] == "small-0"
    again = child(up.pid, "arriero_router")
    assert again != router
    up.process.kill()
    eventually(lambda: not is_there(again))


def test_ctrl_c_lets_clients_have_their_answers(start, deployment_file, tmp_path):
    """The router finishes what it has begun, while the replicas are still there."""
    go = tmp_path / "go"
    up = start(RUN_UP, deployment_file(), *PORTS, ARRIERO_STUB=json.dumps({"pause": str(go)}))
    up.wait_for("Ctrl-C finishes")
    curl = shlex.split(up.wait_for(r"  (curl .*)\n")[1])
    with subprocess.Popen(curl, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as client:
        assert client.stdout is not None
        begun = client.stdout.readline()
        os.kill(up.pid, signal.SIGINT)
        up.wait_for("draining, for at most 5 s")
        assert up.process.poll() is None
        go.touch()
        assert first_event(begun + client.stdout.read())[3] == "small-0"
        assert client.wait(PATIENCE) == 0
    assert up.end() == 0
    assert up.output.rstrip().endswith("drained")


def test_ctrl_c_does_not_wait_for_a_replica_that_is_still_starting(start, deployment_file, tmp_path):
    run, go = tmp_path / "run", tmp_path / "go"
    go.touch()
    steer = json.dumps({"hold": str(go)})
    up = start(RUN_UP, deployment_file(spec__replicas=2), *PORTS, "--run-dir", run, ARRIERO_STUB=steer)
    up.wait_for("Ctrl-C finishes")
    go.unlink()
    seen = len(up.output)
    os.kill(int((run / "replica-0" / "pids-0").read_text()), signal.SIGKILL)
    up.wait_for("replica 0 rank 0 .*: loading", seen)
    os.kill(up.pid, signal.SIGINT)
    assert up.end() == 0
    assert up.output.rstrip().endswith("drained")
    assert not any(is_there(pid) for pid in pids(run))


def test_a_router_that_can_never_run_ends_it_with_the_reason(start, deployment_file):
    code = "import sys; print('12:00:00 E arriero.router models: missing'); sys.exit(2)"
    up = start(RUN_UP, deployment_file(), *PORTS, ARRIERO_STUB_ROUTER=code)
    assert up.end() == 1
    assert up.output.rstrip().splitlines()[-1] == "arriero: the router cannot run: models: missing"


@pytest.mark.parametrize("when", ["refuse", "early"])
def test_a_pod_that_can_never_run_ends_it_with_the_reason(start, deployment_file, when):
    steer = json.dumps({when: "model.safetensors: the tensor lm_head.weight is missing"})
    up = start(RUN_UP, deployment_file(), *PORTS, ARRIERO_STUB=steer)
    assert up.end() == 1
    last = up.output.rstrip().splitlines()[-1]
    assert last == "arriero: pod 1 cannot run: model.safetensors: the tensor lm_head.weight is missing"


def test_terminal_gets_progress_bars_and_colours(start, deployment_file):
    go = deployment_file().with_name("go")
    up = start(RUN_UP, deployment_file(), *PORTS, terminal=True, ARRIERO_STUB=json.dumps({"hold": str(go)}))
    up.wait_for("━")
    up.wait_for("2.0 of 4.0 MiB")
    go.touch()
    up.wait_for("Ctrl-C finishes")
    assert "\x1b[32m" in up.output
    up.type("\x03")
    assert up.end() == 0
    assert up.output.count("\x1b[?25l") == up.output.count("\x1b[?25h"), "the cursor stays hidden"


def test_no_color_is_honoured(start, deployment_file):
    up = start(RUN_UP, deployment_file(), *PORTS, terminal=True, NO_COLOR="1")
    up.wait_for("Ctrl-C finishes")
    assert "\x1b[3" not in up.output
    up.type("\x03")
    assert up.end() == 0


def test_pods_get_an_explicit_environment(start, deployment_file, tmp_path):
    run = tmp_path / "run"
    file = deployment_file(spec__engine={"threadsPerRank": 3})
    up = start(RUN_UP, file, *PORTS, "--run-dir", run, SECRET_TOKEN="x", XDG_CACHE_HOME=str(tmp_path / "cache"))
    up.wait_for("is ready")
    found = json.loads((run / "replica-0" / "environment-1.json").read_text())
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["NUMBA_CACHE_DIR"] == str(tmp_path / "cache" / "arriero" / "numba")
    assert "SECRET_TOKEN" not in found
    launch = parse_launch((run / "replica-0" / "launch.json").read_text(), "launch")
    assert launch.engine.threads == 3
    own = {"PATH": "/bin", "HOME": "/h", "ARRIERO_X": "1", "OTHER": "2", "OMP_NUM_THREADS": "64"}
    built = process_environment(own, launch.engine.threads)
    assert built["ARRIERO_X"] == "1"
    assert built["OMP_NUM_THREADS"] == "3"
    assert "OTHER" not in built

    second = start(RUN_UP, file, *PORTS, "--run-dir", run)
    assert second.end() == 1
    assert second.output == f"arriero: {run} is in use by another arriero up\n"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"spec__replicas": 0}, "spec.replicas is 0: there is nothing to start"),
        (
            {"spec__model__source": {"huggingFace": {"repo": "meta-llama/Llama-3.1-8B"}}},
            "spec.model.source: on one machine the model must be a directory (hostPath)",
        ),
        ({"spec__replica": 1}, "spec.replica: unknown field; did you mean replicas?"),
    ],
)
def test_what_cannot_run_here_is_refused_in_one_sentence(deployment_file, capsys, changes, sentence):
    file = deployment_file(**changes)
    assert main(["up", str(file), *PORTS]) == 2
    assert capsys.readouterr().err == f"arriero: {file}: {sentence}\n"


def test_missing_files_are_said(deployment_file, tmp_path, capsys):
    assert main(["up", str(tmp_path / "none.yaml"), *PORTS]) == 2
    assert capsys.readouterr().err == f"arriero: {tmp_path}/none.yaml: no such file or directory\n"
    file = deployment_file()
    (tmp_path / "checkpoint" / "config.json").unlink()
    assert main(["up", str(file), *PORTS]) == 2
    assert capsys.readouterr().err == f"arriero: {tmp_path}/checkpoint/config.json: no such file or directory\n"


def test_layout_that_the_model_does_not_allow_is_said(deployment_file, capsys):
    file = deployment_file(spec__parallelism={"tensor": 3})
    assert main(["up", str(file), *PORTS]) == 1
    assert capsys.readouterr().err.startswith(f"arriero: {file}: ")


@pytest.mark.parametrize("option", ["--http-port", "--grpc-port"])
def test_port_in_use_is_said(deployment_file, capsys, option):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        others = [word for word in ("--http-port", "--grpc-port") if word != option]
        assert main(["up", str(deployment_file()), option, str(port), *others, "0"]) == 1
    expected = f"arriero: port {port} is in use: choose another one with {option}, or 0 for any free one\n"
    assert capsys.readouterr().err == expected


def test_what_is_not_installed_is_said():
    check_installed()
    with pytest.raises(CommandError) as refused:
        check_installed({"worker": ("json",), "router": ("json", "no_such_module")})
    expected = (
        "arriero up needs the extra router (no_such_module is not installed): pip install 'arriero[worker,router]'"
    )
    assert str(refused.value) == expected


def test_refusals_leave_nothing_in_the_temporary_directory(deployment_file, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(["up", str(deployment_file(spec__parallelism={"tensor": 3})), *PORTS]) == 1
    assert list(tmp_path.glob("arriero-up-*")) == []
