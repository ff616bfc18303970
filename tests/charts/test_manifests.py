"""What is generated is what is committed."""

from __future__ import annotations

import yaml
from tests.charts.conftest import Chart
from tools import crd, dashboard, manifests

INSTALL = [*yaml.safe_load_all(crd.INSTALL.read_text())]


def test_the_definition_is_the_same_wherever_it_stands() -> None:
    assert crd.CHART_TEMPLATE.read_text() == crd.chart_template(), "run: python tools/crd.py"
    assert crd.INSTALL.read_text() == crd.installed(crd.INSTALL.read_text()), "run: python tools/crd.py"


def test_install_yaml_is_current(chart: Chart) -> None:
    assert crd.INSTALL.read_text() == manifests.install(chart.helm), "run: python -m tools.manifests"


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
    for item in INSTALL:
        text = yaml.safe_dump(item["metadata"])
        assert "Helm" not in text
        assert "helm.sh" not in text
