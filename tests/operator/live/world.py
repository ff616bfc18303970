"""A control plane with simulated nodes, operators beside it, and what a user does and sees there."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml
from tests.cluster import kwok
from tests.cluster.cluster import ROOT, Cluster
from tests.cluster.processes import run, wait_until
from tests.operator.live.process import Operator, Zygote
from tests.operator.live.proxy import ApiProxy

from arriero_operator.crd import custom_resource_definition

SYSTEM = "arriero-system"
MANIFEST = ROOT / "manifests" / "install.yaml"
LEASE = f"/apis/coordination.k8s.io/v1/namespaces/{SYSTEM}/leases/arriero-operator"
KINDS = {
    "configmaps": "/api/v1",
    "services": "/api/v1",
    "serviceaccounts": "/api/v1",
    "pods": "/api/v1",
    "deployments": "/apis/apps/v1",
    "replicasets": "/apis/apps/v1",
    "statefulsets": "/apis/apps/v1",
    "networkpolicies": "/apis/networking.k8s.io/v1",
    "poddisruptionbudgets": "/apis/policy/v1",
    "roles": "/apis/rbac.authorization.k8s.io/v1",
    "rolebindings": "/apis/rbac.authorization.k8s.io/v1",
    "llamadeployments": "/apis/serving.arriero.dev/v1alpha1",
}
"""Whatever of a deployment there can be, and where."""
CONFIG = {"workerImage": "arriero-worker:1", "routerImage": "arriero-router:1", "bindSeconds": 30}
# Two pods of one device each: the smallest group that must be placed as a whole.
SPEC: dict[str, Any] = {
    "model": {"name": "llama", "source": {"huggingFace": {"repo": "meta-llama/Llama-3.2-1B"}}},
    "accelerator": {"type": "H100-80GB", "perNode": 1},
    "parallelism": {"tensor": 1, "pipeline": 2},
    "rollout": {"drainSeconds": 0},
}
Object = dict[str, Any]
Snapshot = dict[tuple[str, str], Any]
"""Objects by kind and name, as they are compared."""


class World:
    """One for all tests; each works in namespaces of its own."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.api = cluster.api
        self.zygote = Zygote()
        self.folder = folder
        self._number = 0
        self._access = json.loads(cluster.kubeconfig.read_text())
        self._pods = f"10.{200 + cluster.layout.slot}.0.0/16"
        self._stack = contextlib.ExitStack()
        self._stack.callback(self.zygote.close)

    def prepare(self, nodes: int, gpus: int) -> None:
        """The CRD, the operator's account, simulated nodes."""
        self._stack.enter_context(_nowhere(self._pods))
        kubectl = self.cluster.kubectl(SYSTEM)
        kubectl.apply(
            custom_resource_definition(), {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM}}
        )
        if MANIFEST.exists():
            left_out = ("Deployment", "CustomResourceDefinition", "Namespace")
            kubectl.apply(*(o for o in yaml.safe_load_all(MANIFEST.read_text()) if o and o["kind"] not in left_out))
        self.cluster.start_kwok()
        names = kwok.create_simulated_nodes(self.api, nodes, gpus=gpus)
        self._open(names)
        wait_until(self._serves, "the API of LlamaDeployments")

    def add_nodes(self, names: list[str], gpus: int, **labels: str) -> None:
        """A few more."""
        for name in names:
            kwok.create_simulated_nodes(self.api, 1, gpus=gpus, prefix=name, **labels)
        self._open([f"{name}-0" for name in names])

    def _open(self, names: list[str]) -> None:
        """There are no other nodes, so everybody may use these."""
        for name in names:
            self.api.patch(f"/api/v1/nodes/{name}", {"spec": {"taints": None}})
        wait_until(lambda: all(_is_ready(self.api.get(f"/api/v1/nodes/{name}")) for name in names), "Ready nodes")

    def _serves(self) -> bool:
        try:
            return self.api.exists(path_of("llamadeployments", "default"))
        except httpx.HTTPStatusError:  # 429: the API server is just making room for the new kind
            return False

    def close(self) -> None:
        self._stack.close()

    def proxy(self) -> ApiProxy:
        authority = self._access["clusters"][0]["cluster"]["certificate-authority"]
        return ApiProxy(self.cluster.layout.server, Path(authority))

    # Operators

    def token(self) -> str:
        """Of the operator's own account, which may do what the manifest grants; without a manifest, the admin's."""
        if not MANIFEST.exists():
            return str(self._access["users"][0]["user"]["token"])
        asked = {"spec": {"expirationSeconds": 7200}}
        answer = self.api.create(f"/api/v1/namespaces/{SYSTEM}/serviceaccounts/arriero-operator/token", asked)
        return str(answer["status"]["token"])

    def start(
        self, proxy: ApiProxy, config: Object | None = None, account: Path | None = None, **environment: str
    ) -> Operator:
        """An operator process. account: it logs in as a pod does, with the token in this folder."""
        kubeconfig, file = self.files(proxy, config)
        if account is None:
            environment["KUBECONFIG"] = str(kubeconfig)
        else:
            environment |= {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(proxy.tls_port)}
        return Operator(self.zygote, file, file.with_suffix(".log"), account, **environment)

    def files(self, proxy: ApiProxy, config: Object | None = None) -> tuple[Path, Path]:
        """The kubeconfig and the configuration of an operator behind `proxy`."""
        self._number += 1
        access = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "here", "cluster": {"server": proxy.url}}],
            "users": [{"name": "operator", "user": {"token": self._known_token()}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "operator"}}],
            "current-context": "here",
        }
        kubeconfig, file = self.folder / f"{self._number}.kubeconfig", self.folder / f"operator-{self._number}.yaml"
        kubeconfig.write_text(json.dumps(access))
        file.write_text(yaml.safe_dump(CONFIG | (config or {})))
        return kubeconfig, file

    def account_folder(self, proxy: ApiProxy, token: str) -> Path:
        """What a kubelet mounts into the operator's pod."""
        self._number += 1
        folder = self.folder / f"account-{self._number}"
        folder.mkdir()
        (folder / "ca.crt").write_text(proxy.authority)
        (folder / "token").write_text(token)
        (folder / "namespace").write_text(SYSTEM)
        return folder

    def _known_token(self) -> str:
        file = self.folder / "token"
        if not file.exists():
            file.write_text(self.token())
        return file.read_text()

    # What a user does

    def deploy(self, namespace: str, name: str = "llama", **spec: Any) -> None:
        body = {"metadata": {"name": name}, "spec": merged(SPEC, spec)}
        whole = {"apiVersion": "serving.arriero.dev/v1alpha1", "kind": "LlamaDeployment", **body}
        self.api.create(path_of("llamadeployments", namespace), whole)

    def edit(self, namespace: str, name: str = "llama", **spec: Any) -> None:
        self.api.patch(path_of("llamadeployments", namespace, name), {"spec": spec})

    def remove(self, namespace: str, name: str = "llama", policy: str = "Background") -> None:
        self.api.delete(path_of("llamadeployments", namespace, name), propagationPolicy=policy)

    def get(self, plural: str, namespace: str, name: str) -> Object:
        return self.api.get(path_of(plural, namespace, name))

    def list(self, plural: str, namespace: str, **labels: str) -> list[Object]:
        selector = ",".join(f"serving.arriero.dev/{key}={value}" for key, value in labels.items())
        query = {"labelSelector": selector} if selector else {}
        found: list[Object] = self.api.get(path_of(plural, namespace), **query)["items"]
        return found

    def status(self, namespace: str, name: str = "llama") -> Object:
        found: Object = self.get("llamadeployments", namespace, name).get("status") or {}
        return found

    def children(self, namespace: str) -> dict[tuple[str, str], Object]:
        """Whatever the operator has made there, and what that has made, by kind and name."""
        found = {}
        for plural in KINDS:
            if plural != "llamadeployments":
                for o in self.list(plural, namespace):
                    if (o["metadata"].get("labels") or {}).get("serving.arriero.dev/deployment"):
                        found[plural, o["metadata"]["name"]] = o
        return found

    def play_kubelets(self, *namespaces: str) -> None:
        """Say again that pods on ready nodes are ready, as kubelets do that were away; simulated ones do not."""
        ready = {node["metadata"]["name"] for node in self.api.get("/api/v1/nodes")["items"] if _is_ready(node)}
        for namespace in namespaces:
            for pod in self.list("pods", namespace):
                if (
                    pod["spec"].get("nodeName") in ready
                    and pod["status"].get("phase") == "Running"
                    and not _is_ready(pod)
                ):
                    conditions = [
                        {**c, "status": "True"} if c["type"] in ("Ready", "ContainersReady") else c
                        for c in pod["status"]["conditions"]
                    ]
                    with contextlib.suppress(httpx.HTTPStatusError):  # it may be gone by now
                        path = path_of("pods", namespace, pod["metadata"]["name"])
                        self.api.patch(f"{path}/status", {"status": {"conditions": conditions}})

    # What a user waits for

    def wait_ready(self, *namespaces: str, name: str = "llama", timeout: float = 90.0) -> None:
        """The deployment is as its spec says, by its own word."""

        def waiting() -> Iterator[str]:
            for namespace in namespaces:
                seen = self.get("llamadeployments", namespace, name)
                status = seen.get("status") or {}
                answered = status.get("observedGeneration") == seen["metadata"]["generation"]
                if not (answered and status.get("phase") == "Ready"):
                    yield f"{namespace}: {status.get('phase')} {status.get('message', '')}"

        try:
            wait_until(lambda: not any(waiting()), "Ready deployments", timeout)
        except Exception as error:
            raise AssertionError(f"{error}: {'; '.join(waiting())}") from None

    def wait_gone(self, *namespaces: str, timeout: float = 60.0) -> None:
        """Nothing is left of any deployment there."""
        for namespace in namespaces:
            try:
                wait_until(lambda n=namespace: self._first_child(n) is None, f"empty namespace {namespace}", timeout)
            except Exception as error:
                raise AssertionError(f"{error}: {sorted(self.children(namespace))}") from None

    def _first_child(self, namespace: str) -> str | None:
        """Of a kind, in the order in which they go."""
        for plural in ("pods", "statefulsets", *(plural for plural in KINDS if plural != "llamadeployments")):
            for o in self.list(plural, namespace):
                if (o["metadata"].get("labels") or {}).get("serving.arriero.dev/deployment"):
                    return f"{plural}/{o['metadata']['name']}"
        return None

    def wait_quiet(self, proxy: ApiProxy, seconds: float = 1.0, timeout: float = 60.0) -> None:
        """No write for `seconds`."""

        def last() -> float:
            written = [call.at for call in proxy.calls if call.writes]
            return written[-1] if written else 0.0

        wait_until(lambda: time.monotonic() - last() > seconds, f"no write for {seconds} s", timeout)

    def wait_same(self, namespace: str, before: Snapshot, timeout: float = 60.0) -> None:
        """Again as in an earlier snapshot, but for pods: of those only the names count, for a successor need not have
        been placed by the operator.
        """
        wanted = _named(before)
        try:
            wait_until(lambda: _named(self.snapshot(namespace)) == wanted, "the same objects", timeout)
        except Exception as error:
            raise AssertionError(f"{error}\n{differences(wanted, _named(self.snapshot(namespace)))}") from None

    def snapshot(self, namespace: str, name: str = "llama") -> Snapshot:
        """All that there is of a deployment, less what differs from one run to the next: ids, times, places."""
        whole = self.get("llamadeployments", namespace, name)
        revision = (whole.get("status") or {}).get("revision", "")
        found: Snapshot = {}
        for (plural, called), o in [*self.children(namespace).items(), (("llamadeployments", name), whole)]:
            found[plural, _told(called, namespace, revision, o)] = json.loads(
                _told(json.dumps(_bare(o, plural), sort_keys=True), namespace, revision, o)
            )
        return found


