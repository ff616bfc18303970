"""A real API server takes what the chart renders, and holds its pods and permissions to what they promise."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
import yaml
from tests.charts.conftest import Chart, find
from tests.charts.monitoring_crds import definitions
from tests.charts.variants import NAMESPACE, SERVED, VARIANTS
from tests.cluster import machine
from tests.cluster.cluster import Cluster
from tests.cluster.conftest import unavailable
from tests.cluster.processes import ClusterError, wait_until, without_proxies
from tests.cluster.thin import PRODUCT_IMAGES
from tests.operator.fake_cluster import NAMESPACE as LLAMAS
from tests.operator.fake_cluster import SETTINGS, FakeCluster
from tools import crd, manifests

from arriero_operator.desired import desired
from arriero_operator.writes import Apply

pytestmark = pytest.mark.cluster

ACCOUNT = f"system:serviceaccount:{NAMESPACE}:arriero-operator"
OURS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/llamadeployments.serving.arriero.dev"
APPLY = ("apply", "--server-side", "--validate=strict", "--force-conflicts", "--filename=-")
# Objects say their namespaces themselves.
DRY_RUN = (*APPLY, "--dry-run=server", "--namespace=")
# Of the test cluster: the checkout as it is.
IMAGES = {program: {"repository": f"arriero-{program}", "tag": "test"} for program in ("operator", "router", "worker")}
assert {f"{image['repository']}:{image['tag']}" for image in IMAGES.values()} == set(PRODUCT_IMAGES.values())


def helm(chart: Chart, cluster: Cluster, command: str, *arguments: str) -> str:
    """helm on the cluster, as a person uses it."""
    outcome = subprocess.run(
        [str(chart.helm), command, "arriero", *arguments, f"--namespace={NAMESPACE}"],
        input=yaml.safe_dump({"images": IMAGES}),
        env={**without_proxies(), "KUBECONFIG": str(cluster.kubeconfig)},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert outcome.returncode == 0, f"{outcome.stdout}\n{outcome.stderr}"
    return outcome.stdout


def install(chart: Chart, cluster: Cluster) -> None:
    # Without nodes nothing ever runs.
    waiting = ["--wait", "--timeout=120s"] if cluster.nodes else []
    helm(chart, cluster, "install", str(manifests.CHART), "--values=-", *waiting)


def is_served(cluster: Cluster, path: str) -> bool:
    """Whether a resource is there; one whose storage is being made is refused as too many requests."""
    try:
        cluster.api.get(path)
    except httpx.HTTPStatusError:
        return False
    return True


@pytest.fixture(scope="module")
def cluster_with(cluster: Cluster, chart: Chart) -> Cluster:
    """The cluster with the chart installed, and the namespaces and kinds that its variants refer to."""
    api = cluster.api
    level = {"pod-security.kubernetes.io/enforce": "restricted"}
    for name in (NAMESPACE, *SERVED):
        api.create("/api/v1/namespaces", {"metadata": {"name": name, "labels": level}})
    cluster.kubectl().apply(*definitions())
    install(chart, cluster)
    ours = "/apis/serving.arriero.dev/v1alpha1/llamadeployments"
    monitors = [f"/apis/monitoring.coreos.com/v1/{plural}" for plural in ("servicemonitors", "podmonitors")]
    for path in (ours, *monitors):
        wait_until(lambda path=path: is_served(cluster, path), f"service of {path}", 30.0)
    for name in (NAMESPACE, *SERVED):
        account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
        wait_until(lambda account=account: api.exists(account), f"service account of {name}", 30.0)
    return cluster


def test_helm_test_passes_on_what_helm_installed(cluster_with: Cluster, chart: Chart) -> None:
    if not cluster_with.nodes:
        unavailable(machine.why_no_nodes() or "the cluster has no nodes")
    told = helm(chart, cluster_with, "test", "--logs", "--timeout=120s")
    assert "the operator is ready\nllamadeployments are served" in told
    deployment = cluster_with.api.get(f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/arriero-operator")
    assert deployment["status"]["readyReplicas"] == 2
    pods = cluster_with.api.get(f"/api/v1/namespaces/{NAMESPACE}/pods")["items"]
    operators = {pod["metadata"]["name"]: pod["spec"]["nodeName"] for pod in pods}
    assert len(set(operators.values())) == 2, "one on each node"
    lease = cluster_with.api.get(f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/arriero-operator")
    assert lease["spec"]["holderIdentity"] in operators


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_api_server_takes_every_variant(cluster_with: Cluster, chart: Chart, variant: str) -> None:
    text = yaml.safe_dump_all(chart.render(VARIANTS[variant]))
    told = cluster_with.kubectl()(*DRY_RUN, stdin=text)
    assert told.count("(server dry run)") == len(chart.render(VARIANTS[variant]))


def test_the_api_server_takes_the_manifests_without_helm(cluster_with: Cluster) -> None:
    told = cluster_with.kubectl()(*DRY_RUN, stdin=crd.INSTALL.read_text())
    assert "deployment.apps/arriero-operator serverside-applied" in told


def test_the_api_server_would_notice_a_wrong_field(cluster_with: Cluster, chart: Chart) -> None:
    objects = chart.render(VARIANTS["monitoring"])
    find(objects, "Deployment")["spec"]["replica"] = 2
    with pytest.raises(ClusterError, match=r'"spec\.replica"|spec\.replica: field not declared'):
        cluster_with.kubectl()(*DRY_RUN, stdin=yaml.safe_dump_all(objects))
    find(objects := chart.render(VARIANTS["monitoring"]), "PodMonitor", "arriero-routers")["spec"]["podEndpoints"] = []
    with pytest.raises(ClusterError, match="podEndpoints"):
        cluster_with.kubectl()(*DRY_RUN, stdin=yaml.safe_dump_all(objects))


@pytest.mark.parametrize("file", sorted((manifests.ROOT / "examples").glob("llama-*.yaml")), ids=lambda path: path.stem)
def test_the_api_server_takes_the_examples(cluster_with: Cluster, file: Any) -> None:
    assert "server dry run" in cluster_with.kubectl(LLAMAS)(*APPLY, "--dry-run=server", stdin=file.read_text())


# Pod Security


def admit(cluster: Cluster, template: Mapping[str, Any], namespace: str) -> None:
    """Ask whether a pod may be. Raises httpx.HTTPStatusError."""
    pod = {"metadata": {"name": "asked", "labels": template["metadata"].get("labels")}, "spec": dict(template["spec"])}
    # The account must exist, which is not what is asked here.
    pod["spec"]["serviceAccountName"] = "default"
    cluster.api.create(f"/api/v1/namespaces/{namespace}/pods?dryRun=All&fieldValidation=Strict", pod)


def operators_objects(**spec: Any) -> list[dict[str, Any]]:
    """What the operator applies in its first pass over a deployment."""
    fake = FakeCluster(dataclasses.replace(SETTINGS, image_pull_policy="Never"))
    fake.add_nodes(2)
    fake.create("big", **spec)
    return [dict(w.object) for w in desired(fake.observe("big"), fake.settings).writes if isinstance(w, Apply)]


UNKNOWN = {"name": "m", "source": {"huggingFace": {"repo": "some/model"}}}
"""A model that the operator has to look at first."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_operators_pods_are_restricted(cluster_with: Cluster, chart: Chart, variant: str) -> None:
    objects = chart.render(VARIANTS[variant])
    # Some classes are for certain namespaces alone, and that is not what is asked here.
    find(objects, "Deployment")["spec"]["template"]["spec"].pop("priorityClassName", None)
    admit(cluster_with, find(objects, "Deployment")["spec"]["template"], NAMESPACE)
    admit(cluster_with, find(objects, "Pod"), NAMESPACE)


