"""CoreDNS of a cluster: on the host, at the bridge's address, with what the API server knows and nothing beyond."""

from __future__ import annotations

from pathlib import Path

from tests.cluster.api import Api
from tests.cluster.credentials import Credentials
from tests.cluster.layout import Layout
from tests.cluster.processes import Program

ROLE = "arriero-coredns"


def corefile(layout: Layout, credentials: Credentials) -> str:
    """No cache: a test that waits for a name to appear would wait for the cache."""
    return f""".:53 {{
    bind {layout.address}
    errors
    ready {layout.local}:8181
    kubernetes cluster.local in-addr.arpa {{
        kubeconfig {credentials.kubeconfig("arriero:coredns")} arriero
        ttl 1
    }}
}}
"""


def dns_program(layout: Layout, credentials: Credentials, program: Path) -> Program:
    place = layout.home / "Corefile"
    place.write_text(corefile(layout, credentials))
    return Program("coredns", [str(program), f"-conf={place}"], layout.home)


def allow_dns(api: Api) -> None:
    """Let CoreDNS see what it answers with."""
    rights = "/apis/rbac.authorization.k8s.io/v1"
    rules = [
        {"apiGroups": [""], "resources": ["services", "pods", "namespaces", "endpoints"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    api.create(f"{rights}/clusterroles", {"metadata": {"name": ROLE}, "rules": rules})
    subject = {"kind": "User", "name": "arriero:coredns", "apiGroup": "rbac.authorization.k8s.io"}
    reference = {"kind": "ClusterRole", "name": ROLE, "apiGroup": "rbac.authorization.k8s.io"}
    api.create(
        f"{rights}/clusterrolebindings", {"metadata": {"name": ROLE}, "subjects": [subject], "roleRef": reference}
    )