def _named(found: Snapshot) -> Snapshot:
    return {key: value if key[0] != "pods" else {} for key, value in found.items()}


def differences(first: Snapshot, second: Snapshot) -> str:
    """Of two snapshots, for people; empty: they are the same."""
    texts = [
        [line for key in sorted(found) for line in (f"--- {key}", *yaml.safe_dump(found[key]).splitlines())]
        for found in (first, second)
    ]
    return "\n".join(difflib.unified_diff(*texts, lineterm="", n=2))


@contextlib.contextmanager
def meanwhile(see: Callable[[], None], every: float = 0.05) -> Iterator[None]:
    """`see` is called now and all the time meanwhile; what it raises is raised at the end."""
    over = threading.Event()
    raised: list[BaseException] = []

    def watch() -> None:
        try:
            while not over.wait(every):
                see()
        except BaseException as error:
            raised.append(error)

    see()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if raised:
        raise raised[0]


def path_of(plural: str, namespace: str, name: str = "") -> str:
    return f"{KINDS[plural]}/namespaces/{namespace}/{plural}" + (f"/{name}" if name else "")


def merged(base: Any, change: Any) -> Any:
    """RFC 7386."""
    if not isinstance(change, dict):
        return change
    whole = dict(base) if isinstance(base, dict) else {}
    for key, value in change.items():
        if value is None:
            whole.pop(key, None)
        else:
            whole[key] = merged(whole.get(key), value)
    return whole


