"""The small parts: quantities, overlays, what a scheduler would refuse, what is up to date."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero_operator import names
from arriero_operator.groups import lost_pods
from arriero_operator.observe import Node, Pod, nodes_of, seconds_of, timestamp
from arriero_operator.overlay import merge
from arriero_operator.quantity import format_bytes, parse_quantity, pod_requests, same_quantity
from arriero_operator.scheduling import refusal
from arriero_operator.writes import covers, up_to_date


@pytest.mark.parametrize(
    ("written", "amount"),
    [
        ("8", 8),
        (8, 8),
        ("500m", Fraction(1, 2)),
        ("1.5", Fraction(3, 2)),
        (".5", Fraction(1, 2)),
        ("64Gi", 64 * 2**30),
        ("1k", 1000),
        ("2e3", 2000),
        ("2E3", 2000),
        ("1E", 10**18),
        ("3Ki", 3072),
        ("100n", Fraction(1, 10**7)),
        ("-1", -1),
    ],
)
def test_quantities_are_read_as_the_api_writes_them(written: Any, amount: Any) -> None:
    assert parse_quantity(written) == amount


@pytest.mark.parametrize("written", ["", "x", "1 Gi", "1GiB", "Gi", True, None, "1e", "0x10", [], "1mm"])
def test_what_is_no_quantity_is_refused(written: Any) -> None:
    with pytest.raises(ValueError, match="is not a quantity"):
        parse_quantity(written)
    assert not same_quantity(written, "1")


@given(st.integers(1, 2**45))
def test_bytes_are_written_such_that_nothing_is_missing(amount: int) -> None:
    written = parse_quantity(format_bytes(amount))
    assert amount <= written < amount + 2**20


def test_a_pod_asks_for_what_the_scheduler_counts() -> None:
    def container(cpu: str, **more: Any) -> dict[str, Any]:
        return {"resources": {"requests": {"cpu": cpu}}, **more}

    spec = {
        "containers": [container("2"), {"resources": {"limits": {"nvidia.com/gpu": "8", "cpu": "1"}}}],
        "initContainers": [container("1", restartPolicy="Always"), container("5"), container("1")],
        "overhead": {"cpu": "250m"},
    }
    assert pod_requests(spec) == {"cpu": Fraction(25, 4), "nvidia.com/gpu": 8, "pods": 1}


def test_an_overlay_changes_entries_by_name_and_adds_others() -> None:
    base = {
        "containers": [{"name": "worker", "env": [{"name": "A", "value": "1"}], "args": ["x"]}],
        "tolerations": [{"key": "old"}],
        "hostIPC": True,
    }
    overlay = {
        "containers": [
            {"name": "sidecar", "image": "s"},
            {"name": "worker", "env": [{"name": "B", "value": "2"}, {"name": "A", "value": "3"}]},
        ],
        "tolerations": [{"key": "new"}],
        "hostIPC": None,
    }
    assert merge(base, overlay) == {
        "containers": [
            {"name": "worker", "env": [{"name": "A", "value": "3"}, {"name": "B", "value": "2"}], "args": ["x"]},
            {"name": "sidecar", "image": "s"},
        ],
        "tolerations": [{"key": "new"}],
    }
    assert base["hostIPC"] is True, "the base is left as it is"


@given(
    st.recursive(
        st.one_of(st.integers(), st.text(max_size=3)),
        lambda part: st.dictionaries(st.sampled_from(["a", "name", "env"]), part, max_size=3),
    )
)
def test_an_overlay_on_itself_changes_nothing(value: Any) -> None:
    assert merge(value, value) == value
    assert merge({"a": 1}, {}) == {"a": 1}


def node(labels: dict[str, str] | None = None, **changes: Any) -> Node:
    values: dict[str, Any] = {
        "name": "n",
        "labels": labels or {},
        "taints": (),
        "schedulable": True,
        "lost_since": None,
    }
    return Node(**(values | changes), free={})


def pod(**spec: Any) -> Pod:
    return Pod.of({"metadata": {"name": "p-0"}, "spec": spec})


@pytest.mark.parametrize(
    ("seen", "asking", "refused"),
    [
        (node(), pod(), None),
        (node(lost_since=1.0), pod(), "not ready"),
        (node(schedulable=False), pod(), "cordoned"),
        (node({"a": "1"}), pod(nodeSelector={"a": "2"}), "not of the node selector"),
        (node({"a": "1"}), pod(nodeSelector={"a": "1"}), None),
        (node(taints=({"key": "k", "value": "v", "effect": "NoSchedule"},)), pod(), "tainted k"),
        (node(taints=({"key": "k", "effect": "PreferNoSchedule"},)), pod(), None),
        (
            node(taints=({"key": "k", "value": "v", "effect": "NoExecute"},)),
            pod(tolerations=[{"key": "k", "value": "w"}, {"key": "k", "value": "v", "effect": "NoSchedule"}]),
            "tainted k",
        ),
        (
            node(taints=({"key": "k", "value": "v", "effect": "NoExecute"},)),
            pod(tolerations=[{"operator": "Exists"}]),
            None,
        ),
        (node(taints=({"key": "k", "effect": "NoSchedule"},)), pod(tolerations=[{"key": "k"}]), None),
    ],
)
def test_nodes_are_refused_as_the_scheduler_would(seen: Node, asking: Pod, refused: str | None) -> None:
    assert refusal(seen, asking) == refused


@pytest.mark.parametrize(
    ("expression", "holds"),
    [
        ({"key": "zone", "operator": "In", "values": ["a", "b"]}, True),
        ({"key": "zone", "operator": "NotIn", "values": ["a"]}, False),
        ({"key": "disk", "operator": "NotIn", "values": ["a"]}, True),
        ({"key": "zone", "operator": "Exists"}, True),
        ({"key": "disk", "operator": "Exists"}, False),
        ({"key": "disk", "operator": "DoesNotExist"}, True),
        ({"key": "cores", "operator": "Gt", "values": ["31"]}, True),
        ({"key": "cores", "operator": "Lt", "values": ["32"]}, False),
        ({"key": "zone", "operator": "Gt", "values": ["1"]}, False),
    ],
)
def test_node_affinity_is_read_as_the_scheduler_reads_it(expression: dict[str, Any], holds: bool) -> None:
    terms = [{}, {"matchExpressions": [expression]}]
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}
    seen = node({"zone": "a", "cores": "32"})
    assert (refusal(seen, pod(affinity=affinity)) is None) == holds


def test_pinned_pods_take_room_before_they_are_bound() -> None:
    raw = {
        "metadata": {"name": "n1", "labels": {names.HOSTNAME: "host-1"}},
        "status": {
            "allocatable": {"nvidia.com/gpu": "8", "pods": "10"},
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }
    spec = {"containers": [{"resources": {"limits": {"nvidia.com/gpu": "2"}}}]}
    bound = {"spec": {**spec, "nodeName": "n1", "nodeSelector": {names.HOSTNAME: "host-1"}}}
    pinned = {"spec": {**spec, "nodeSelector": {names.HOSTNAME: "host-1"}}}
    gated = {"spec": {**pinned["spec"], "schedulingGates": [{"name": names.GATE}]}}
    over = {"spec": bound["spec"], "status": {"phase": "Failed"}}
    (seen,) = nodes_of([raw], [bound, pinned, gated, over])
    assert seen.free == {"nvidia.com/gpu": 4, "pods": 8}
    assert seen.hostname == "host-1"


def test_a_pod_is_lost_with_its_node_after_a_while() -> None:
    pods = [Pod.of({"metadata": {"name": f"p-{n}"}, "spec": {"nodeName": n}}) for n in ("well", "silent", "gone")]
    nodes = [node(name="well"), node(name="silent", lost_since=100.0)]
    assert lost_pods(pods, nodes, 110.0, 20.0) == {"p-gone"}
    assert lost_pods(pods, nodes, 120.0, 20.0) == {"p-gone", "p-silent"}
    assert lost_pods(pods, nodes[1:], 120.0, 20.0) == set(), "with no node ready, the cluster's eyes are shut"


def test_what_others_add_is_no_difference_and_what_they_change_is() -> None:
    rendered = {
        "metadata": {"labels": {"a": "1"}},
        "spec": {
            "containers": [{"name": "worker", "resources": {"limits": {"cpu": "1000m"}}, "args": ["x", "y"]}],
            "emptyDir": {},
            "paused": False,
        },
    }
    seen = {
        "metadata": {"labels": {"a": "1", "b": "2"}, "uid": "u"},
        "spec": {
            "containers": [
                {"name": "injected"},
                {"name": "worker", "resources": {"limits": {"cpu": "1"}}, "args": ["x", "y"], "tty": False},
            ],
            "dnsPolicy": "ClusterFirst",
        },
    }
    assert covers(seen, rendered)
    for change in (
        {"metadata": {"labels": {"a": "2"}}},
        {"metadata": {"labels": {}}},
        {"spec": {"containers": [{"name": "injected"}]}},
        {"spec": {"containers": [{"name": "worker", "resources": {"limits": {"cpu": "2"}}, "args": ["x", "y"]}]}},
        {"spec": {"containers": [{"name": "worker", "resources": {"limits": {"cpu": "1"}}, "args": ["x", "y", "z"]}]}},
        {"spec": {"containers": seen["spec"]["containers"], "paused": True}},  # type: ignore[index]
    ):
        assert not covers({**seen, **change}, rendered), change


def test_a_field_that_is_not_rendered_any_more_is_noticed_by_the_digest() -> None:
    rendered = {"metadata": {"annotations": {names.APPLIED: "new"}}}
    seen = {"metadata": {"annotations": {names.APPLIED: "old"}}, "spec": {"left": "over"}}
    assert covers(seen, {"metadata": {}})
    assert not up_to_date(seen, rendered)
    assert not up_to_date(None, rendered)
    assert up_to_date({"metadata": {"annotations": {names.APPLIED: "new", "other": "x"}}}, rendered)


def test_times_are_read_as_the_api_writes_them() -> None:
    assert seconds_of("2027-01-15T08:00:00Z") == 1_800_000_000.0
    assert timestamp(1_800_000_000.9) == "2027-01-15T08:00:00Z"
    assert seconds_of("2027-01-15T08:00:00.250000Z") == 1_800_000_000.25
    assert seconds_of(None) is None
    assert seconds_of("yesterday") is None
