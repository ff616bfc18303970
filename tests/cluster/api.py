"""The API server as tests see it: JSON in and out over one connection, and kubectl for what is more than a request."""

from __future__ import annotations

import json
import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx
from tests.cluster.processes import ClusterError, without_proxies

MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"


class Api:
    """Requests over `http`, which knows server and user. A refusal raises httpx.HTTPStatusError with what was said."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    @classmethod
    def with_token(cls, server: str, authority: Path, token: str) -> Api:
        context = ssl.create_default_context(cafile=str(authority))
        header = {"Authorization": f"Bearer {token}"}
        return cls(httpx.Client(base_url=server, headers=header, verify=context, timeout=30.0, trust_env=False))

    @classmethod
    def through_proxy(cls, socket: Path) -> Api:
        """Through `kubectl proxy --unix-socket`, which can log in wherever kubectl can."""
        transport = httpx.HTTPTransport(uds=str(socket))
        return cls(httpx.Client(base_url="http://localhost", transport=transport, timeout=30.0, trust_env=False))

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, **parameters: str) -> dict[str, Any]:
        return self._ask("GET", path, params=parameters)

    def text(self, path: str, **parameters: str) -> str:
        """What is not JSON: a container's log."""
        return self._send("GET", path, params=parameters).text

    def create(self, path: str, item: dict[str, Any]) -> dict[str, Any]:
        return self._ask("POST", path, json=item)

    def patch(self, path: str, change: object, kind: str = MERGE_PATCH) -> dict[str, Any]:
        return self._ask("PATCH", path, content=json.dumps(change), headers={"Content-Type": kind})

    def delete(self, path: str, **parameters: str) -> dict[str, Any]:
        return self._ask("DELETE", path, params=parameters)

    def exists(self, path: str) -> bool:
        answer = self._http.get(path)
        if answer.status_code != 404:
            answer.raise_for_status()
        return answer.status_code != 404

    def is_ready(self) -> bool:
        """Whether the server answers and calls itself ready."""
        try:
            return self._http.get("/readyz", timeout=2.0).status_code == 200
        except httpx.TransportError:
            return False

    def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._send(method, path, **options).json()
        return found

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        answer = self._http.request(method, path, **options)
        if answer.is_error:
            message = f"{method} {path}: {answer.status_code} {answer.text.strip()}"
            raise httpx.HTTPStatusError(message, request=answer.request, response=answer)
        return answer


class Kubectl:
    """kubectl as the user of a kubeconfig, in one namespace."""

    def __init__(self, program: Path, kubeconfig: Path, namespace: str = "default") -> None:
        self.program = program
        self.kubeconfig = kubeconfig
        self.namespace = namespace

    def __call__(self, *arguments: str, stdin: object = None, check: bool = True, timeout: float = 60.0) -> str:
        """What kubectl printed. `stdin`: text, or objects to be written as JSON. Raises ClusterError."""
        text = stdin if stdin is None or isinstance(stdin, str) else json.dumps(stdin)
        command = [str(self.program), f"--kubeconfig={self.kubeconfig}", f"--namespace={self.namespace}", *arguments]
        answer = subprocess.run(
            command, input=text, capture_output=True, text=True, check=False, timeout=timeout, env=without_proxies()
        )
        if check and answer.returncode != 0:
            raise ClusterError(f"kubectl {' '.join(arguments)}: {answer.stderr.strip() or answer.stdout.strip()}")
        return answer.stdout

    def apply(self, *items: dict[str, Any]) -> str:
        """Apply the objects, in order."""
        return self("apply", "--filename=-", stdin={"apiVersion": "v1", "kind": "List", "items": list(items)})

    def get(self, *arguments: str) -> dict[str, Any]:
        """`kubectl get ... --output=json`, read."""
        found: dict[str, Any] = json.loads(self("get", *arguments, "--output=json"))
        return found