@contextlib.contextmanager
def _nowhere(network: str) -> Iterator[None]:
    """Simulated pods have addresses that nobody has: no packet to them leaves this machine."""
    ip = shutil.which("ip")
    assert ip is not None, "simulated pods need a machine that knows how to route"
    run(ip, "route", "replace", "blackhole", network)
    try:
        yield
    finally:
        subprocess.run([ip, "route", "del", "blackhole", network], check=False, capture_output=True)


def _is_ready(node: Object) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"].get("conditions", []))


_VOLATILE = {
    "uid", "resourceVersion", "creationTimestamp", "managedFields", "generation", "observedGeneration", "nodeName",
    "clusterIP", "clusterIPs", "lastTransitionTime", "since", "phaseSince", "pod-template-hash",
    "controller-revision-hash",
    "serving.arriero.dev/applied", "serving.arriero.dev/order", "serving.arriero.dev/pinned-at",
    "kubernetes.io/hostname", "deployment.kubernetes.io/revision",
}  # fmt: skip


def _bare(value: Any, plural: str = "") -> Any:
    if plural and plural != "llamadeployments" and isinstance(value, dict):
        # What controllers and kubelets say of it is theirs; what counts is that all pods are there and ready.
        ready = {"ready": _is_ready(value)} if plural == "pods" else {}
        value = {key: part for key, part in value.items() if key != "status"} | ready
    if isinstance(value, dict):
        return {key: _bare(part) for key, part in value.items() if key not in _VOLATILE}
    return [_bare(part) for part in value] if isinstance(value, list) else value


def _told(text: str, namespace: str, revision: str, o: Object) -> str:
    """With the same words for what is named anew in each run."""
    text = text.replace(namespace, "NAMESPACE")
    if revision:
        text = text.replace(revision, "REVISION")
    template = (o["metadata"].get("labels") or {}).get("pod-template-hash")
    if template:
        text = re.sub(rf"{template}(-[a-z0-9]{{5}})?\b", "TEMPLATE", text)
    return re.sub(r"kube-api-access-[a-z0-9]{5}", "kube-api-access", text)


def why_no_world() -> str | None:
    """Why simulated pods cannot be kept to themselves here, or None."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "simulated pods have addresses that only root can keep packets from leaving to"
    return None


def said(error: httpx.HTTPStatusError) -> str:
    """What the API server said, in one line."""
    try:
        return str(error.response.json()["message"])
    except (ValueError, KeyError):
        return error.response.text
