"""The CustomResourceDefinition of LlamaDeployment, generated from the planner's schema. Pure.

The schema is structural (no references, no alternatives of types), every property is typed, described and bounded, and
what crosses fields stands in rules (CEL), in the words that the planner uses for the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from arriero_operator.resource_status import DeploymentStatus
from arriero_plan.resource import API_VERSION, DNS_LABEL, KIND, PATTERN_WORDS, Metadata, Spec

PLURAL = "llamadeployments"
_GROUP, _, _VERSION = API_VERSION.partition("/")
_NAME_LIMIT = next(part.max_length for part in Metadata.model_fields["name"].metadata if hasattr(part, "max_length"))

_KEPT = ("type", "format", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "maxItems", "description")
_ONE_SOURCE = ("persistentVolumeClaim", "hostPath", "image", "huggingFace", "objectStore")

# Rules by the title of the model whose schema they belong to. No messageExpression: turning a number into text has no
# bound that the API server could estimate, so it refuses the CRD as too costly.
_RULES: dict[str, list[dict[str, str]]] = {
    "ModelSource": [
        {
            "rule": " + ".join(f"(has(self.{name}) ? 1 : 0)" for name in _ONE_SOURCE) + " == 1",
            "message": f"set exactly one of {', '.join(_ONE_SOURCE)}",
        }
    ],
    "PersistentVolumeClaimSource": [
        {
            "rule": r"!has(self.path) || !self.path.matches('(^|/)[.][.](/|$)')",
            "message": "path leaves the volume: write it without '..'",
            "fieldPath": ".path",
        }
    ],
    "HostPathSource": [
        {
            "rule": r"self.path.startsWith('/') && !self.path.matches('(^|/)[.][.](/|$)')",
            "message": "on a cluster's nodes path must be absolute and without '..'",
            "fieldPath": ".path",
        }
    ],
    "Model": [
        {
            "rule": "self.name == oldSelf.name",
            "message": "name cannot change, clients ask for it: make another LlamaDeployment with the new name",
            "fieldPath": ".name",
        }
    ],
    "Accelerator": [
        {
            "rule": "self.type != 'cpu' || !has(self.resourceName)",
            "message": "a cpu is no extended resource: leave resourceName out",
            "fieldPath": ".resourceName",
        }
    ],
    "Autoscaling": [
        {
            "rule": "self.minReplicas <= self.maxReplicas",
            "message": "minReplicas is above maxReplicas: lower the one or raise the other",
            "fieldPath": ".minReplicas",
        }
    ],
    "Rollout": [
        {
            "rule": "self.maxSurge > 0 || self.maxUnavailable > 0",
            "message": "maxSurge and maxUnavailable are both 0: no replica could ever be replaced; raise one of them",
        }
    ],
    "Engine": [
        {
            "rule": "self.maxChunkTokens <= self.maxBatchTokens",
            "message": "maxChunkTokens is above maxBatchTokens: lower the one or raise the other",
            "fieldPath": ".maxChunkTokens",
        },
        {
            "rule": "self.maxRunning <= self.maxBatchTokens",
            "message": "maxRunning is above maxBatchTokens, but each running sequence may decode a token in one step: "
            "lower the one or raise the other",
            "fieldPath": ".maxRunning",
        },
    ],
}
_OVERLAY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "metadata": {
            "type": "object",
            "description": "labels and annotations to add",
            "properties": {
                name: {
                    "type": "object",
                    "description": f"{name} to add",
                    "maxProperties": 64,
                    "additionalProperties": {"type": "string", "maxLength": limit},
                }
                for name, limit in (("labels", 63), ("annotations", 65536))
            },
        },
        "spec": {
            "type": "object",
            "description": "fields of a pod's spec: tolerations, nodeSelector, volumes, and containers by name, of "
            "which the worker's is `worker` (env, resources, volumeMounts)",
            "x-kubernetes-preserve-unknown-fields": True,
        },
    },
}


def custom_resource_definition() -> dict[str, Any]:
    """The CRD as `kubectl apply` takes it."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{_GROUP}", "labels": {"app.kubernetes.io/name": "arriero"}},
        "spec": {
            "group": _GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["llama", "ld"],
                "categories": ["all", "arriero"],
            },
            "versions": [
                {
                    "name": _VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.replicas",
                            "statusReplicasPath": ".status.replicas",
                            "labelSelectorPath": ".status.selector",
                        },
                    },
                    "additionalPrinterColumns": [
                        _column("Model", "string", ".spec.model.name"),
                        _column("Plan", "string", ".status.plan.layout"),
                        _column("Ready", "string", ".status.ready"),
                        _column("Phase", "string", ".status.phase"),
                        _column("Tokens/s", "integer", ".status.tokensPerSecond"),
                        _column("Age", "date", ".metadata.creationTimestamp"),
                        {**_column("Message", "string", ".status.message"), "priority": 1},
                    ],
                    "schema": {"openAPIV3Schema": _root()},
                }
            ],
        },
    }


