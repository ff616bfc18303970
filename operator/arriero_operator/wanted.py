"""What a deployment wants of the cluster, and what all objects made for it have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from arriero_operator import names
from arriero_operator.autoscale import Scale
from arriero_operator.settings import Settings
from arriero_plan.plan import Plan
from arriero_plan.resource import API_VERSION, KIND, LlamaDeployment

HTTP, GRPC, CONTROL, STORE = 8000, 9000, 9100, 29500
"""Ports of a worker pod."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """An accepted deployment with its plan."""

    deployment: LlamaDeployment
    plan: Plan
    namespace: str
    uid: str
    created: str
    """When the resource was created, as the API wrote it."""
    settings: Settings
    scale: Scale
    known: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """What was found out before from the same deployment, plan and settings, for whoever would compute it again."""

    @property
    def name(self) -> str:
        return self.deployment.metadata.name

    @property
    def replicas(self) -> int:
        """Groups wanted."""
        return self.scale.replicas

    def child(
        self,
        api_version: str,
        kind: str,
        name: str,
        component: str,
        extra: Mapping[str, str] | None = None,
        **body: Any,
    ) -> dict[str, Any]:
        """An object that the deployment owns, with its digest. `extra`: more labels."""
        return sealed(
            {
                "apiVersion": api_version,
                "kind": kind,
                "metadata": {
                    "name": name,
                    "namespace": self.namespace,
                    "labels": {**names.labels(self.name, component), **(extra or {})},
                    "ownerReferences": [self.owner()],
                },
                **body,
            }
        )

    def owner(self) -> dict[str, Any]:
        return {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }


def sealed(rendered: dict[str, Any], **annotations: str) -> dict[str, Any]:
    """The object with some annotations and, last, the digest of all of it."""
    metadata = rendered["metadata"]
    kept = {key: value for key, value in metadata.get("annotations", {}).items() if key != names.APPLIED}
    bare = {**rendered, "metadata": {**metadata, "annotations": {**kept, **annotations}}}
    marked = {**bare["metadata"]["annotations"], names.APPLIED: digest(bare)}
    return {**bare, "metadata": {**bare["metadata"], "annotations": marked}}


def digest(value: Any, length: int = 10) -> str:
    """A short name for a JSON value, in hexadecimal; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]
