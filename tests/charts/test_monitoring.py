"""What Prometheus and Grafana are told fits what is measured."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase
from tests.charts.conftest import Chart, find, kinds
from tests.charts.variants import MONITORING, SERVED, VARIANTS
from tests.operator.fake_cluster import FakeCluster
from tools import dashboard, manifests

from arriero_operator.runtime import metrics

METRIC = re.compile(r"\barriero_[a-z0-9_]+")
DASHBOARD = json.loads(dashboard.TARGET.read_text())
DOCUMENTED = {*METRIC.findall((manifests.ROOT / "docs" / "metrics.md").read_text())}


def own_metrics() -> set[str]:
    """The operator's series, as it serves them."""
    families = [f for value in vars(metrics).values() if isinstance(value, MetricWrapperBase) for f in value.describe()]
    return {family.name + ("_total" if family.type == "counter" else "") for family in families}


def expressions() -> list[str]:
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    return queries + [entry["definition"] for entry in DASHBOARD["templating"]["list"] if "definition" in entry]


def test_every_series_of_the_dashboard_is_one_that_is_served() -> None:
    used = {re.sub("_bucket$", "", name) for query in expressions() for name in METRIC.findall(query)}
    assert len(used) > 20
    assert used <= DOCUMENTED | own_metrics()


def test_legends_name_labels_that_their_query_keeps() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            kept = {label for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in re.split(", ?", by)}
            assert {*re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])} <= kept, (panel["title"], target)


def test_queries_are_balanced_and_panels_do_not_overlap() -> None:
    for query in expressions():
        for opening, closing in ("()", "{}", "[]"):
            assert query.count(opening) == query.count(closing), query
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_sidecar_finds_the_dashboard(chart: Chart) -> None:
    config = find(chart.render(VARIANTS["monitoring"]), "ConfigMap", "arriero-dashboard")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(config["data"]["arriero.json"]) == DASHBOARD
    elsewhere = find(chart.render(VARIANTS["monitoring of some namespaces"]), "ConfigMap", "arriero-dashboard")
    assert elsewhere["metadata"]["namespace"] == SERVED[0]


def test_nothing_of_it_is_there_unasked(chart: Chart) -> None:
    assert not {"ServiceMonitor", "PodMonitor"} & kinds(chart.render())
    assert len([o for o in chart.render() if o["kind"] == "ConfigMap"]) == 1


@pytest.fixture(scope="module")
def pods() -> dict[str, list[dict[str, Any]]]:
    """Pods that the operator makes, by component."""
    cluster = FakeCluster()
    cluster.add_nodes(2)
    cluster.create("big")
    cluster.converge("big")
    workers = cluster.pods("big-0")
    router: dict[str, Any] = cluster.objects["Deployment", "big-router"]["spec"]["template"]
    return {"worker": workers, "router": [router]}


@pytest.mark.parametrize("component", ["router", "worker"])
def test_a_monitor_selects_who_serves_metrics(
    chart: Chart, pods: dict[str, list[dict[str, Any]]], component: str
) -> None:
    monitor = find(chart.render(VARIANTS["monitoring"]), "PodMonitor", f"arriero-{component}s")["spec"]
    selector = monitor["selector"]["matchLabels"].items()
    selected = [pod for pod in pods[component] if selector <= pod["metadata"]["labels"].items()]
    assert len(selected) == 1, "of a group the leader serves them, and no other pod"
    others = [pod for name, them in pods.items() if name != component for pod in them]
    assert not any(selector <= pod["metadata"]["labels"].items() for pod in others)
    (endpoint,) = monitor["podMetricsEndpoints"]
    (container,) = [c for c in selected[0]["spec"]["containers"] if c["name"] == component]
    assert {"name": endpoint["port"], "containerPort": 8000, "protocol": "TCP"} in container["ports"]
    for rule in endpoint["relabelings"]:
        (source,) = rule["sourceLabels"]
        labels = {
            "__meta_kubernetes_pod_label_" + re.sub("[^A-Za-z0-9]", "_", label)
            for label in selected[0]["metadata"]["labels"]
        }
        assert source in labels


def test_monitors_look_where_the_operator_serves(chart: Chart) -> None:
    everywhere = find(chart.render(VARIANTS["monitoring"]), "PodMonitor", "arriero-workers")
    assert everywhere["spec"]["namespaceSelector"] == {"any": True}
    some = find(chart.render(VARIANTS["monitoring of some namespaces"]), "PodMonitor", "arriero-workers")
    assert some["spec"]["namespaceSelector"] == {"matchNames": [SERVED[0]]}
    assert some["metadata"]["labels"]["release"] == "prometheus"


def test_whoever_monitors_is_admitted(chart: Chart) -> None:
    objects = chart.render(VARIANTS["monitoring"])
    service = find(objects, "Service")
    monitor = find(objects, "ServiceMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    sources = find(objects, "NetworkPolicy")["spec"]["ingress"][0]["from"]
    admitted = [s["namespaceSelector"]["matchLabels"] for s in sources if "namespaceSelector" in s]
    assert admitted == [{"kubernetes.io/metadata.name": MONITORING["namespace"]}]
    config = yaml.safe_load(find(objects, "ConfigMap", "arriero-operator")["data"]["operator.yaml"])
    assert config["metricsNamespace"] == MONITORING["namespace"]
