"""Values are checked before anything is rendered, and described where people look."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml
from tests.charts.conftest import Chart, Refused
from tools import chart_docs, manifests

SCHEMA = json.loads((manifests.CHART / "values.schema.json").read_text())
TEXT = (manifests.CHART / "values.yaml").read_text()

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown room": ({"image": {}}, "additional properties 'image' not allowed"),
    "a misspelt value": ({"images": {"regsitry": "x"}}, "at '/images': additional properties 'regsitry' not allowed"),
    "a misspelt switch": ({"crd": {"kept": True}}, "at '/crd': additional properties 'kept' not allowed"),
    "an unknown monitor": (
        {"monitoring": {"alerts": {}}},
        "at '/monitoring': additional properties 'alerts' not allowed",
    ),
    "no replica": ({"operator": {"replicas": 0}}, "at '/operator/replicas': minimum: got 0, want 1"),
    "half a replica": ({"operator": {"replicas": 1.5}}, "at '/operator/replicas': got number, want integer"),
    "replicas in words": ({"operator": {"replicas": "two"}}, "at '/operator/replicas': got string, want integer"),
    "a time in words": ({"operator": {"lostSeconds": "20s"}}, "at '/operator/lostSeconds': got string, want number"),
    "no time at all": ({"operator": {"bindSeconds": 0}}, "at '/operator/bindSeconds': minimum: got 0, want 1"),
    "a week": ({"operator": {"patienceSeconds": 604800}}, "at '/operator/patienceSeconds': maximum"),
    "a namespace that cannot be": ({"operator": {"watchNamespaces": ["Team_A"]}}, "at '/operator/watchNamespaces/0'"),
    "a namespace twice": (
        {"operator": {"watchNamespaces": ["a", "a"]}},
        "at '/operator/watchNamespaces': items at 0 and 1",
    ),
    "namespaces in one string": ({"operator": {"watchNamespaces": "a,b"}}, "got string, want array"),
    "a label of ours": ({"operator": {"podLabels": {"app.kubernetes.io/name": "x"}}}, "at '/operator/podLabels/"),
    "a label that is a number": (
        {"operator": {"podLabels": {"a": 1}}},
        "at '/operator/podLabels/a': got number, want string",
    ),
    "a quantity that is none": (
        {"operator": {"resources": {"limits": {"memory": "1 GB"}}}},
        "at '/operator/resources/limits/memory'",
    ),
    "an unknown part of resources": ({"operator": {"resources": {"limit": {}}}}, "'limit' not allowed"),
    "our environment": (
        {"operator": {"extraEnv": [{"name": "ARRIERO_POD_NAME", "value": "x"}]}},
        "at '/operator/extraEnv/0/name'",
    ),
    "a volume of ours": ({"operator": {"extraVolumes": [{"name": "config"}]}}, "at '/operator/extraVolumes/0/name'"),
    "a mount over ours": (
        {"operator": {"extraVolumeMounts": [{"name": "x", "mountPath": "/tmp"}]}},
        "at '/operator/extraVolumeMounts/0/mountPath'",
    ),
    "a mount without a place": ({"operator": {"extraVolumeMounts": [{"name": "x"}]}}, "missing property 'mountPath'"),
    "a registry with a scheme": ({"images": {"registry": "https://registry.example"}}, "at '/images/registry'"),
    "an image with a tag in it": (
        {"images": {"worker": {"repository": "arriero/worker:1"}}},
        "at '/images/worker/repository'",
    ),
    "half a digest": ({"images": {"router": {"digest": "sha256:12"}}}, "at '/images/router/digest'"),
    "a tag that is a number": ({"images": {"tag": 1.2}}, "at '/images/tag': got number, want string"),
    "another pull policy": (
        {"images": {"pullPolicy": "Sometimes"}},
        "value must be one of 'IfNotPresent', 'Always', 'Never'",
    ),
    "an interval without a unit": (
        {"monitoring": {"interval": 15}},
        "at '/monitoring/interval': got number, want string",
    ),
    "a switch in words": (
        {"networkPolicy": {"enabled": "yes"}},
        "at '/networkPolicy/enabled': got string, want boolean",
    ),
    "nothing for a switch": ({"networkPolicy": {"enabled": None}}, "missing property 'enabled'"),
    "an account that cannot be": ({"serviceAccount": {"name": "-"}}, "at '/serviceAccount/name'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_refused_and_named(chart: Chart, case: str) -> None:
    values, words = BAD[case]
    with pytest.raises(Refused) as refused:
        chart.render(values)
    assert "values don't meet the specifications of the schema" in str(refused.value)
    assert words in str(refused.value)


def properties(part: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of everything that a schema names, down to where users' own keys begin."""
    if "$ref" in part:
        part = SCHEMA["definitions"][part["$ref"].rpartition("/")[2]]
    for name, deeper in part.get("properties", {}).items():
        if isinstance(deeper, Mapping):
            yield (*path, name)
            yield from properties(deeper, (*path, name))


