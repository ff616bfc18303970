"""As much of an API server's validation as the CRD's schema uses: types, bounds, patterns, required and unknown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}


def problems(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """A line for each thing that the schema does not allow."""
    return list(_problems(value, schema, path))


def _problems(value: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    kinds = _TYPES[schema["type"]]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        yield f"{path}: not of type {schema['type']}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: not one of {schema['enum']}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value < schema.get("minimum", value) or value > schema.get("maximum", value):
            yield f"{path}: out of bounds"
        if schema.get("exclusiveMinimum") and value == schema["minimum"]:
            yield f"{path}: out of bounds"
    if isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            yield f"{path}: length"
        if "pattern" in schema and not re.search(schema["pattern"], value):
            yield f"{path}: pattern"
    if isinstance(value, list):
        if len(value) > schema.get("maxItems", len(value)):
            yield f"{path}: too many items"
        for position, item in enumerate(value):
            yield from _problems(item, schema["items"], f"{path}[{position}]")
    if isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{path}.{name}: missing"
        for name, part in value.items():
            if name in schema.get("properties", {}):
                yield from _problems(part, schema["properties"][name], f"{path}.{name}")
            elif isinstance(schema.get("additionalProperties"), dict):
                yield from _problems(part, schema["additionalProperties"], f"{path}.{name}")
            elif path != ".metadata" and not schema.get("x-kubernetes-preserve-unknown-fields"):
                yield f"{path}.{name}: unknown"


def defaulted(value: Any, schema: dict[str, Any]) -> Any:
    """The value with the schema's defaults, as an API server stores it."""
    if isinstance(value, dict) and "properties" in schema:
        whole = dict(value)
        for name, part in schema["properties"].items():
            if name not in whole and "default" in part:
                whole[name] = part["default"]
            if name in whole:
                whole[name] = defaulted(whole[name], part)
        return whole
    return value
