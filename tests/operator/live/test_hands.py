"""Users' hands: what they edit, delete, own, scale and look at."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.cluster.processes import wait_until
from tests.operator.live.process import Operator
from tests.operator.live.proxy import ApiProxy
from tests.operator.live.world import World, path_of

pytestmark = pytest.mark.cluster

Start = Callable[..., Operator]
MADE = (
    "configmaps",
    "services",
    "serviceaccounts",
    "deployments",
    "statefulsets",
    "networkpolicies",
    "poddisruptionbudgets",
    "roles",
    "rolebindings",
)
"""Kinds that the operator itself makes."""
EDITS: dict[str, dict[str, Any]] = {
    "services": {"spec": {"selector": {"app": "mine"}}},
    "serviceaccounts": {"automountServiceAccountToken": True},
    "deployments": {"spec": {"replicas": 3}},
    "statefulsets": {"spec": {"replicas": 5}},
    "networkpolicies": {"spec": {"policyTypes": ["Ingress", "Egress"]}},
    "poddisruptionbudgets": {"spec": {"maxUnavailable": 2}},
    "roles": {"rules": []},
    "rolebindings": {"subjects": []},
}


def pod_uids(world: World, space: str, component: str = "worker") -> dict[str, str]:
    pods = world.list("pods", space)
    return {
        pod["metadata"]["name"]: pod["metadata"]["uid"]
        for pod in pods
        if pod["metadata"]["labels"].get("app.kubernetes.io/component") == component
    }


def test_what_was_edited_or_deleted_by_hand_is_put_back(
    world: World, proxy: ApiProxy, operator: Operator, space: str
) -> None:
    world.deploy(space)
    world.wait_ready(space)
    world.wait_quiet(proxy)
    before, pods = world.snapshot(space), pod_uids(world, space)
    mine = [(plural, name) for plural, name in world.children(space) if plural in MADE]

    for plural, name in mine:
        if plural in EDITS:
            world.api.patch(path_of(plural, space, name), EDITS[plural])
    world.api.patch(path_of("configmaps", space, "llama-router"), {"data": {"router.yaml": "models: []"}})
    # Without the label it is not even among what the operator watches.
    world.api.patch(
        path_of("services", space, "llama-leaders"), {"metadata": {"labels": {"app.kubernetes.io/managed-by": None}}}
    )
    began = time.monotonic()
    world.wait_same(space, before)
    print(f"edits of {len(mine)} objects put back in {time.monotonic() - began:.1f} s")
    assert pod_uids(world, space) == pods, "no worker was restarted"

    for plural, name in mine:
        if plural != "statefulsets":
            world.api.delete(path_of(plural, space, name))
    began = time.monotonic()
    world.wait_same(space, before)
    print(f"all of them but the StatefulSet, deleted, are back in {time.monotonic() - began:.1f} s")
    assert pod_uids(world, space) == pods, "no worker was restarted"


@pytest.mark.parametrize("policy", ["Background", "Orphan"])
def test_a_group_deleted_by_hand_is_made_anew_and_nothing_is_left_of_it(
    world: World, proxy: ApiProxy, operator: Operator, space: str, policy: str
) -> None:
    world.deploy(space)
    world.wait_ready(space)
    world.wait_quiet(proxy)
    before = pod_uids(world, space)
    first = world.get("statefulsets", space, "llama-0")["metadata"]["uid"]
    world.api.delete(path_of("statefulsets", space, "llama-0"), propagationPolicy=policy)
    wait_until(
        lambda: any(o["metadata"]["uid"] != first for o in world.list("statefulsets", space)), "another StatefulSet"
    )
    world.wait_quiet(proxy)
    world.wait_ready(space)
    sets = [o["metadata"]["name"] for o in world.list("statefulsets", space)]
    assert len(sets) == 1
    after = pod_uids(world, space)
    assert {name.rpartition("-")[0] for name in after} == set(sets), "pods that belong to nobody hold devices"
    if policy == "Orphan":
        assert after == before, "the new StatefulSet adopts them, and nothing restarts"


def test_what_others_have_is_left_alone_and_told(world: World, proxy: ApiProxy, operator: Operator, space: str) -> None:
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "llama-router"},
        "spec": {"selector": {"app": "mine"}, "ports": [{"port": 1}]},
    }
    made = world.api.create(path_of("services", space), service)
    config = {"metadata": {"name": "llama-router"}, "data": {"mine": "yes"}}
    world.api.create(path_of("configmaps", space), config)
    world.deploy(space)

    def told() -> bool:
        message = world.status(space).get("message", "")
        return "Service llama-router" in message or "ConfigMap llama-router" in message

    wait_until(told, "word of the names that are taken")
    conditions = {c["type"]: c for c in world.status(space)["conditions"]}
    assert conditions["Degraded"]["reason"] == "NameTaken"
    assert "Service llama-router" in conditions["Degraded"]["message"]
    assert "ConfigMap llama-router" in conditions["Degraded"]["message"]
    world.wait_quiet(proxy)
    seen = world.get("services", space, "llama-router")
    assert (seen["metadata"]["uid"], seen["spec"]) == (made["metadata"]["uid"], made["spec"])
    assert world.get("configmaps", space, "llama-router")["data"] == {"mine": "yes"}
    world.api.delete(path_of("services", space, "llama-router"))
    world.api.delete(path_of("configmaps", space, "llama-router"))
    world.wait_ready(space, timeout=40.0)


def test_what_others_add_stays(world: World, proxy: ApiProxy, operator: Operator, space: str) -> None:
    world.deploy(space)
    world.wait_ready(space)
    world.wait_quiet(proxy)
    before = len(proxy.calls)
    mark = {"metadata": {"labels": {"team": "blue"}, "annotations": {"example.com/note": "ours"}}}
    mine = [(plural, name) for plural, name in world.children(space) if plural in MADE]
    for plural, name in [*mine, ("llamadeployments", "llama")]:
        world.api.patch(path_of(plural, space, name), mark)
    world.wait_quiet(proxy)
    assert not proxy.writes(space, before), "what others add is no reason to write"
    world.edit(space, router={"policy": "round-robin"}, replicas=2)
    world.wait_ready(space)
    for plural, name in mine:
        metadata = world.get(plural, space, name)["metadata"]
        assert metadata["labels"]["team"] == "blue", (plural, name)
        assert metadata["annotations"]["example.com/note"] == "ours", (plural, name)


def test_kubectl_scales_lists_and_explains(world: World, operator: Operator, space: str) -> None:
    kubectl = world.cluster.kubectl(space)
    world.deploy(space)
    world.wait_ready(space)
    kubectl("scale", "llamadeployment", "llama", "--replicas=2")
    world.wait_ready(space)
    scale = world.api.get(path_of("llamadeployments", space, "llama") + "/scale")
    assert scale["status"]["replicas"] == 2
    selected = kubectl.get("pods", "--selector", scale["status"]["selector"])["items"]
    assert len(selected) == 4, "the scale's selector finds the workers"

    header, line = kubectl("get", "llama").splitlines()
    print(header, line, sep="\n")
    assert re.split(r"\s{2,}|\s(?=[A-Z])", header.strip()) == [
        "NAME",
        "MODEL",
        "PLAN",
        "READY",
        "PHASE",
        "TOKENS/S",
        "AGE",
    ]
    assert re.match(r"llama +llama +TP1xPP2 +2/2 +Ready ", line)
    assert "MESSAGE" in kubectl("get", "ld", "-o", "wide").splitlines()[0]
    assert "llamadeployment.serving.arriero.dev/llama" in kubectl("get", "all")
    assert "llamadeployment.serving.arriero.dev/llama" in kubectl("get", "arriero", "--output=name")
    events = kubectl("events", "--for", "llamadeployment/llama")
    assert "Ready" in events, events

    told = kubectl("explain", "llamadeployment.spec", "--recursive")
    assert re.search(r"model\t<Object> -required-", told)
    assert re.search(r"enum: auto, ", told)
    for field in ("parallelism", "maxContext", "drainSeconds", "topologyKey", "podTemplate", "tokenSecretRef"):
        assert re.search(rf"^ *{field}\t<", told, re.MULTILINE), field
    leaves = [m[1] for m in re.finditer(r"^( +\w+\t<.*)$", told, re.MULTILINE)]
    print(f"explain: {len(leaves)} fields")
    described = kubectl("explain", "llamadeployment.spec.rollout")
    for field in ("maxSurge", "maxUnavailable", "drainSeconds"):
        assert re.search(rf"{field}\t<integer>\n(?:.*\n)*?    \w", described), described

    kubectl("scale", "llamadeployment", "llama", "--replicas=0")
    wait_until(lambda: world.status(space).get("phase") == "Idle", "a deployment at rest")
    wait_until(lambda: not world.list("statefulsets", space), "end of the groups")
    kubectl("wait", "llama/llama", "--for=jsonpath={.status.phase}=Idle", "--timeout=10s")


def test_orphaned_children_go_on_and_a_successor_says_what_is_in_its_way(
    world: World, proxy: ApiProxy, operator: Operator, space: str
) -> None:
    world.deploy(space)
    world.wait_ready(space)
    pods = pod_uids(world, space)
    world.cluster.kubectl(space)("delete", "llamadeployment", "llama", "--cascade=orphan")
    wait_until(lambda: not world.list("llamadeployments", space), "end of the deployment")

    def mine() -> list[str]:
        return [
            name
            for (plural, name), o in world.children(space).items()
            if plural in MADE and any(r["kind"] == "LlamaDeployment" for r in o["metadata"].get("ownerReferences", []))
        ]

    wait_until(lambda: not mine(), "objects that belong to nobody")
    world.wait_quiet(proxy)
    assert pod_uids(world, space) == pods, "as asked, what served goes on"
    world.deploy(space)
    wait_until(lambda: world.status(space).get("phase") == "Degraded", "word of what is in the way")
    assert "belongs to somebody else" in world.status(space)["message"]
    world.wait_quiet(proxy)
    assert pods.items() <= pod_uids(world, space).items(), "they are nobody's to delete but the user's"
    for (plural, name), o in world.children(space).items():
        if plural in MADE and not o["metadata"].get("ownerReferences"):
            world.api.delete(path_of(plural, space, name), propagationPolicy="Background")
    world.wait_ready(space)
    assert not pods.items() & pod_uids(world, space).items()
