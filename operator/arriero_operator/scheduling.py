"""Which nodes a pod may go to, as Kubernetes' scheduler decides it: taints, node selector, required node affinity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from arriero_operator.observe import Node, Object, Pod


def admits(node: Node, pod: Pod) -> bool:
    """Whether the pod may run on the node, room aside."""
    return refusal(node, pod) is None


def demands(pod: Pod) -> bytes:
    """All of a pod that `admits` looks at: pods with the same demands are admitted by the same nodes."""
    spec = pod.raw.get("spec") or {}
    affinity = (spec.get("affinity") or {}).get("nodeAffinity")
    return msgspec.json.encode([spec.get("nodeSelector"), affinity, spec.get("tolerations")])


def refusal(node: Node, pod: Pod) -> str | None:
    """Why not, in a word or two that make sense after a number of nodes; None: it may."""
    spec = pod.raw.get("spec") or {}
    if node.lost_since is not None:
        return "not ready"
    if not node.schedulable:
        return "cordoned"
    selector = spec.get("nodeSelector") or {}
    affinity = ((spec.get("affinity") or {}).get("nodeAffinity") or {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    )
    if any(node.labels.get(key) != value for key, value in selector.items()):
        return "not of the node selector"
    if affinity is not None and not any(_matches(node, term) for term in affinity.get("nodeSelectorTerms") or []):
        return "not of the node affinity"
    for taint in node.taints:
        if taint.get("effect") in ("NoSchedule", "NoExecute") and not _tolerated(taint, spec.get("tolerations") or []):
            return f"tainted {taint.get('key')}"
    return None


def _tolerated(taint: Object, tolerations: Sequence[Mapping[str, Any]]) -> bool:
    for toleration in tolerations:
        if toleration.get("effect") not in (None, "", taint.get("effect")):
            continue
        exists = toleration.get("operator") == "Exists"
        if not toleration.get("key"):
            if exists:
                return True
            continue
        if toleration["key"] == taint.get("key") and (
            exists or (toleration.get("value") or "") == (taint.get("value") or "")
        ):
            return True
    return False


def _matches(node: Node, term: Mapping[str, Any]) -> bool:
    """An empty term matches nothing (core/v1 NodeSelectorTerm)."""
    expressions, fields = term.get("matchExpressions") or [], term.get("matchFields") or []
    if not expressions and not fields:
        return False
    return all(_holds(node.labels, entry) for entry in expressions) and all(
        _holds({"metadata.name": node.name}, entry) for entry in fields
    )


def _holds(labels: Mapping[str, str], entry: Mapping[str, Any]) -> bool:
    value, values = labels.get(str(entry.get("key"))), entry.get("values") or []
    match entry.get("operator"):
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt" | "Lt" as operator:
            try:
                seen, bound = int(value or ""), int(values[0])
            except (ValueError, IndexError):
                return False
            return seen > bound if operator == "Gt" else seen < bound
    return False
