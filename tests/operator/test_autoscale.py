"""Replicas follow the load: up at once, down after a while, from zero by what routers hold, and never by silence."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml
from tests.operator.fake_cluster import SETTINGS, FakeCluster

from arriero_operator.autoscale import Scale, scale_of
from arriero_operator.desired import desired
from arriero_operator.observe import Report, timestamp
from arriero_operator.runtime.held import held_in
from arriero_operator.writes import SetStatus
from arriero_plan.resource import LlamaDeployment
from arriero_plan.spec import parse_deployment

NAME = "llama-70b"
AUTO = {"minReplicas": 1, "maxReplicas": 4, "targetRunningPerReplica": 10, "scaleDownSeconds": 300}


class Load:
    """A deployment whose load the test sets, at times that it sets."""

    def __init__(self, replicas: int = 1, **auto: Any) -> None:
        made = FakeCluster()
        made.add_nodes(1)
        made.create(NAME, replicas=replicas, autoscaling={**AUTO, **auto})
        self.observed = made.observe(NAME)
        self.deployment: LlamaDeployment = parse_deployment(self.observed.resource, NAME)

    def at(self, second: float, running: int = 0, waiting: int = 0, held: int = 0, told: bool = True) -> Scale:
        reports = {f"{NAME}-0-0": Report("Serving", running=running, waiting=waiting)}
        now = 1_800_000_000 + second
        self.observed = dataclasses.replace(self.observed, reports=reports, held=held, told=told, now=now)
        scale = scale_of(self.deployment.spec, self.observed)
        # What the status keeps is all that the next pass knows.
        since = timestamp(scale.lower_since) if scale.lower_since is not None else None
        kept = {"replicas": scale.replicas, "lower": scale.lower, "lowerSince": since}
        status = {"autoscaling": {key: value for key, value in kept.items() if value is not None}}
        self.observed = dataclasses.replace(self.observed, resource={**self.observed.resource, "status": status})
        return scale


def test_it_begins_where_the_spec_says_within_its_bounds() -> None:
    assert Load(2).at(0, running=15).replicas == 2
    assert Load(9).at(0).replicas == 4
    assert Load(1, minReplicas=2).at(0).replicas == 2


def test_more_load_is_followed_at_once_and_no_further_than_allowed() -> None:
    load = Load(1)
    assert load.at(0, running=10).replicas == 1
    assert load.at(1, running=10, waiting=1).replicas == 2
    assert load.at(2, running=20, waiting=5, held=6).replicas == 4
    assert load.at(3, running=1000).replicas == 4


def test_fewer_come_only_after_fewer_have_been_enough_for_a_while() -> None:
    load = Load(4)
    assert load.at(0, running=35) == Scale(4)
    first = load.at(10, running=5)
    assert (first.replicas, first.lower, first.again_after) == (4, 1, 300)
    assert load.at(100, running=18).lower == 2
    assert load.at(200, running=3).lower == 2, "the most that was needed in the meantime counts"
    assert load.at(309, running=3).replicas == 4
    assert load.at(310, running=3) == Scale(2)
    assert load.at(311, running=3).lower == 1


def test_a_peak_begins_the_wait_anew() -> None:
    load = Load(3)
    load.at(0, running=5)
    assert load.at(200, running=29) == Scale(3)
    assert load.at(301, running=5).replicas == 3
    assert load.at(601, running=5).replicas == 1


def test_zero_is_left_for_the_first_request_that_a_router_holds() -> None:
    load = Load(1, minReplicas=0, scaleDownSeconds=60)
    load.at(0)
    assert load.at(60).replicas == 0
    assert load.at(61).replicas == 0
    assert load.at(62, held=1).replicas == 1
    assert load.at(63, held=25).replicas == 3


def test_silence_takes_nothing_away() -> None:
    load = Load(3)
    load.at(0, running=5)
    assert load.at(400, told=False) == Scale(3)
    assert load.at(401).again_after == 300


def test_the_groups_follow_and_the_status_tells() -> None:
    made = FakeCluster()
    made.add_nodes(8)
    made.create(NAME, replicas=1, autoscaling={**AUTO, "maxReplicas": 2})
    made.converge(NAME)
    observed = dataclasses.replace(made.observe(NAME), held=15)
    found = desired(observed, SETTINGS)
    (write,) = [w for w in found.writes if isinstance(w, SetStatus)]
    assert write.status["autoscaling"] == {"replicas": 2}
    assert write.status["ready"] == "1/2"
    made_sets = [w for w in found.writes if getattr(w, "object", {}).get("kind") == "StatefulSet"]
    assert [w.object["metadata"]["name"] for w in made_sets] == [f"{NAME}-1"]  # type: ignore[union-attr]


def test_what_a_router_holds_is_the_sum_over_its_models() -> None:
    text = (
        "# HELP arriero_router_held requests\n# TYPE arriero_router_held gauge\n"
        'arriero_router_held{model="a"} 3.0\narriero_router_held{model="b"} 4.0\n'
        "# HELP other x\n# TYPE other gauge\nother 9\n"
    )
    assert held_in(text) == 7


def test_who_wakes_a_deployment_may_wait_for_its_weights() -> None:
    for least, patience in ((0, {"timeoutSeconds": 900}), (1, None)):
        made = FakeCluster()
        made.add_nodes(2)
        made.create(NAME, autoscaling={**AUTO, "minReplicas": least})
        made.converge(NAME)
        settings = yaml.safe_load(made.objects["ConfigMap", f"{NAME}-router"]["data"]["router.yaml"])
        assert settings.get("hold") == patience