def values_below(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of everything that values.yaml sets."""
    if isinstance(value, Mapping):
        for name, deeper in value.items():
            yield (*path, name)
            yield from values_below(deeper, (*path, name))


FREE = {("operator", name) for name in ("resources", "affinity")} | {("monitoring", "dashboard", "labels")}
"""Values whose inner keys are Kubernetes' or the user's."""


def test_schema_and_values_know_the_same() -> None:
    def known(paths: Iterator[tuple[str, ...]]) -> set[tuple[str, ...]]:
        return {path for path in paths if not any(path[: len(free)] == free and path != free for free in FREE)}

    assert known(properties(SCHEMA)) - {("global",)} == known(values_below(yaml.safe_load(TEXT)))


def test_every_value_is_described() -> None:
    described = set(chart_docs.descriptions(TEXT))
    rooms = {path[:-1] for path in described}
    leaves = {path for path in values_below(yaml.safe_load(TEXT)) if path not in rooms}
    undescribed = {path for path in leaves if not any(path[: len(known)] == known for known in described)}
    assert not undescribed


def test_every_room_refuses_what_it_does_not_know() -> None:
    def open_rooms(part: Any, path: str) -> Iterator[str]:
        if isinstance(part, Mapping):
            if part.get("type") == "object" and "properties" in part and part.get("additionalProperties") is not False:
                yield path
            for name, deeper in part.items():
                yield from open_rooms(deeper, f"{path}/{name}")

    allowed = ("/podLabels", "/extraEnv/items", "/extraVolumes/items", "/extraVolumeMounts/items")
    assert [path for path in open_rooms(SCHEMA, "") if not path.endswith(allowed)] == []


def test_a_chart_that_has_ours_inside_may_pass_globals(chart: Chart) -> None:
    chart.render({"global": {"anything": 1}})


def test_the_page_shows_the_values() -> None:
    page = chart_docs.PAGE.read_text()
    assert page == chart_docs.page(page), "run: python tools/chart_docs.py"


def test_a_changed_default_would_be_noticed() -> None:
    page = chart_docs.PAGE.read_text()
    assert (
        chart_docs.page(
            page.replace("| `operator.replicas` | integer, 1 to 9 | `2` |", "| `operator.replicas` | any |")
        )
        == page
    )


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(SystemExit, match="are not there"):
        chart_docs.page("# Install\n")


def test_a_comment_belongs_to_the_key_below_it() -> None:
    text = "# Not this.\n\na:\n  # One\n  # two.\n  b: 1\n  c:\n    # Three.\n    d: {}\n"
    assert chart_docs.descriptions(text) == {("a", "b"): "One two.", ("a", "c", "d"): "Three."}


def test_a_value_that_the_schema_lacks_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"does not know a\.b"):
        [*chart_docs.rows("a:\n  # What.\n  b: 1\n", {"properties": {"a": {"properties": {}}}})]
