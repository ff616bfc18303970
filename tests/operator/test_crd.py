"""The CRD: generated, structural, described and bounded throughout, and of one mind with the planner's schema."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.operator.schema_check import defaulted, problems

from arriero_operator.crd import custom_resource_definition

ROOT = Path(__file__).resolve().parents[2]
VERSION: dict[str, Any] = custom_resource_definition()["spec"]["versions"][0]
SCHEMA: dict[str, Any] = VERSION["schema"]["openAPIV3Schema"]


def walk(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, part in schema.get("properties", {}).items():
        yield from walk(part, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from walk(schema[key], f"{path}[]")


def at(path: str) -> dict[str, Any]:
    return dict(walk(SCHEMA))[path]


def test_the_file_is_what_the_tool_writes() -> None:
    spec = importlib.util.spec_from_file_location("crd_tool", ROOT / "tools" / "crd.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert (ROOT / "manifests" / "crd.yaml").read_text() == tool.render(), "run .venv/bin/python tools/crd.py"
    assert yaml.safe_load(tool.render()) == custom_resource_definition()


def test_every_property_is_typed_and_described() -> None:
    for path, part in walk(SCHEMA):
        assert part.get("type") in ("object", "array", "string", "integer", "number", "boolean"), path
        assert part.get("description") or path in ("", ".metadata") or path.endswith("[]"), path


def test_every_value_is_bounded() -> None:
    for path, part in walk(SCHEMA):
        if path in (".apiVersion", ".kind", ".metadata"):
            continue
        match part["type"]:
            case "string":
                assert "maxLength" in part or "enum" in part, path
            case "integer" | "number":
                assert {"minimum", "maximum"} <= part.keys(), path
            case "array":
                assert "maxItems" in part, path
            case "object" if "additionalProperties" in part:
                assert "maxProperties" in part, path


def test_the_schema_is_structural() -> None:
    """https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/"""
    forbidden = {"$ref", "anyOf", "oneOf", "allOf", "not", "title", "const", "definitions", "nullable", "prefixItems"}
    for path, part in walk(SCHEMA):
        assert not forbidden & part.keys(), path
        assert part.get("additionalProperties") is not False, path
        assert not ("properties" in part and "additionalProperties" in part), path
        assert isinstance(part.get("exclusiveMinimum", True), bool), path
        assert set(part.get("required", ())) <= part.get("properties", {}).keys(), path
        for key in part.get("x-kubernetes-list-map-keys", ()):
            assert key in part["items"]["required"], path
    preserving = [path for path, part in walk(SCHEMA) if part.get("x-kubernetes-preserve-unknown-fields")]
    assert preserving == [".spec.podTemplate.spec"]


def test_defaults_are_valid_and_whole() -> None:
    """An API server refuses a CRD with a default that its own schema or rules refuse, and tries them on it as it is."""
    for path, part in walk(SCHEMA):
        if "default" in part:
            assert problems(part["default"], part, path) == []
            assert defaulted(part["default"], part) == part["default"], f"{path}: a default inside is missing"
    assert at(".spec.replicas")["default"] == 1
    assert at(".spec.rollout")["default"] == {"maxSurge": 1, "maxUnavailable": 0, "drainSeconds": 120}
    assert at(".spec.model.kvCache")["default"] == {"dtype": "auto"}
    assert at(".spec.podTemplate")["default"] == at(".spec.parallelism")["default"] == {}
    assert "default" not in at(".spec.model.source")
    assert "default" not in at(".spec.autoscaling"), "none unless it is asked for"
    assert "default" not in at(".spec.parallelism.tensor"), "the planner chooses"


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        (".spec.model.source", "== 1"),
        (".spec.model.source.persistentVolumeClaim", "[.][.]"),
        (".spec.model.source.hostPath", "startsWith('/')"),
        (".spec.model", "oldSelf.name"),
        (".spec.accelerator", "resourceName"),
        (".spec.autoscaling", "minReplicas <= self.maxReplicas"),
        (".spec.rollout", "maxSurge > 0"),
        (".spec.engine", "maxChunkTokens"),
        (".spec.engine", "maxRunning"),
        ("", "metadata.name.size() <= 40"),
    ],
)
def test_what_crosses_fields_is_a_rule_with_a_message(path: str, rule: str) -> None:
    rules = [entry for entry in at(path)["x-kubernetes-validations"] if rule in entry["rule"]]
    assert len(rules) == 1
    assert rules[0]["message"]
    assert len(rules[0]["rule"]) < 2048
    assert "messageExpression" not in rules[0], "the API server estimates its cost beyond the budget"


def test_columns_and_subresources() -> None:
    columns = [column["name"] for column in VERSION["additionalPrinterColumns"] if not column.get("priority")]
    assert columns == ["Model", "Plan", "Ready", "Phase", "Tokens/s", "Age"]
    for column in VERSION["additionalPrinterColumns"]:
        path = column["jsonPath"]
        assert path == ".metadata.creationTimestamp" or at(path)["type"] == column["type"], path
    scale = VERSION["subresources"]["scale"]
    assert {at(path)["type"] for path in (scale["specReplicasPath"], scale["statusReplicasPath"])} == {"integer"}
    assert at(scale["labelSelectorPath"])["type"] == "string"
    names = custom_resource_definition()["spec"]["names"]
    assert names["shortNames"] == ["llama", "ld"]
    assert custom_resource_definition()["metadata"]["name"] == f"{names['plural']}.serving.arriero.dev"
