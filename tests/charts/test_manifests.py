"""What is generated is what is committed."""

from __future__ import annotations

from typing import Any

import yaml
from tests.charts.conftest import Chart
from tools import dashboard, manifests

INSTALL = [*yaml.safe_load_all(manifests.INSTALL.read_text())]
REMEDY = "run: python -m tools.manifests"


def test_the_charts_definition_is_current() -> None:
    assert manifests.CRD_TEMPLATE.read_text() == manifests.crd_template(), REMEDY


def test_install_yaml_is_current(chart: Chart) -> None:
    assert manifests.INSTALL.read_text() == manifests.install(chart.helm), REMEDY


def test_install_yaml_is_the_same_each_time(chart: Chart) -> None:
    assert manifests.install(chart.helm) == manifests.install(chart.helm)


def test_the_dashboard_is_current() -> None:
    assert dashboard.TARGET.read_text() == dashboard.render(), "run: python tools/dashboard.py"


def test_what_is_referred_to_comes_first() -> None:
    kinds = [item["kind"] for item in INSTALL]
    order = ["Namespace", "CustomResourceDefinition", "ServiceAccount", "ClusterRole", "ConfigMap", "Deployment"]
    assert [kind for kind in dict.fromkeys(kinds) if kind in order] == order
    assert set(kinds) <= set(manifests._ORDER)


def test_the_namespace_holds_pods_to_the_restricted_level() -> None:
    labels = INSTALL[0]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    namespaces = {item["metadata"]["namespace"] for item in INSTALL if "namespace" in item["metadata"]}
    assert namespaces == {INSTALL[0]["metadata"]["name"]}


def test_nothing_says_that_helm_has_it() -> None:
    def words(part: Any) -> str:
        return yaml.safe_dump(part)

    for item in INSTALL:
        assert "Helm" not in words(item)
        assert "helm.sh" not in words(item)
        assert item["metadata"].get("annotations", {}).get("helm.sh/hook") is None


def test_the_definition_without_helm_is_the_same() -> None:
    crd = yaml.safe_load((manifests.ROOT / "manifests" / "crd.yaml").read_text())
    (installed,) = [item for item in INSTALL if item["kind"] == "CustomResourceDefinition"]
    assert installed == crd