def test_the_pods_that_it_makes_are_restricted(cluster_with: Cluster) -> None:
    objects = operators_objects()
    admit(cluster_with, find(objects, "Deployment")["spec"]["template"], LLAMAS)
    admit(cluster_with, find(objects, "StatefulSet")["spec"]["template"], LLAMAS)
    (inspector,) = operators_objects(model=UNKNOWN)
    admit(cluster_with, inspector, LLAMAS)


def test_the_level_is_enforced_here(cluster_with: Cluster, chart: Chart) -> None:
    pod = find(chart.render(), "Pod")
    pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    with pytest.raises(httpx.HTTPStatusError, match="violates PodSecurity"):
        admit(cluster_with, pod, NAMESPACE)


# Permissions


def may(cluster: Cluster, user: str, verb: str, resource: str, namespace: str = LLAMAS, name: str = "") -> bool:
    """Whether the API server would let a user do something. resource: plural[/subresource][.group]."""
    plain, _, group = resource.partition(".")
    plural, _, subresource = plain.partition("/")
    asked = {
        "verb": verb,
        "resource": plural,
        "subresource": subresource,
        "group": group,
        "namespace": namespace,
        "name": name,
    }
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": user, "groups": ["system:authenticated"], "resourceAttributes": asked},
    }
    answer = cluster.api.create("/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
    return bool(answer["status"].get("allowed"))


def test_with_its_own_permissions_the_operator_makes_and_removes_all_that_it_makes(cluster_with: Cluster) -> None:
    """Its router's Role among it: the API server refuses whoever grants more than he has."""
    kubectl = cluster_with.kubectl(LLAMAS)
    objects = [*operators_objects(), *operators_objects(model=UNKNOWN)]
    assert len({item["kind"] for item in objects}) == 10
    for item in objects:
        # The owner is not there: the garbage collector would be at work, too.
        del item["metadata"]["ownerReferences"]
        kubectl(*APPLY, f"--as={ACCOUNT}", "--field-manager=arriero", stdin=item)
    for item in reversed(objects):
        kubectl("delete", f"--as={ACCOUNT}", "--wait=false", "--filename=-", stdin=item)


def test_the_operator_cannot_grant_what_it_lacks(cluster_with: Cluster) -> None:
    (role,) = [item for item in operators_objects() if item["kind"] == "Role"]
    role["rules"].append({"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]})
    with pytest.raises(ClusterError, match="attempting to grant RBAC permissions not currently held"):
        cluster_with.kubectl(LLAMAS)(*DRY_RUN, f"--as={ACCOUNT}", stdin=yaml.safe_dump(role))


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        ("get", "secrets"),
        ("list", "secrets"),
        ("create", "pods/exec"),
        ("get", "pods/log"),
        ("create", "pods/eviction"),
        ("patch", "nodes"),
        ("delete", "nodes"),
        ("delete", "namespaces"),
        ("list", "namespaces"),
        ("delete", "llamadeployments.serving.arriero.dev"),
        ("update", "llamadeployments.serving.arriero.dev"),
        ("patch", "llamadeployments.serving.arriero.dev"),
        ("create", "clusterroles.rbac.authorization.k8s.io"),
        ("escalate", "roles.rbac.authorization.k8s.io"),
        ("bind", "clusterroles.rbac.authorization.k8s.io"),
        ("get", "leases.coordination.k8s.io"),
        ("impersonate", "users"),
        ("create", "serviceaccounts/token"),
        ("deletecollection", "pods"),
    ],
)
def test_what_the_operator_may_not(cluster_with: Cluster, verb: str, resource: str) -> None:
    assert may(cluster_with, ACCOUNT, "patch", "statefulsets.apps"), "the account has another name"
    assert not may(cluster_with, ACCOUNT, verb, resource)


def test_the_operator_holds_its_own_lease_alone(cluster_with: Cluster) -> None:
    lease = "leases.coordination.k8s.io"
    assert may(cluster_with, ACCOUNT, "patch", lease, NAMESPACE, "arriero-operator")
    assert may(cluster_with, ACCOUNT, "create", lease, NAMESPACE)
    assert not may(cluster_with, ACCOUNT, "patch", lease, NAMESPACE, "another")
    assert not may(cluster_with, ACCOUNT, "patch", lease, "kube-system", "kube-scheduler")


def test_editors_of_a_namespace_may_deploy_llamas_there(cluster_with: Cluster) -> None:
    ours = "llamadeployments.serving.arriero.dev"
    for user, role in (("ana", "edit"), ("ben", "view")):
        binding = {
            "metadata": {"name": user},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
        }
        cluster_with.api.create(f"/apis/rbac.authorization.k8s.io/v1/namespaces/{LLAMAS}/rolebindings", binding)
    # The controller manager gathers the rules of aggregated roles in its own time.
    wait_until(lambda: may(cluster_with, "ana", "create", ours), "the aggregated role", 30.0)
    wait_until(lambda: may(cluster_with, "ben", "watch", ours), "the aggregated role", 30.0)
    assert may(cluster_with, "ana", "patch", "llamadeployments/scale.serving.arriero.dev")
    assert not may(cluster_with, "ana", "patch", "llamadeployments/status.serving.arriero.dev")
    assert not may(cluster_with, "ben", "create", ours)
    assert not may(cluster_with, "ana", "create", ours, "default")


# The definition's life


def columns(cluster: Cluster) -> list[str]:
    found = cluster.api.get(OURS)["spec"]["versions"][0]["additionalPrinterColumns"]
    return [column["name"] for column in found]


def test_an_upgrade_brings_the_definition_and_uninstalling_leaves_it(cluster_with: Cluster, chart: Chart) -> None:
    before = columns(cluster_with)
    # The definition of an older release.
    older = [{"op": "remove", "path": "/spec/versions/0/additionalPrinterColumns/0"}]
    cluster_with.api.patch(OURS, older, "application/json-patch+json")
    assert columns(cluster_with) == before[1:]
    helm(chart, cluster_with, "upgrade", str(manifests.CHART), "--values=-", "--force-conflicts")
    assert columns(cluster_with) == before

    tiny = (manifests.ROOT / "examples" / "llama-3.1-8b.yaml").read_text()
    cluster_with.kubectl(LLAMAS)("apply", "--filename=-", stdin=tiny)
    uid = cluster_with.api.get(OURS)["metadata"]["uid"]
    helm(chart, cluster_with, "uninstall")
    assert cluster_with.api.get(OURS)["metadata"]["uid"] == uid
    assert cluster_with.kubectl(LLAMAS).get("llama", "llama-8b")["spec"]["model"]["name"]
    accounts = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/arriero-operator"
    assert not cluster_with.api.exists(accounts)

    install(chart, cluster_with)
    assert cluster_with.api.get(OURS)["metadata"]["uid"] == uid
    cluster_with.kubectl(LLAMAS)("delete", "llama", "llama-8b")
