"""Gang placement: all pods of a group or none, never more than a node has, and a place whenever there is one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from arriero_operator import names
from arriero_operator.observe import Node, Pod, nodes_of, timestamp
from arriero_operator.placement import Gang, gangs, place

GPU = "nvidia.com/gpu"
RACK = "topology.kubernetes.io/rack"
NOW = 1_800_000_000.0
PATIENCE = 300.0


def node(name: str, gpus: int, rack: str = "", taints: Sequence[dict[str, str]] = (), **changes: Any) -> dict[str, Any]:
    labels = {names.HOSTNAME: f"host-of-{name}", **({RACK: rack} if rack else {})}
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {"taints": list(taints), **changes},
        "status": {
            "allocatable": {GPU: str(gpus), "cpu": "64", "pods": "110"},
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": timestamp(NOW - 3600)}],
        },
    }


def group(
    name: str, size: int, gpus: int, topology: str = "", created: float = NOW, order: str = "0", **spec: Any
) -> list[dict[str, Any]]:
    """The gated pods of a group, as the cluster shows them."""
    return [
        {
            "metadata": {
                "name": f"{name}-{index}",
                "namespace": "llamas",
                "uid": f"{name}-{index}",
                "creationTimestamp": timestamp(created),
                "labels": {
                    names.DEPLOYMENT: name.rpartition("-")[0],
                    names.GROUP: name,
                    names.REPLICA: name.rpartition("-")[2],
                    names.POD_INDEX: str(index),
                },
                "annotations": {
                    names.GROUP_SIZE: str(size),
                    names.ORDER: order,
                    **({names.TOPOLOGY: topology} if topology else {}),
                },
            },
            "spec": {
                "schedulingGates": [{"name": names.GATE}],
                "containers": [{"name": "worker", "resources": {"limits": {GPU: str(gpus)}}}],
                **spec,
            },
        }
        for index in range(size)
    ]


def verdicts(nodes: list[dict[str, Any]], pods: list[dict[str, Any]], now: float = NOW) -> Any:
    found = place(nodes_of(nodes, pods), gangs(Pod.of(pod) for pod in pods), now, PATIENCE)
    return {name: verdict for (_, name), verdict in found.items()}


def pin(pods: list[dict[str, Any]], pins: Any) -> None:
    """What the operator's patch does."""
    for pod in pods:
        if (target := pins.get(pod["metadata"]["name"])) is not None:
            pod["spec"]["schedulingGates"] = []
            pod["spec"]["nodeSelector"] = {names.HOSTNAME: target.hostname}
            pod["metadata"]["annotations"][names.PINNED_AT] = timestamp(NOW)


def missing(nodes: list[dict[str, Any]], pods: list[dict[str, Any]]) -> str:
    (verdict,) = verdicts(nodes, pods).values()
    assert not verdict.pins
    return verdict.missing


def test_a_group_gets_as_few_nodes_as_hold_it() -> None:
    nodes = [node("a", 2), node("b", 8), node("c", 4)]
    (verdict,) = verdicts(nodes, group("llama-0", size=3, gpus=4)).values()
    assert [verdict.pins[f"llama-0-{i}"].name for i in range(3)] == ["b", "b", "c"]


def test_a_group_takes_the_tightest_rack() -> None:
    nodes = [node(f"{rack}{i}", 8, rack) for rack, count in (("r", 4), ("s", 2), ("t", 3)) for i in range(count)]
    for mode in ("Required", "Preferred"):
        (verdict,) = verdicts(nodes, group("llama-0", 2, 8, f"{mode}={RACK}")).values()
        assert {target.name for target in verdict.pins.values()} == {"s0", "s1"}


def test_preferred_goes_over_racks_where_none_holds_it_and_keeps_neighbours_together() -> None:
    nodes = [node("a0", 8, "a"), node("b0", 8, "b"), node("b1", 8, "b"), node("c0", 8)]
    (verdict,) = verdicts(nodes, group("llama-0", 4, 8, f"Preferred={RACK}")).values()
    assert [verdict.pins[f"llama-0-{i}"].name for i in range(4)] == ["b0", "b1", "a0", "c0"]


