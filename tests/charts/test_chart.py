"""The chart renders for every variant of its values, and what it renders is what the operator's program expects."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
import yaml
from tests.charts.conftest import Chart, Refused, find, kinds
from tests.charts.variants import NAMESPACE, SERVED, VARIANTS
from tools import manifests

from arriero_operator import names
from arriero_operator.runtime.config import Config, load_config
from arriero_operator.runtime.election import NAME
from arriero_plan.resource import LlamaDeployment


def operator_pod(objects: list[dict[str, Any]]) -> dict[str, Any]:
    pod: dict[str, Any] = find(objects, "Deployment")["spec"]["template"]
    return pod


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_passes_the_strict_lint(chart: Chart, variant: str) -> None:
    assert "0 chart(s) failed" in chart.lint(VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_one_set_of_distinct_objects(chart: Chart, variant: str) -> None:
    objects = chart.render(VARIANTS[variant])
    named = [(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in objects]
    assert len(set(named)) == len(named)
    for item in objects:
        assert item["metadata"]["labels"]["app.kubernetes.io/name"] == "arriero"
        cluster_wide = item["kind"] in ("CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding")
        assert ("namespace" not in item["metadata"]) == cluster_wide, item["metadata"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_operator_takes_the_file_that_the_chart_writes(chart: Chart, variant: str, tmp_path: Any) -> None:
    objects = chart.render(VARIANTS[variant])
    text = find(objects, "ConfigMap", "arriero-operator")["data"]["operator.yaml"]
    path = tmp_path / "operator.yaml"
    path.write_text(text)
    config = load_config(path)
    values = yaml.safe_load((manifests.CHART / "values.yaml").read_text())["operator"]
    wanted = {**values, **VARIANTS[variant].get("operator", {})}
    assert config.lost_seconds == wanted["lostSeconds"]
    assert config.watch_namespaces == tuple(wanted["watchNamespaces"])
    # What a value cannot set is the worker image's own affair.
    assert set(yaml.safe_load(text)) == {f.alias for f in Config.model_fields.values()} - {"downloadCommand"}
    container = operator_pod(objects)["spec"]["containers"][0]
    assert container["args"][1].rpartition("/")[0] in {m["mountPath"] for m in container["volumeMounts"]}


def test_values_default_to_what_the_operator_defaults_to(chart: Chart) -> None:
    values = yaml.safe_load((manifests.CHART / "values.yaml").read_text())["operator"]
    defaults = Config(worker_image="-", router_image="-").model_dump(by_alias=True)
    for name in ("lostSeconds", "bindSeconds", "patienceSeconds", "unreadySeconds", "clusterDomain"):
        assert values[name] == defaults[name], name


def test_another_file_makes_other_pods(chart: Chart) -> None:
    sums = [
        operator_pod(chart.render({"operator": {"lostSeconds": seconds}}))["metadata"]["annotations"]["checksum/config"]
        for seconds in (20, 21, 20)
    ]
    assert sums[0] == sums[2] != sums[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_pods_run_without_any_privilege(chart: Chart, variant: str) -> None:
    objects = chart.render(VARIANTS[variant])
    for pod in (operator_pod(objects)["spec"], find(objects, "Pod")["spec"]):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 65532
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False


def test_workers_admit_the_operator_by_its_labels(chart: Chart) -> None:
    pod = operator_pod(chart.render())
    assert pod["metadata"]["labels"][names.COMPONENT] == "operator"
    environment = {entry["name"]: entry for entry in pod["spec"]["containers"][0]["env"]}
    assert environment["ARRIERO_POD_NAMESPACE"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.namespace"
    assert environment["ARRIERO_POD_NAME"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"


def test_selectors_find_the_operator_and_not_the_test(chart: Chart) -> None:
    objects = chart.render()
    pods = operator_pod(objects)["metadata"]["labels"]
    test = find(objects, "Pod")["metadata"]["labels"]
    selectors = [
        find(objects, "Service")["spec"]["selector"],
        find(objects, "Deployment")["spec"]["selector"]["matchLabels"],
        find(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        find(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector.items() <= pods.items()
        assert not selector.items() <= test.items()
    (admitted,) = find(objects, "NetworkPolicy")["spec"]["ingress"][0]["from"]
    assert admitted["podSelector"]["matchLabels"].items() <= test.items()


def test_a_single_replica_has_no_budget_that_would_hold_up_a_drain(chart: Chart) -> None:
    assert "PodDisruptionBudget" in kinds(chart.render())
    assert "PodDisruptionBudget" not in kinds(chart.render({"operator": {"replicas": 1}}))


def test_images(chart: Chart) -> None:
    objects = chart.render(VARIANTS["private registry"])
    config = yaml.safe_load(find(objects, "ConfigMap")["data"]["operator.yaml"])
    pod = operator_pod(objects)["spec"]
    assert pod["containers"][0]["image"] == "registry.example:5000/team/arriero/operator:1.2.3"
    assert config["routerImage"] == "registry.example:5000/team/arriero/router:1.2.4"
    assert config["workerImage"] == "registry.example:5000/team/arriero/worker@sha256:" + "0123456789abcdef" * 4
    assert pod["imagePullSecrets"] == [{"name": "pull"}, {"name": "other"}]
    assert config["imagePullSecrets"] == ["pull", "other"]


def test_versions_are_the_projects(chart: Chart) -> None:
    version = tomllib.loads((manifests.ROOT / "pyproject.toml").read_text())["project"]["version"]
    about = yaml.safe_load((manifests.CHART / "Chart.yaml").read_text())
    assert about["appVersion"] == about["version"] == version
    config = yaml.safe_load(find(chart.render(), "ConfigMap")["data"]["operator.yaml"])
    assert config["workerImage"] == f"arriero/worker:{version}"


def test_the_definition_is_kept_unless_told_otherwise(chart: Chart) -> None:
    kept = find(chart.render(), "CustomResourceDefinition")
    assert kept["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    plain = yaml.safe_load((manifests.ROOT / "manifests" / "crd.yaml").read_text())
    assert kept["spec"] == plain["spec"]
    gone = find(chart.render({"crd": {"keep": False}}), "CustomResourceDefinition")
    assert "annotations" not in gone["metadata"]
    assert "CustomResourceDefinition" not in kinds(chart.render({"crd": {"install": False}}))


def test_clusters_that_lack_scheduling_gates_are_refused(chart: Chart) -> None:
    chart.render({}, "--kube-version=1.30.0")
    chart.render({}, "--kube-version=1.34.4-gke.100")
    with pytest.raises(Refused, match=r"requires kubeVersion: >=1\.30\.0-0"):
        chart.render({}, "--kube-version=1.29.9")


def test_the_lease_is_the_one_that_operators_hold(chart: Chart) -> None:
    (role,) = [o for o in chart.render() if o["kind"] == "Role"]
    assert role["metadata"]["namespace"] == NAMESPACE
    assert [rule.get("resourceNames") for rule in role["rules"]] == [None, [NAME]]


def test_the_notes_tell_commands_for_what_was_installed(chart: Chart) -> None:
    everywhere = chart.notes()
    assert f"kubectl --namespace {NAMESPACE} rollout status deployment/arriero-operator" in everywhere
    assert "kubectl get llama --watch" in everywhere
    example = everywhere.partition("<<EOF\n")[2].partition("\n  EOF")[0]
    assert LlamaDeployment.model_validate(yaml.safe_load(example)).metadata.name == "llama-8b"
    some = chart.notes(VARIANTS["some namespaces"])
    assert f"kubectl --namespace {SERVED[0]} get llama --watch" in some
    assert "crd.keep is false" in chart.notes({"crd": {"keep": False}})
    assert "monitoring.namespace is empty" in chart.notes({"monitoring": {"podMonitors": {"enabled": True}}})
