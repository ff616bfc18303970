"""Certificates, tokens and kubeconfigs of a cluster: its own authority, one token per user."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path

import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.cluster.layout import Layout

# user -> groups. The control plane's own programs are known to the API server's built-in roles by these names.
USERS = {
    "admin": "system:masters",
    "kwok": "system:masters",
    "system:kube-controller-manager": "",
    "system:kube-scheduler": "",
    "system:kube-proxy": "",
    "arriero:coredns": "",
}


@dataclass(frozen=True)
class Credentials:
    """Files below one folder, readable to the owner alone."""

    folder: Path
    server: str
    tokens: dict[str, str]

    @property
    def authority(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def token_file(self) -> Path:
        return self.folder / "tokens.csv"

    def certificate(self, name: str) -> Path:
        return self.folder / f"{name}.pem"

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"

    def kubeconfig(self, user: str) -> Path:
        """The user's kubeconfig, with one context "arriero"; written at the first call."""
        path = self.folder / f"{user.replace(':', '-')}.kubeconfig"
        if not path.exists():
            path.write_text(json.dumps(self.kubeconfig_of(user), indent=2))
        return path

    def kubeconfig_of(self, user: str) -> dict[str, object]:
        cluster = {"server": self.server, "certificate-authority": str(self.authority)}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "arriero", "cluster": cluster}],
            "users": [{"name": user, "user": {"token": self.tokens[user]}}],
            "contexts": [{"name": "arriero", "context": {"cluster": "arriero", "user": user, "namespace": "default"}}],
            "current-context": "arriero",
        }


def write_credentials(layout: Layout) -> Credentials:
    """Make everything anew below the cluster's folder."""
    folder = layout.home / "credentials"
    folder.mkdir(mode=0o700, parents=True)
    authority = trustme.CA(organization_name="arriero test cluster")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
    names += ["kubernetes.default.svc.cluster.local", layout.address, layout.service_address, "127.0.0.1"]
    leaves = {
        "server": authority.issue_cert(*names),
        # It needs a name as its alternative: Go refuses the empty list that would be there instead.
        "kubelet-client": authority.issue_cert(
            "kubelet-client", common_name="kubelet-client", organization_name="system:masters"
        ),
    }
    for name, leaf in leaves.items():
        leaf.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        (folder / f"{name}.pem").write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    signing = ec.generate_private_key(ec.SECP256R1())
    # The API server takes the public half out of a private key of this format only, not of PKCS #8.
    form = serialization.PrivateFormat.TraditionalOpenSSL
    (folder / "accounts.key").write_bytes(
        signing.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    )
    users = USERS | {f"system:node:{node.name}": "system:nodes" for node in layout.nodes}
    tokens = {user: secrets.token_hex(16) for user in users}
    credentials = Credentials(folder, layout.server, tokens)
    credentials.token_file.write_text(
        "".join(f'{tokens[user]},{user},{user},"{groups}"\n' for user, groups in users.items())
    )
    return credentials
