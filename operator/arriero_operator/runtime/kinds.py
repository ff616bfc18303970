"""The kinds that the operator reads and writes, and where the API keeps them."""

from __future__ import annotations

from dataclasses import dataclass

from arriero_operator import names
from arriero_plan.resource import API_VERSION, KIND

OURS = "app.kubernetes.io/managed-by=arriero"
"""Selects whatever the operator has made."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of object."""

    api_version: str
    name: str
    plural: str
    namespaced: bool = True
    selector: str = OURS
    """What of it is watched; empty: all."""

    def path(self, namespace: str = "", name: str = "") -> str:
        """Of one object, or of all in a namespace, or of all in the cluster."""
        root = f"/api/{self.api_version}" if "/" not in self.api_version else f"/apis/{self.api_version}"
        space = f"/namespaces/{namespace}" if self.namespaced and namespace else ""
        return f"{root}{space}/{self.plural}" + (f"/{name}" if name else "")


DEPLOYMENT = Kind(API_VERSION, KIND, "llamadeployments", selector="")
POD = Kind("v1", "Pod", "pods", selector="")
"""All of the cluster: what others take of a node is not free."""
NODE = Kind("v1", "Node", "nodes", namespaced=False, selector="")
EVENT = Kind("v1", "Event", "events")

CHILDREN = (
    Kind("v1", "ConfigMap", "configmaps"),
    Kind("v1", "Service", "services"),
    Kind("v1", "ServiceAccount", "serviceaccounts"),
    Kind("apps/v1", "Deployment", "deployments"),
    Kind("apps/v1", "StatefulSet", "statefulsets"),
    Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies"),
    Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    Kind("rbac.authorization.k8s.io/v1", "Role", "roles"),
    Kind("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings"),
)
"""What the operator makes, pods excepted."""

KINDS = {kind.name: kind for kind in (DEPLOYMENT, POD, NODE, EVENT, *CHILDREN)}

# The deployment that an object belongs to, by its label.
OWNER = names.DEPLOYMENT
