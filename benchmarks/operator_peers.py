"""The operators that are measured: Arriero's and LeaderWorkerSet's, each as one process outside the cluster."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import trustme
import yaml
from operator_cluster import NAMESPACE, ROOT, Seen, Server, cpu_seconds, peak_bytes
from tests.cluster.processes import guard, wait_until, without_proxies
from tools.cluster import build

PODS_PER_GROUP = 2
LWS = build.Module("sigs.k8s.io/lws", "v0.9.0", {"lws": "cmd"}, {}, None)
_PORT, _HOOKS = 18_085, 18_086
_SERIES = re.compile(r"^(\w+)(?:\{([^}]*)\})? (\S+)$", re.MULTILINE)
_TOLD = re.compile(r'(\w+)="([^"]*)"')


class Peer(Protocol):
    """One operator. `path` is where its resources are, `selector` finds its worker pods."""

    name: str
    path: str
    selector: str
    scheme: str

    def install(self, server: Server, folder: Path) -> None: ...

    def command(self) -> list[str]: ...

    def resource(self, name: str, groups: int) -> dict[str, Any]: ...

    def ready(self, seen: Seen) -> bool: ...

    def calls(self, metrics: Metrics) -> dict[str, int]: ...


Metrics = list[tuple[str, dict[str, str], float]]


@dataclass
class Arriero:
    """router: replicas of each deployment's router."""

    router: int = 1
    name: str = "arriero"
    path: str = f"/apis/serving.arriero.dev/v1alpha1/namespaces/{NAMESPACE}/llamadeployments"
    selector: str = "app.kubernetes.io/component=worker"
    scheme: str = "http"
    _config: Path | None = None

    def install(self, server: Server, folder: Path) -> None:
        for definition in yaml.safe_load_all((ROOT / "manifests/crd.yaml").read_text()):
            server.cluster.api.create("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition)
        server.cluster.api.create("/api/v1/namespaces", {"metadata": {"name": "arriero-system"}})
        self._config = folder / "operator.yaml"
        self._config.write_text("workerImage: arriero-worker:test\nrouterImage: arriero-router:test\n")

    def command(self) -> list[str]:
        config, port = ["--config", str(self._config)], ["--host", "127.0.0.1", "--port", str(_PORT)]
        return [sys.executable, "-m", "arriero_operator", *config, *port]

    def resource(self, name: str, groups: int) -> dict[str, Any]:
        return {
            "apiVersion": "serving.arriero.dev/v1alpha1",
            "kind": "LlamaDeployment",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {
                "model": {"name": "llama", "source": {"huggingFace": {"repo": "meta-llama/Llama-3.2-1B"}}},
                "replicas": groups,
                "parallelism": {"tensor": 1, "pipeline": PODS_PER_GROUP},
                "accelerator": {"type": "H100-80GB", "perNode": 1},
                "router": {"replicas": self.router},
            },
        }

    def ready(self, seen: Seen) -> bool:
        return seen.status.phase == "Ready"

    def calls(self, metrics: Metrics) -> dict[str, int]:
        found = _sums(metrics, "arriero_operator_writes_total", "write", "kind")
        found["reads"] = sum(
            _sums(metrics, "arriero_operator_api_calls_total", "verb").get(v, 0) for v in ("get", "watch")
        )
        return found


@dataclass
class LeaderWorkerSet:
    """v0.9.0, with its webhooks, which it does not work without."""

    name: str = "leaderworkerset"
    path: str = f"/apis/leaderworkerset.x-k8s.io/v1/namespaces/{NAMESPACE}/leaderworkersets"
    selector: str = "leaderworkerset.sigs.k8s.io/name"
    scheme: str = "https"
    _program: Path | None = None
    _config: Path | None = None

    def install(self, server: Server, folder: Path) -> None:
        source, self._program = build_lws()
        bases = source / "config/crd/bases"
        for file in sorted(bases.glob("*.yaml")):
            definition = yaml.safe_load(file.read_text())
            server.cluster.api.create("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition)
        authority = trustme.CA()
        leaf = authority.issue_cert("127.0.0.1")
        certificates = folder / "certificates"
        certificates.mkdir()
        leaf.private_key_pem.write_to_path(str(certificates / "tls.key"))
        leaf.cert_chain_pems[0].write_to_path(str(certificates / "tls.crt"))
        self._config = folder / "lws.yaml"
        settings = {
            "apiVersion": "config.lws.x-k8s.io/v1alpha1",
            "kind": "Configuration",
            "leaderElection": {"leaderElect": False},
            "internalCertManagement": {"enable": False},
            "webhook": {"host": "127.0.0.1", "port": _HOOKS, "certDir": str(certificates)},
            "metrics": {"bindAddress": f"127.0.0.1:{_PORT}"},
            "health": {"healthProbeBindAddress": "127.0.0.1:18087"},
        }
        self._config.write_text(yaml.safe_dump(settings))
        self._authority = authority.cert_pem.bytes()
        for hook in yaml.safe_load_all((source / "config/webhook/manifests.yaml").read_text()):
            self._point(hook)
            plural = f"{hook['kind'].lower()}s"
            server.cluster.api.create(f"/apis/admissionregistration.k8s.io/v1/{plural}", hook)

    def _point(self, configuration: dict[str, Any]) -> None:
        """At this machine; and pods only where they are its own, as its installation does."""
        for hook in configuration["webhooks"]:
            path = hook["clientConfig"]["service"]["path"]
            bundle = base64.b64encode(self._authority).decode()
            hook["clientConfig"] = {"url": f"https://127.0.0.1:{_HOOKS}{path}", "caBundle": bundle}
            if hook["name"] in ("mpod.kb.io", "vpod.kb.io"):
                mine = {"key": self.selector, "operator": "Exists"}
                hook["objectSelector"] = {"matchExpressions": [mine]}

    def command(self) -> list[str]:
        return [str(self._program), f"--config={self._config}", "--zap-log-level=error"]

    def resource(self, name: str, groups: int) -> dict[str, Any]:
        container = {
            "name": "worker",
            "image": "arriero-worker:test",
            "resources": {
                "requests": {"cpu": "2", "memory": "8Gi"},
                "limits": {"nvidia.com/gpu": "1"},
            },
        }
        return {
            "apiVersion": "leaderworkerset.x-k8s.io/v1",
            "kind": "LeaderWorkerSet",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {
                "replicas": groups,
                "leaderWorkerTemplate": {
                    "size": PODS_PER_GROUP,
                    "workerTemplate": {"spec": {"containers": [container]}},
                },
            },
        }

    def ready(self, seen: Seen) -> bool:
        return seen.holds("Available") and not seen.holds("Progressing")

    def calls(self, metrics: Metrics) -> dict[str, int]:
        found = _sums(metrics, "rest_client_requests_total", "method")
        found["reads"] = found.pop("GET", 0)
        return found


def _sums(metrics: Metrics, series: str, *by: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, labels, value in metrics:
        if name == series:
            what = " ".join(labels[label] for label in by)
            found[what] = found.get(what, 0) + int(value)
    return found


class Running:
    """An operator's process."""

    def __init__(self, peer: Peer, server: Server, log: Path) -> None:
        self._peer = peer
        # LeaderWorkerSet makes itself a certificate, and asks who reads its metrics.
        base = f"{peer.scheme}://127.0.0.1:{_PORT}"
        self._http = httpx.Client(base_url=base, headers=server.header, verify=False, trust_env=False)
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*guard(), *peer.command()],
                stdout=file,
                stderr=file,
                env={**without_proxies(), "KUBECONFIG": str(server.cluster.kubeconfig)},
                start_new_session=True,
            )
        wait_until(self._serves, f"{peer.name}'s metrics", 60.0)

    @property
    def cpu(self) -> float:
        return cpu_seconds(self._process.pid)

    @property
    def peak(self) -> int:
        return peak_bytes(self._process.pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    def metrics(self) -> Metrics:
        text = self._http.get("/metrics").raise_for_status().text
        return [(name, dict(_TOLD.findall(labels)), float(value)) for name, labels, value in _SERIES.findall(text)]

    def calls(self) -> dict[str, int]:
        """Writes by what and of which kind, and "reads"."""
        return self._peer.calls(self.metrics())

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _serves(self) -> bool:
        if self._process.poll() is not None:
            raise SystemExit(f"{self._peer.name} ended with {self._process.returncode}")
        try:
            self.metrics()
        except httpx.HTTPError:
            return False
        return True


@contextmanager
def installed(peer: Peer, server: Server) -> Iterator[Path]:
    """The definitions are known; a folder for logs."""
    with tempfile.TemporaryDirectory(prefix="arriero-scale-") as folder:
        peer.install(server, Path(folder))
        wait_until(lambda: _served(server, peer.path), f"{peer.name}'s resource", 30.0)
        yield Path(folder)


def _served(server: Server, path: str) -> bool:
    try:
        return server.cluster.api.exists(path)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == 429:  # its storage is being made
            return False
        raise


def build_lws() -> tuple[Path, Path]:
    """Its source and its program, built once into the cache of the test cluster's programs."""
    go = build.find_go(build.read_pins())
    environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off"}
    what = f"{LWS.path}@{LWS.version}"
    told = build.call([go, "mod", "download", "-json", what], "LeaderWorkerSet could not be fetched", env=environment)
    source = Path(json.loads(told)["Dir"])
    home = build.cache_dir() / "peers" / f"lws-{LWS.version}"
    program = home / "lws"
    if not program.exists():
        home.mkdir(parents=True, exist_ok=True)
        (home / "go.mod").write_text(
            build.go_mod(
                LWS,
                json.loads(build.call([go, "mod", "edit", "-json", str(source / "go.mod")], "go.mod", env=environment)),
            )
        )
        command = [go, "build", "-mod=mod", "-trimpath", "-o", "lws.new", LWS.package("lws")]
        build.call(command, "LeaderWorkerSet could not be built", env=environment, cwd=home)
        (home / "lws.new").replace(program)
    return source, program
