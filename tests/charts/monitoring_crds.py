"""What the chart uses of the Prometheus operator's definitions (monitoring.coreos.com/v1), and nothing else."""

from __future__ import annotations

from typing import Any


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, **({"required": [*required]} if required else {})}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_TEXT = {"type": "string"}
_LABELS = {"type": "object", "additionalProperties": _TEXT}
_ENDPOINT = _object(
    port=_TEXT,
    path=_TEXT,
    interval={
        "type": "string",
        "pattern": "^(0|(([0-9]+)y)?(([0-9]+)w)?(([0-9]+)d)?(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?(([0-9]+)ms)?)$",
    },
    honorLabels={"type": "boolean"},
    relabelings=_list(_object(sourceLabels=_list(_TEXT), targetLabel=_TEXT)),
)
_SELECTORS = {
    "selector": _object(matchLabels=_LABELS),
    "namespaceSelector": _object(any={"type": "boolean"}, matchNames=_list(_TEXT)),
}


def definitions() -> list[dict[str, Any]]:
    """CustomResourceDefinitions of ServiceMonitor and PodMonitor."""
    return [
        _definition("ServiceMonitor", _object(("endpoints", "selector"), endpoints=_list(_ENDPOINT), **_SELECTORS)),
        _definition("PodMonitor", _object(("selector",), podMetricsEndpoints=_list(_ENDPOINT), **_SELECTORS)),
    ]


def _definition(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    plural = f"{kind.lower()}s"
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.monitoring.coreos.com"},
        "spec": {
            "group": "monitoring.coreos.com",
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower(), "listKind": f"{kind}List"},
            "versions": [
                {
                    "name": "v1",
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": _object(("spec",), spec=spec)},
                }
            ],
        },
    }
