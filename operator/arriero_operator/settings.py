"""What the operator is told once, at its start, about the cluster it works in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """The same for every LlamaDeployment; a change rolls every group, as far as it concerns their pods."""

    worker_image: str
    router_image: str
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    operator_namespace: str = "arriero-system"
    """The only namespace, besides a deployment's own pods, that may dial control ports."""
    metrics_namespace: str = ""
    """Whose pods may read /metrics of workers; empty: nobody's."""
    download_command: tuple[str, ...] = ("arriero-download",)
    """Program of the worker image that fetches a model: `<command> --source URI --directory DIR`."""
    cluster_domain: str = ""
    """Appended to DNS names of pods; empty: the resolver's search list does."""

    lost_seconds: float = 20.0
    """How long a node is not ready before its pods count as lost, after the grace period of the cluster itself."""
    bind_seconds: float = 60.0
    """How long a pod whose gate was lifted may be without a node before it is made anew, gated."""
    patience_seconds: float = 300.0
    """How long a group waits for room before later groups leave it what it could use."""
    unready_seconds: float = 120.0
    """How long a group of an old revision is not ready before it makes room for one of the new."""