def test_an_incomplete_group_waits() -> None:
    assert verdicts([node("a", 8)], group("llama-0", 2, 1)[:1]) == {}


def test_what_is_missing_is_said_in_one_sentence() -> None:
    racks = [node("a", 8, "r"), node("b", 4, "r"), node("c", 8, "s"), node("d", 0, "s")]
    assert missing(racks, group("llama-0", 2, 8, f"Required={RACK}")) == (
        "needs 2 nodes with 8 free nvidia.com/gpu in one rack, has 1"
    )
    assert missing([node("a", 4)], group("llama-0", 3, 2)) == (
        "needs room for 3 pods with 2 free nvidia.com/gpu each, has room for 2"
    )
    assert missing([node("a", 8)], group("llama-0", 2, 8, "Required=kubernetes.io/hostname")) == (
        "needs room for 2 pods with 8 free nvidia.com/gpu each on one node, has room for 1"
    )
    assert missing([], group("llama-0", 1, 1)) == "needs 1 node with 1 free nvidia.com/gpu, has 0"


def test_nodes_that_do_not_count_are_told() -> None:
    taint = {"key": GPU, "value": "present", "effect": "NoSchedule"}
    nodes = [
        node("a", 8, "r"),
        node("b", 8, "r", [taint]),
        node("c", 8, "r", unschedulable=True),
        node("d", 8),
    ]
    assert missing(nodes, group("llama-0", 2, 8, f"Required={RACK}")) == (
        "needs 2 nodes with 8 free nvidia.com/gpu in one rack, has 1; not counted: 1 cordoned, 1 tainted "
        f"nvidia.com/gpu, 1 without the label {RACK}"
    )
    tolerant = group("llama-0", 2, 8, tolerations=[{"key": GPU, "operator": "Exists"}])
    (verdict,) = verdicts(nodes[:2], tolerant).values()
    assert {target.name for target in verdict.pins.values()} == {"a", "b"}


def test_the_scarce_resource_is_named() -> None:
    pods = group("llama-0", 2, 1)
    for pod in pods:
        pod["spec"]["containers"][0]["resources"]["requests"] = {"cpu": "48"}
    assert missing([node("a", 8)], pods) == "needs room for 2 pods with 48 free cores each, has room for 1"


def test_older_deployments_come_first() -> None:
    pods = [*group("young-0", 2, 8, order="2"), *group("old-0", 2, 8, order="1")]
    found = verdicts([node("a", 8), node("b", 8), node("c", 8)], pods)
    assert len(found["old-0"].pins) == 2
    assert not found["young-0"].pins


def test_small_groups_overtake_but_not_for_ever() -> None:
    nodes = [node("a", 8), node("b", 8)]
    taken = group("other-0", 1, 4, order="0")
    taken[0]["spec"] |= {"schedulingGates": [], "nodeName": "a"}
    pods = [*taken, *group("large-0", 2, 8, order="1"), *group("small-0", 1, 4, order="2")]
    assert verdicts(nodes, pods, NOW + PATIENCE - 1)["small-0"].pins
    late = verdicts(nodes, pods, NOW + PATIENCE)
    assert not late["small-0"].pins
    assert late["small-0"].missing == (
        "needs 1 node with 4 free nvidia.com/gpu, has 0; not counted: 2 kept for large-0"
    )


def test_a_half_placed_group_is_completed_beside_what_it_holds() -> None:
    nodes = [node("a", 8, "r"), node("b", 8, "s"), node("c", 8, "s")]
    pods = group("llama-0", 2, 8, f"Required={RACK}")
    pin(pods[1:], {"llama-0-1": nodes_of(nodes, [])[2]})
    (verdict,) = verdicts(nodes, pods).values()
    assert {name: target.name for name, target in verdict.pins.items()} == {"llama-0-0": "b"}
    assert verdict.give_back == ()
    (verdict,) = verdicts(nodes[:1] + nodes[2:], pods).values()
    assert not verdict.pins
    assert [pod.name for pod in verdict.give_back] == ["llama-0-1"]


# Properties