def _column(name: str, kind: str, path: str) -> dict[str, Any]:
    return {"name": name, "type": kind, "jsonPath": path}


def _root() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "One model, served by replicas that are each cut over several devices.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": "version of this schema"},
            "kind": {"type": "string", "description": "kind of this resource"},
            "metadata": {"type": "object"},
            "spec": {**model_schema(Spec), "description": "what is wanted"},
            "status": {
                **model_schema(DeploymentStatus),
                "description": "what is observed; written by the operator only",
            },
        },
        "x-kubernetes-validations": [
            {
                "rule": f"self.metadata.name.size() <= {_NAME_LIMIT}",
                "message": f"metadata.name has more than {_NAME_LIMIT} characters, and names of pods derive from it: "
                "choose a shorter one",
            },
            {
                "rule": f"self.metadata.name.matches('{DNS_LABEL}')",
                "message": f"metadata.name: expected {PATTERN_WORDS[DNS_LABEL]}",
            },
        ],
    }


def model_schema(model: type[BaseModel]) -> dict[str, Any]:
    """A pydantic model as a structural schema."""
    whole = model.model_json_schema(by_alias=True, mode="validation")
    return _structural(whole, whole.get("$defs", {}))


def _structural(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    found = _resolved(schema, definitions)
    kept = {key: found[key] for key in _KEPT if key in found}
    if "const" in found:
        kept["enum"] = [found["const"]]
    if "exclusiveMinimum" in found:  # a number in JSON Schema, a flag in OpenAPI 3.0
        kept |= {"minimum": found["exclusiveMinimum"], "exclusiveMinimum": True}
    if kept.get("type") == "integer":
        kept["format"] = "int64" if kept.get("maximum", 2**63) >= 2**31 else "int32"
    if kept.get("type") == "array":
        kept["items"] = _structural(found["items"], definitions)
        if "name" in kept["items"].get("properties", {}) or "lastTransitionTime" in kept["items"].get("properties", {}):
            key = "name" if "name" in kept["items"]["properties"] else "type"
            kept |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
    if "properties" in found:
        required = found.get("required", [])
        kept["properties"] = {
            name: _property(name, part, definitions, required=name in required)
            for name, part in found["properties"].items()
        }
        if required:
            kept["required"] = list(required)
        if rules := _RULES.get(found.get("title", "")):
            kept["x-kubernetes-validations"] = rules
    return kept


def _property(name: str, part: Mapping[str, Any], definitions: Mapping[str, Any], *, required: bool) -> dict[str, Any]:
    kept = _structural(part, definitions)
    if name == "podTemplate":
        kept |= _OVERLAY
    optional_part = kept.get("type") == "object" and not required and "anyOf" not in part
    if isinstance(part.get("default"), Mapping) or (optional_part and "default" not in part):
        # Never absent. Written out, because an API server tries the rules on a default before it fills in those inside.
        kept["default"] = {
            inner: field["default"] for inner, field in kept.get("properties", {}).items() if "default" in field
        }
    elif part.get("default") is not None:
        kept["default"] = part["default"]
    return kept


def _resolved(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """Without references and without the alternative null: in a cluster, absent is absent. A description at the place
    of use wins over that of what is used.
    """
    own = {key: value for key, value in schema.items() if key not in ("$ref", "anyOf", "allOf", "$defs")}
    for part in schema.get("anyOf", []):
        if part.get("type") != "null":
            return {**_resolved(part, definitions), **own, **_title(part, definitions)}
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return {**_resolved(definitions[name], definitions), **own, "title": definitions[name].get("title", name)}
    return own


def _title(part: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, str]:
    """Rules are found by the title of the model, not by that of the field."""
    if "$ref" not in part:
        return {}
    name = part["$ref"].rpartition("/")[2]
    return {"title": str(definitions[name].get("title", name))}
