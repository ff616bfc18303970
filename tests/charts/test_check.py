"""What `helm test` runs passes when the operator is ready and the resource is served, and says what is wrong else."""

from __future__ import annotations

import importlib.util
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest
import trustme
import yaml
from tests.charts.conftest import Chart, find
from tools import manifests

SCRIPT = manifests.CHART / "files" / "check.py"
SERVED = {"resources": [{"name": "llamadeployments"}, {"name": "llamadeployments/status"}]}


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chart_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def account(tmp_path: Path, authority: trustme.CA) -> str:
    (tmp_path / "token").write_text("the-token\n")
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    return str(tmp_path)


@contextmanager
def serving(answers: dict[str, list[tuple[int, object]]], authority: trustme.CA | None = None) -> Iterator[str]:
    """A server that answers each path with its answers in turn, the last one for ever. Asks for the token over TLS."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            left = answers.get(self.path, [(404, {})])
            status, body = left.pop(0) if len(left) > 1 else left[0]
            if authority is not None and self.headers["Authorization"] != "Bearer the-token":
                status = 401
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    scheme = "http"
    if authority is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"{scheme}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run(
    check: ModuleType,
    authority: trustme.CA,
    account: str,
    ready: list[tuple[int, object]],
    resources: object,
    status: int = 200,
) -> int:
    with (
        serving({"/health/ready": ready}) as operator,
        serving({check.RESOURCES: [(status, resources)]}, authority) as server,
    ):
        result: int = check.main(operator, server, account, seconds=0.0 if len(ready) == 1 else 30.0)
    return result


def test_a_working_installation(
    check: ModuleType, authority: trustme.CA, account: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(check, authority, account, [(200, "ok")], SERVED) == 0
    assert capsys.readouterr().out == "the operator is ready\nllamadeployments are served\n"


def test_an_operator_that_becomes_ready(check: ModuleType, authority: trustme.CA, account: str) -> None:
    assert run(check, authority, account, [(503, "not yet"), (200, "ok")], SERVED) == 0


def test_an_operator_that_is_not_ready(
    check: ModuleType, authority: trustme.CA, account: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(check, authority, account, [(503, "the lease has not been asked for yet")], SERVED) == 1
    assert "/health/ready HTTP Error 503" in capsys.readouterr().err


def test_an_operator_that_is_not_there(
    check: ModuleType, account: str, capsys: pytest.CaptureFixture[str], unused_tcp_port: int
) -> None:
    assert check.main(f"http://127.0.0.1:{unused_tcp_port}", "https://127.0.0.1:1", account, seconds=0.0) == 1
    assert "refused" in capsys.readouterr().err


def test_an_api_server_without_the_definition(
    check: ModuleType, authority: trustme.CA, account: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(check, authority, account, [(200, "ok")], {}, 404) == 1
    assert "/apis/serving.arriero.dev/v1alpha1 HTTP Error 404" in capsys.readouterr().err


def test_an_api_server_with_other_resources_of_the_group(
    check: ModuleType, authority: trustme.CA, account: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(check, authority, account, [(200, "ok")], {"resources": [{"name": "others"}]}) == 1
    assert "has no llamadeployments" in capsys.readouterr().err


def test_the_pod_runs_the_script_against_the_service(chart: Chart, check: ModuleType) -> None:
    objects = chart.render()
    (container,) = find(objects, "Pod")["spec"]["containers"]
    script, address = container["args"]
    assert script.strip() == SCRIPT.read_text().strip()
    compile(script, "check.py", "exec")
    service = find(objects, "Service")
    host = f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc"
    assert address == f"http://{host}:{service['spec']['ports'][0]['port']}"
    crd = yaml.safe_load((manifests.ROOT / "manifests" / "crd.yaml").read_text())
    assert f"/apis/{crd['spec']['group']}/{crd['spec']['versions'][0]['name']}" == check.RESOURCES