sizes = st.integers(1, 4)
clusters = st.lists(st.tuples(st.integers(0, 8), st.sampled_from(["", "r", "s"])), max_size=5)
wishes = st.lists(
    st.tuples(sizes, st.sampled_from([1, 2, 4, 8]), st.sampled_from(["", f"Required={RACK}", f"Preferred={RACK}"])),
    max_size=4,
)


def build(cluster: Any, wanted: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    nodes = [node(f"n{i}", gpus, rack) for i, (gpus, rack) in enumerate(cluster)]
    pods = [
        pod for i, (size, gpus, mode) in enumerate(wanted) for pod in group(f"g{i}-0", size, gpus, mode, order=str(i))
    ]
    return nodes, pods


def brute_force(gang: Gang, nodes: Sequence[Node]) -> bool:
    """Whether any way of giving each pod a node holds them all."""
    need = gang.requests[GPU]
    for choice in itertools.product(nodes, repeat=len(gang.gated)):
        racks = {target.labels.get(RACK) for target in choice}
        if gang.required and (len(racks) > 1 or None in racks):
            continue
        if all(choice.count(target) * need <= target.free.get(GPU, Fraction(0)) for target in choice):
            return True
    return False


@settings(max_examples=150, deadline=None)
@given(clusters, wishes)
def test_never_too_much_on_a_node_and_never_half_a_group(cluster: Any, wanted: Any) -> None:
    nodes, pods = build(cluster, wanted)
    before = gangs(Pod.of(pod) for pod in pods)
    found = verdicts(nodes, pods)
    for gang in before:
        pins = found[gang.name].pins
        assert set(pins) in (set(), {pod.name for pod in gang.gated})
        assert bool(pins) != bool(found[gang.name].missing)
        racks = {target.labels.get(RACK) for target in pins.values()}
        assert not gang.required or (len(racks) <= 1 and None not in racks)
        pin(pods, pins)
    after = nodes_of(nodes, pods)
    assert all(amount >= 0 for seen in after for amount in seen.free.values())
    again = place(after, gangs(Pod.of(pod) for pod in pods), NOW, PATIENCE)
    assert not any(verdict.pins for verdict in again.values()), "what did not fit does not fit now, either"


@settings(max_examples=150, deadline=None)
@given(clusters, wishes)
def test_a_group_is_placed_whenever_there_is_a_way(cluster: Any, wanted: Any) -> None:
    nodes, pods = build(cluster, wanted)
    for gang in gangs(Pod.of(pod) for pod in pods):
        mine = [pod for pod in pods if pod["metadata"]["labels"][names.GROUP] == gang.name]
        (verdict,) = verdicts(nodes, mine).values()
        assert bool(verdict.pins) == brute_force(gang, nodes_of(nodes, []))


@settings(max_examples=100, deadline=None)
@given(clusters, wishes, st.randoms(use_true_random=False))
def test_from_any_half_done_state_groups_are_whole_or_hold_nothing(cluster: Any, wanted: Any, chance: Any) -> None:
    """Killed in the midst of lifting gates, or with nodes gone since: pods are pinned at random where they fit."""
    nodes, pods = build(cluster, wanted)
    for pod in pods:
        seen = nodes_of(nodes, pods)
        fitting = [n for n in seen if n.free[GPU] >= Pod.of(pod).requests[GPU]]
        if fitting and chance.random() < 0.4:
            pin([pod], {pod["metadata"]["name"]: chance.choice(fitting)})
    for _ in range(2 * len(wanted) + 2):
        found = verdicts(nodes, pods)
        for verdict in found.values():
            pin(pods, verdict.pins)
            for held in verdict.give_back:
                held.raw["spec"]["schedulingGates"] = [{"name": names.GATE}]
                held.raw["spec"].pop("nodeSelector")
    for name in {pod["metadata"]["labels"][names.GROUP] for pod in pods}:
        gated = [bool(pod["spec"]["schedulingGates"]) for pod in pods if pod["metadata"]["labels"][names.GROUP] == name]
        assert len(set(gated)) == 1, f"{name} is half placed"
    assert all(amount >= 0 for seen in nodes_of(nodes, pods) for amount in seen.free.values())
