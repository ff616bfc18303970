"""The operator is granted what it does, and nothing else.

What it does is read from its own tables (which kinds it watches, what its lease is) and from what it writes in
histories that lead it through everything it can write.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import pytest
from tests.charts.conftest import Chart, Object
from tests.charts.variants import NAMESPACE, SERVED, VARIANTS
from tests.operator.fake_cluster import FakeCluster

from arriero_operator import names
from arriero_operator.runtime.election import LEASE
from arriero_operator.runtime.election import NAME as LEASE_NAME
from arriero_operator.runtime.kinds import CHILDREN, DEPLOYMENT, EVENT, KINDS, NODE, POD, Kind
from arriero_operator.writes import Apply, Delete, Emit, Patch, SetStatus, Write

Permission = tuple[str, str, str]
"""API group, resource, verb."""
OPERATOR = {"kind": "ServiceAccount", "name": "arriero-operator", "namespace": NAMESPACE}


class Recorder(FakeCluster):
    """Keeps what is written, and by whom."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[Write] = []

    def write(self, write: Write) -> None:
        self.recorded.append(write)
        super().write(write)


def histories() -> list[Write]:
    """Everything that the operator writes: growing, rolling, shrinking, losing a node, tidying up, learning a model."""
    cluster = Recorder()
    cluster.add_nodes(6, rack="r1")
    cluster.create("big", replicas=2)
    cluster.converge("big")
    cluster.edit("big", podTemplate={"metadata": {"labels": {"team": "llamas"}}})
    cluster.converge("big")
    cluster.edit("big", replicas=1)
    cluster.converge("big")
    cluster.lose(cluster.pods()[0]["spec"]["nodeName"])
    cluster.run(120, "big")
    for (kind, name), item in [*cluster.objects.items()]:
        if kind in KINDS and kind not in ("Pod", "StatefulSet", "LlamaDeployment"):
            other = copy.deepcopy(item)
            other["metadata"] |= {"name": f"{name}-of-old", "uid": f"{item['metadata']['uid']}-of-old"}
            cluster.objects[kind, f"{name}-of-old"] = other
    cluster.converge("big")
    cluster.create("unknown", model={"name": "m", "source": {"hostPath": {"path": "/models/m"}}})
    cluster.pass_over("unknown")
    return cluster.recorded


def permission(kind: Kind, verb: str, subresource: str = "") -> Permission:
    group = kind.api_version.rpartition("/")[0]
    return group, kind.plural + (f"/{subresource}" if subresource else ""), verb


def needed_by(write: Write) -> Iterator[Permission]:
    match write:
        case Apply(rendered):
            # Server-side apply makes what is not there; before, the writer looks for the name.
            kind = KINDS[rendered["kind"]]
            yield from (permission(kind, verb) for verb in ("get", "create", "patch"))
            if any(owner.get("blockOwnerDeletion") for owner in rendered["metadata"]["ownerReferences"]):
                yield permission(DEPLOYMENT, "update", "finalizers")
            for rule in rendered.get("rules", ()):  # nobody may grant what he lacks
                yield from permissions_of(rule)
        case Patch(_, name):
            yield permission(KINDS[name], "patch")
        case Delete(_, name):
            yield permission(KINDS[name], "delete")
        case Emit():
            yield permission(EVENT, "create")
        case SetStatus():
            yield permission(DEPLOYMENT, "patch", "status")


def permissions_of(rule: Object) -> set[Permission]:
    assert not rule.get("nonResourceURLs")
    return {(g, r, v) for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}


def watched(kinds: Iterable[Kind]) -> set[Permission]:
    return {permission(kind, verb) for kind in kinds for verb in ("list", "watch")}


def granted(objects: list[Object], kind: str, namespace: str | None) -> set[Permission]:
    """What the operator's account may do by Roles, or ClusterRoles, bound in a namespace (None: in the cluster)."""
    found: set[Permission] = set()
    for binding in objects:
        if binding["kind"] != f"{kind}Binding" or binding["metadata"].get("namespace") != namespace:
            continue
        assert binding["subjects"] == [OPERATOR]
        (role,) = [
            o
            for o in objects
            if o["kind"] == binding["roleRef"]["kind"] == kind
            and o["metadata"]["name"] == binding["roleRef"]["name"]
            and o["metadata"].get("namespace") == namespace
        ]
        for rule in role["rules"]:
            found |= permissions_of(rule)
    return found


@pytest.fixture(scope="module")
def written() -> set[Permission]:
    """What the histories' writes need."""
    return {needed for write in histories() for needed in needed_by(write)}


def test_the_histories_reach_every_kind(written: set[Permission]) -> None:
    for verb in ("create", "patch", "delete"):
        assert {permission(kind, verb) for kind in (*CHILDREN, POD)} <= written, verb


def test_the_whole_cluster(chart: Chart, written: set[Permission]) -> None:
    objects = chart.render()
    wanted = written | watched((DEPLOYMENT, NODE, POD, *CHILDREN))
    assert granted(objects, "ClusterRole", None) == wanted


def test_some_namespaces(chart: Chart, written: set[Permission]) -> None:
    objects = chart.render(VARIANTS["some namespaces"])
    assert granted(objects, "ClusterRole", None) == watched((NODE, POD))
    for namespace in SERVED:
        assert granted(objects, "Role", namespace) == written | watched((DEPLOYMENT, *CHILDREN))
    assert not granted(objects, "Role", "others")


def test_the_lease(chart: Chart) -> None:
    objects = chart.render()
    assert granted(objects, "Role", NAMESPACE) == {permission(LEASE, verb) for verb in ("get", "create", "patch")}
    (role,) = [o for o in objects if o["kind"] == "Role"]
    for rule in role["rules"]:
        assert rule["verbs"] == ["create"] or rule["resourceNames"] == [LEASE_NAME]


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_wildcard_and_no_secret(chart: Chart, variant: str) -> None:
    for role in chart.render(VARIANTS[variant]):
        for rule in role.get("rules") or ():
            assert "*" not in (*rule["apiGroups"], *rule["resources"], *rule["verbs"])
            assert "secrets" not in rule["resources"]
            assert not {"escalate", "bind", "impersonate"} & {*rule["verbs"]}


def test_users_of_a_namespace_get_what_their_role_says(chart: Chart) -> None:
    roles = [o for o in chart.render() if o["kind"] == "ClusterRole"]
    may: dict[str, set[Permission]] = {"view": set(), "edit": set(), "admin": set()}
    for role in roles:
        for level in may:
            if role["metadata"]["labels"].get(f"rbac.authorization.k8s.io/aggregate-to-{level}") == "true":
                for rule in role["rules"]:
                    may[level] |= permissions_of(rule)
    assert {verb for _, _, verb in may["view"]} == {"get", "list", "watch"}
    assert may["view"] < may["edit"] == may["admin"]
    own = {(group, resource) for group, resource, _ in may["admin"]}
    assert own == {(names.PREFIX.strip("/"), r) for r in _RESOURCES}
    assert (names.PREFIX.strip("/"), "llamadeployments/status", "patch") not in may["admin"]


_RESOURCES = ("llamadeployments", "llamadeployments/status", "llamadeployments/scale")
