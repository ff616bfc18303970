"""Names, labels and annotations of everything that belongs to a LlamaDeployment."""

from __future__ import annotations

PREFIX = "serving.arriero.dev/"

DEPLOYMENT = PREFIX + "deployment"
REPLICA = PREFIX + "replica"
GROUP = PREFIX + "group"
REVISION = PREFIX + "revision"
COMPONENT = "app.kubernetes.io/component"
POD_INDEX = "apps.kubernetes.io/pod-index"
"""Written by the StatefulSet controller on each of its pods."""
HOSTNAME = "kubernetes.io/hostname"

GATE = PREFIX + "gang"
"""The scheduling gate that worker pods are born with."""

APPLIED = PREFIX + "applied"
"""On every object of ours: digest of what was applied, so that a field we no longer set is noticed."""
GROUP_SIZE = PREFIX + "group-size"
"""On pods: how many pods their group has."""
PODS_PER_STAGE = PREFIX + "pods-per-stage"
"""On pods: how many consecutive pods hold one stage."""
TOPOLOGY = PREFIX + "topology"
"""On pods: `Required=<node label>` or `Preferred=<node label>`."""
ORDER = PREFIX + "order"
"""On pods: when their deployment was created; groups of older deployments are placed first."""
PINNED_AT = PREFIX + "pinned-at"
"""On a pod: when its gate was lifted."""
DOMAIN = PREFIX + "domain"
"""On a StatefulSet whose group was placed: `<node label>=<value>` of the nodes it was placed on, if they share one."""
DRAINING = PREFIX + "draining"
"""On a StatefulSet: since when its group is being drained. A group so marked never serves again."""

ROUTER = "router"
WORKER = "worker"
INSPECTOR = "inspector"
DOWNLOAD = "download"
"""The init container that fetches a model."""


def group_name(deployment: str, replica: int) -> str:
    return f"{deployment}-{replica}"


def leaders_service(deployment: str) -> str:
    """The Service that lists the leader pod of each group; the router watches its EndpointSlices."""
    return f"{deployment}-leaders"


def router_name(deployment: str) -> str:
    return f"{deployment}-router"


def workers_name(deployment: str) -> str:
    return f"{deployment}-workers"


def inspector_name(deployment: str) -> str:
    """The pod that reads the checkpoint's config.json."""
    return f"{deployment}-inspector"


def launch_name(group: str, revision: str) -> str:
    """The ConfigMap with a group's launch file; immutable, so it is named by its revision."""
    return f"{group}-launch-{revision}"


def pod_host(group: str, index: int, namespace: str) -> str:
    """The stable DNS name of a group's pod, as its headless Service publishes it."""
    return f"{group}-{index}.{group}.{namespace}.svc"


def selector(deployment: str, component: str) -> dict[str, str]:
    return {DEPLOYMENT: deployment, COMPONENT: component}


def labels(deployment: str, component: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "arriero",
        "app.kubernetes.io/instance": deployment,
        "app.kubernetes.io/managed-by": "arriero",
        **selector(deployment, component),
    }
