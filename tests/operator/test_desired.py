"""The operator's decisions, carried out in a cluster in memory: from any state, after any fault, to what is wanted."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable

import pytest
from tests.operator.fake_cluster import SETTINGS, FakeCluster, fail_at_random

from arriero_operator import names
from arriero_operator.desired import desired
from arriero_operator.observe import Pod
from arriero_operator.placement import gangs, place
from arriero_operator.writes import Apply, Delete, Patch, SetStatus

NAME = "llama-70b"


def cluster(nodes: int = 6, **spec: object) -> FakeCluster:
    made = FakeCluster()
    made.add_nodes(nodes)
    made.create(NAME, **spec)
    return made


def serving(nodes: int = 6, **spec: object) -> FakeCluster:
    made = cluster(nodes, **spec)
    made.converge(NAME)
    assert made.status(NAME)["phase"] == "Ready", made.status(NAME)
    return made


def kinds(made: FakeCluster) -> dict[str, int]:
    found: dict[str, int] = {}
    for kind, _ in made.objects:
        found[kind] = found.get(kind, 0) + 1
    return found


def test_a_deployment_comes_to_serve() -> None:
    made = serving(replicas=2)
    status = made.status(NAME)
    assert (status["ready"], status["plan"]["layout"], status["replicas"]) == ("2/2", "TP8xPP2", 2)
    assert made.groups() == [f"{NAME}-0", f"{NAME}-1"]
    assert all(not pod["spec"].get("schedulingGates") for pod in made.pods())
    assert kinds(made) == {
        "LlamaDeployment": 1,
        "StatefulSet": 2,
        "Pod": 4,
        "ConfigMap": 3,
        "Service": 4,
        "NetworkPolicy": 2,
        "Deployment": 1,
        "PodDisruptionBudget": 2,
        "ServiceAccount": 1,
        "Role": 1,
        "RoleBinding": 1,
    }
    assert [condition["type"] for condition in status["conditions"] if condition["status"] == "True"] == [
        "Accepted",
        "Planned",
        "Scheduled",
        "ModelLoaded",
        "Available",
    ]


def test_nothing_is_written_once_all_is_there() -> None:
    made = serving(replicas=2)
    made.tick(3600)
    found = desired(made.observe(NAME), SETTINGS)
    assert found.writes == ()
    assert found.calls == ()
    assert found.again_after is None


def test_one_observation_gives_one_answer_and_is_left_as_it_is() -> None:
    made = serving()
    made.edit(NAME, replicas=3, engine={"maxRunning": 128})
    observed = made.observe(NAME)
    before = copy.deepcopy(made.objects)
    assert desired(observed, SETTINGS) == desired(observed, SETTINGS)
    assert made.objects == before


def test_pods_come_after_what_they_refer_to_and_status_comes_last() -> None:
    made = cluster()
    writes = desired(made.observe(NAME), SETTINGS).writes
    applied = [(w.object["kind"], w.object["metadata"]["name"]) for w in writes if isinstance(w, Apply)]
    group = applied.index(("StatefulSet", f"{NAME}-0"))
    launch = next(i for i, (kind, name) in enumerate(applied) if kind == "ConfigMap" and "launch" in name)
    assert max(applied.index(("Service", f"{NAME}-0")), applied.index(("NetworkPolicy", f"{NAME}-0")), launch) < group
    assert isinstance(writes[-1], SetStatus)
    assert sum(isinstance(write, SetStatus) for write in writes) == 1


def test_once_placed_the_template_has_no_gate_and_a_lost_pod_needs_no_operator() -> None:
    made = serving()
    assert "schedulingGates" not in made.objects["StatefulSet", f"{NAME}-0"]["spec"]["template"]["spec"]
    made._drop(("Pod", f"{NAME}-0-1"))
    for _ in range(8):
        made.tick()
    assert made.epochs[f"{NAME}-0"] == 2, "the group forms again although no pass was made"


def test_an_edited_object_is_put_right_and_foreign_additions_stay() -> None:
    made = serving()
    service = made.objects["Service", f"{NAME}-leaders"]
    service["spec"]["selector"]["app"] = "mine"
    service["metadata"]["labels"]["team"] = "blue"
    made.objects["Deployment", f"{NAME}-router"]["spec"]["template"]["spec"]["containers"].append(
        {"name": "sidecar", "image": "s", "resources": {}}
    )
    found = desired(made.observe(NAME), SETTINGS)
    assert [w.object["metadata"]["name"] for w in found.writes if isinstance(w, Apply)] == [f"{NAME}-leaders"]
    made.converge(NAME)
    assert "app" not in made.objects["Service", f"{NAME}-leaders"]["spec"]["selector"], "one more selects other pods"
    assert made.objects["Service", f"{NAME}-leaders"]["metadata"]["labels"]["team"] == "blue"


def test_a_deleted_object_is_made_anew() -> None:
    made = serving()
    before = made.snapshot()
    for key in [key for key in made.objects if key[0] not in ("LlamaDeployment", "Pod", "StatefulSet")]:
        made._drop(key)
    made.converge(NAME)
    assert made.snapshot().keys() == before.keys()
    assert made.status(NAME)["phase"] == "Ready"


def test_a_deleted_stateful_set_is_replaced_by_another_group() -> None:
    made = serving(replicas=2)
    made._drop(("StatefulSet", f"{NAME}-1"))
    made.converge(NAME)
    assert made.status(NAME)["ready"] == "2/2"
    assert len(made.groups()) == 2
    assert kinds(made)["Service"] == 4, "nothing of the old group is left"


def test_somebody_elses_object_is_left_alone_and_told() -> None:
    made = cluster()
    foreign = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"{NAME}-router", "uid": "theirs"},
        "spec": {},
    }
    made.objects["Service", f"{NAME}-router"] = foreign
    made.run(20, NAME)
    assert made.objects["Service", f"{NAME}-router"] is foreign
    assert made.status(NAME)["phase"] == "Degraded"
    assert "belongs to somebody else" in made.condition(NAME, "Degraded")["message"]
    made._drop(("Service", f"{NAME}-router"))
    made.converge(NAME)
    assert made.status(NAME)["phase"] == "Ready"


def test_deletion_is_left_to_owner_references_and_leaves_nothing() -> None:
    made = serving(replicas=2)
    made.objects["LlamaDeployment", NAME]["metadata"]["deletionTimestamp"] = "2027-01-15T09:00:00Z"
    assert desired(made.observe(NAME), SETTINGS).writes == ()
    made.remove(NAME)
    for _ in range(5):
        made.tick()
    assert made.objects == {}


def test_an_update_never_goes_below_the_wanted_number_and_cuts_no_request() -> None:
    made = serving(nodes=6, replicas=2)
    old = made.status(NAME)["revision"]
    made.requests = {f"{NAME}-0": 5, f"{NAME}-1": 9}
    made.edit(NAME, engine={"maxRunning": 128})
    for _ in range(120):
        made.pass_over(NAME)
        assert made.status(NAME)["readyReplicas"] >= 2
        assert len(made.groups()) <= 3
        made.tick()
    made.converge(NAME)
    assert made.status(NAME)["phase"] == "Ready"
    assert made.status(NAME)["revision"] != old
    assert made.cut_requests == []
    launches = [name for kind, name in made.objects if kind == "ConfigMap" and "launch" in name]
    assert len(launches) == 2, "launch files of the old revision are gone"


def test_all_pods_of_a_group_are_of_one_revision_even_when_one_is_lost_during_an_update() -> None:
    made = serving(nodes=4, replicas=2, rollout={"maxSurge": 0, "maxUnavailable": 1, "drainSeconds": 20})
    made.requests = {f"{NAME}-0": 3}
    made.edit(NAME, engine={"maxRunning": 128})
    for second in range(60):
        made.pass_over(NAME)
        if second in (2, 9, 15):
            made._drop(("Pod", made.pods()[-1]["metadata"]["name"]))
        made.tick()
        for group in made.groups():
            assert len({pod["metadata"]["labels"][names.REVISION] for pod in made.pods(group)}) <= 1
    made.converge(NAME)
    assert made.status(NAME)["ready"] == "2/2"
    assert made.cut_requests == []


def test_a_broken_revision_stops_at_its_first_group_and_can_be_taken_back() -> None:
    made = serving(replicas=2)
    good = made.settings
    made.broken.add("registry.example/arriero-worker:2")
    made.settings = type(good)(worker_image="registry.example/arriero-worker:2", router_image=good.router_image)
    made.run(100, NAME)
    assert made.status(NAME)["readyReplicas"] == 2
    assert made.status(NAME)["updatedReplicas"] == 1
    made.settings = good
    made.converge(NAME)
    assert made.groups() == [f"{NAME}-0", f"{NAME}-1"]
    assert made.status(NAME)["phase"] == "Ready"


def test_scaling_down_takes_the_least_loaded_group_once_its_requests_are_done() -> None:
    made = serving(replicas=3)
    made.requests = {f"{NAME}-0": 50, f"{NAME}-1": 4, f"{NAME}-2": 20}
    made.edit(NAME, replicas=2)
    made.pass_over(NAME)
    assert names.DRAINING in made.objects["StatefulSet", f"{NAME}-1"]["metadata"]["annotations"]
    made.tick()
    made.pass_over(NAME)
    assert f"{NAME}-1" in made.groups(), "requests are still on it"
    made.converge(NAME)
    assert made.groups() == [f"{NAME}-0", f"{NAME}-2"]
    assert made.cut_requests == []
    made.edit(NAME, replicas=3)
    made.converge(NAME)
    assert made.groups() == [f"{NAME}-0", f"{NAME}-1", f"{NAME}-2"]


def test_a_drain_that_does_not_end_is_over_when_its_time_is() -> None:
    made = serving(replicas=1)
    made.requests = {f"{NAME}-0": 10_000}
    made.edit(NAME, replicas=0)
    made.pass_over(NAME)
    made.tick(10)
    made.pass_over(NAME)
    assert made.groups() == [f"{NAME}-0"]
    assert desired(made.observe(NAME), SETTINGS).again_after == pytest.approx(10)
    made.tick(11)
    made.pass_over(NAME)
    assert made.groups() == []


def test_to_nothing_and_back() -> None:
    made = serving(replicas=2)
    made.edit(NAME, replicas=0)
    made.converge(NAME)
    assert (made.status(NAME)["phase"], made.status(NAME)["ready"], made.pods()) == ("Idle", "0/0", [])
    assert ("Deployment", f"{NAME}-router") in made.objects, "the router holds requests while nothing is there"
    made.edit(NAME, replicas=1)
    made.converge(NAME)
    assert made.status(NAME)["phase"] == "Ready"


def test_a_group_that_does_not_fit_holds_nothing_and_says_what_is_missing() -> None:
    made = cluster(nodes=1)
    made.run(10, NAME)
    status = made.status(NAME)
    assert status["phase"] == "Waiting"
    assert status["message"] == f"{NAME}-0: needs 2 nodes with 8 free nvidia.com/gpu, has 1"
    assert made.condition(NAME, "Scheduled")["reason"] == "NotEnoughRoom"
    assert all(pod["spec"]["schedulingGates"] and "nodeName" not in pod["spec"] for pod in made.pods())
    made.add_nodes(1, prefix="late")
    made.converge(NAME)
    assert made.status(NAME)["phase"] == "Ready"


def test_two_deployments_never_hold_half_of_what_the_other_needs() -> None:
    made = FakeCluster()
    made.add_nodes(3)
    made.create("first")
    made.tick()
    made.create("second")
    made.run(30, "second", "first")
    assert made.status("first")["phase"] == "Ready"
    assert made.status("second")["message"] == "second-0: needs 2 nodes with 8 free nvidia.com/gpu, has 1"
    made.remove("first")
    made.converge("second")
    assert made.status("second")["phase"] == "Ready"


def test_a_required_rack_is_kept_also_by_successors() -> None:
    made = FakeCluster()
    made.add_nodes(1, rack="a", prefix="a")
    made.add_nodes(3, rack="b", prefix="b")
    made.create(NAME, placement={"topologyKey": "topology.kubernetes.io/rack", "mode": "Required"})
    made.converge(NAME)
    assert {pod["spec"]["nodeName"][0] for pod in made.pods()} == {"b"}
    made.lose(made.pods()[1]["spec"]["nodeName"])
    made.run(40, NAME)
    assert {pod["spec"]["nodeName"][0] for pod in made.pods()} == {"b"}
    assert made.status(NAME)["phase"] == "Ready"


def test_a_group_whose_rack_has_no_room_left_starts_over_in_another() -> None:
    made = FakeCluster()
    made.add_nodes(2, rack="a", prefix="a")
    made.create(NAME, placement={"topologyKey": "topology.kubernetes.io/rack", "mode": "Required"})
    made.converge(NAME)
    made.add_nodes(2, rack="b", prefix="b")
    made.lose("a-1")
    made.run(120, NAME)
    assert made.status(NAME)["phase"] == "Degraded"
    made.tick(300)
    made.run(60, NAME)
    assert {pod["spec"]["nodeName"][0] for pod in made.pods()} == {"b"}
    assert made.status(NAME)["phase"] == "Ready"


@pytest.mark.parametrize("gone_for_good", [False, True])
def test_pods_of_a_lost_node_are_fenced_and_replaced(gone_for_good: bool) -> None:
    made = serving(nodes=3)
    made.requests = {f"{NAME}-0": 7}
    node = made.pods()[1]["spec"]["nodeName"]
    made.lose(node)
    if gone_for_good:
        del made.nodes[node]
    made.run(40, NAME)
    assert made.status(NAME)["phase"] == "Ready"
    assert node not in {pod["spec"]["nodeName"] for pod in made.pods()}
    assert made.epochs[f"{NAME}-0"] == 2
    if not gone_for_good:
        made.bring_back(node)
    made.converge(NAME)
    assert made.cut_requests == []


def test_pods_stuck_terminating_on_a_lost_node_are_fenced() -> None:
    made = serving(nodes=3)
    pod = made.pods()[0]
    made.lose(pod["spec"]["nodeName"])
    pod["metadata"]["deletionTimestamp"] = "2027-01-15T08:00:00Z"
    made.run(40, NAME)
    assert made.status(NAME)["phase"] == "Ready"


def test_while_no_node_is_ready_nothing_is_fenced() -> None:
    made = serving(nodes=2)
    for node in made.nodes:
        made.lose(node)
    made.tick(600)
    writes = desired(made.observe(NAME), SETTINGS).writes
    assert not [write for write in writes if isinstance(write, Delete)]


def test_a_pinned_pod_whose_place_was_taken_is_made_anew_with_its_gate() -> None:
    made = cluster(nodes=3)
    made.pass_over(NAME)
    made.tick()
    found, _ = made.pass_over(NAME)
    (pin, *_) = [write for write in found.writes if isinstance(write, Patch)]
    node = pin.body["spec"]["nodeSelector"][names.HOSTNAME]
    made.nodes[node]["spec"]["unschedulable"] = True
    made.tick()
    made.tick(SETTINGS.bind_seconds)
    made.run(40, NAME)
    assert made.status(NAME)["phase"] == "Ready"
    assert node not in {pod["spec"]["nodeName"] for pod in made.pods()}


def test_a_group_that_cannot_be_completed_gives_back_what_it_holds() -> None:
    made = cluster(nodes=2)
    made.pass_over(NAME)
    made.tick()
    found = desired(made.observe(NAME), SETTINGS)
    pins = [write for write in found.writes if isinstance(write, Patch)]
    made.write(pins[0])  # and then the operator was killed, and the other node went away
    del made.nodes[pins[1].body["spec"]["nodeSelector"][names.HOSTNAME]]
    made.tick()
    made.run(5, NAME)
    assert all(pod["spec"].get("schedulingGates") and "nodeName" not in pod["spec"] for pod in made.pods())
    assert made.status(NAME)["message"] == f"{NAME}-0: needs 2 nodes with 8 free nvidia.com/gpu, has 1"


def test_events_tell_each_turn_once_though_a_pass_is_repeated() -> None:
    made = cluster()
    made.pass_over(NAME, budget=len(desired(made.observe(NAME), SETTINGS).writes) - 1)
    count = len(made.events)
    assert count == 1
    made.pass_over(NAME)
    assert len(made.events) == count
    made.converge(NAME)
    reasons = [event.reason for event in made.events.values()]
    assert reasons == ["Waiting", "Loading", "Ready", "GroupServing"]


# What users of other operators have met.


def test_an_edit_of_the_router_restarts_no_worker_and_one_of_the_engine_no_router() -> None:
    made = serving(replicas=1)
    workers = {pod["metadata"]["uid"] for pod in made.pods()}
    router = copy.deepcopy(made.objects["Deployment", f"{NAME}-router"]["spec"]["template"])
    made.edit(NAME, engine={"maxRunning": 128})
    made.converge(NAME)
    assert made.objects["Deployment", f"{NAME}-router"]["spec"]["template"] == router
    assert not workers & {pod["metadata"]["uid"] for pod in made.pods()}
    workers = {pod["metadata"]["uid"] for pod in made.pods()}
    made.edit(NAME, router={"replicas": 3, "policy": "least-load"})
    made.converge(NAME)
    assert made.objects["Deployment", f"{NAME}-router"]["spec"]["replicas"] == 3
    assert made.objects["Deployment", f"{NAME}-router"]["spec"]["template"] != router
    assert workers == {pod["metadata"]["uid"] for pod in made.pods()}


def test_a_lost_leader_is_replaced_once_and_the_others_keep_their_pods() -> None:
    made = serving()
    follower = made.pods()[1]["metadata"]["uid"]
    made._drop(("Pod", f"{NAME}-0-0"))
    made.run(20, NAME)
    assert made.status(NAME)["phase"] == "Ready"
    assert made.pods()[1]["metadata"]["uid"] == follower
    assert made.epochs[f"{NAME}-0"] == 2


def test_an_operator_that_restarts_in_the_midst_of_a_rollout_keeps_its_bounds() -> None:
    made = serving(nodes=10, replicas=4)
    made.edit(NAME, engine={"maxRunning": 128})
    for second in range(200):
        made.pass_over(NAME, budget=second % 3 or None)
        assert made.status(NAME)["readyReplicas"] >= 4
        assert len(made.groups()) <= 5
        made.tick()
    made.converge(NAME)
    assert (made.status(NAME)["ready"], made.status(NAME)["updatedReplicas"]) == ("4/4", 4)


def test_no_worker_is_left_after_scaling_down() -> None:
    made = serving(replicas=3)
    made.edit(NAME, replicas=1)
    made.converge(NAME)
    groups = {pod["metadata"]["labels"][names.GROUP] for pod in made.pods()}
    assert groups == set(made.groups())
    assert len(made.pods()) == 2
    left = {name for kind, name in made.objects if kind in ("Service", "NetworkPolicy") and name[-1].isdecimal()}
    assert left == groups


def test_many_passes_share_one_placement() -> None:
    made = FakeCluster()
    made.add_nodes(3)
    made.create("first")
    made.tick()
    made.create("second")
    for name in ("first", "second"):
        made.pass_over(name)
    made.tick()
    pods = [Pod.of(pod) for pod in made.pods()]
    waiting = gangs(pods)
    verdicts = place(made.observe("first").nodes, waiting, made.now, SETTINGS.patience_seconds)
    for name in ("first", "second"):
        observed = made.observe(name)
        shared = dataclasses.replace(observed, others=(), verdicts=verdicts)
        assert desired(shared, SETTINGS) == desired(observed, SETTINGS)


def test_an_update_without_room_says_what_helps_and_then_gets_it() -> None:
    made = serving(nodes=2)
    made.edit(NAME, engine={"maxRunning": 128})
    made.run(10, NAME)
    assert made.condition(NAME, "Scheduled")["message"] == (
        f"{NAME}-1 needs 2 nodes with 8 free nvidia.com/gpu, has 0; an update finds room in place of an old group with "
        "rollout: {maxSurge: 0, maxUnavailable: 1}"
    )
    assert made.status(NAME)["readyReplicas"] == 1, "what serves is kept"
    made.edit(NAME, rollout={"maxSurge": 0, "maxUnavailable": 1})
    made.converge(NAME)
    assert (made.status(NAME)["phase"], made.status(NAME)["updatedReplicas"]) == ("Ready", 1)


def test_a_hostname_of_the_users_own_is_no_pin() -> None:
    selector = {names.HOSTNAME: "node-1"}
    made = serving(parallelism={"tensor": 8, "pipeline": 1}, podTemplate={"spec": {"nodeSelector": selector}})
    made.nodes["node-1"]["spec"]["unschedulable"] = True
    made._drop(("Pod", f"{NAME}-0-0"))
    made.tick()
    made.tick(SETTINGS.bind_seconds + 1)
    assert not [w for w in desired(made.observe(NAME), SETTINGS).writes if isinstance(w, Delete)]


# Kill points: the operator ends after any single write.


def to_serve(made: FakeCluster) -> None:
    pass


def to_update(made: FakeCluster) -> None:
    made.converge(NAME)
    made.edit(NAME, engine={"maxRunning": 128})


def to_scale(made: FakeCluster) -> None:
    made.converge(NAME)
    made.requests = {f"{NAME}-0": 6, f"{NAME}-1": 2}
    made.edit(NAME, replicas=1)


def to_recover(made: FakeCluster) -> None:
    made.converge(NAME)
    made.lose(made.pods()[0]["spec"]["nodeName"])
    made.tick(30)


def carry_on(made: FakeCluster, killed_after: int) -> int:
    """Passes until rest; the one that has made `killed_after` writes in all ends there. How many writes there were."""
    begun, quiet, killed = made.writes, 0, killed_after < 0
    for _ in range(300):
        found, ended = made.pass_over(NAME, budget=None if killed else killed_after - (made.writes - begun))
        killed = killed or not ended
        quiet = quiet + 1 if made.tick_changes_nothing(bool(found.writes)) else 0
        if quiet > 3:
            return made.writes - begun
    raise AssertionError(f"killed after write {killed_after}: no rest")


@pytest.mark.parametrize("scenario", [to_serve, to_update, to_scale, to_recover])
def test_killed_after_any_write_it_comes_to_the_same(scenario: Callable[[FakeCluster], None]) -> None:
    begun = cluster(replicas=1 if scenario is to_update else 2)
    scenario(begun)
    undisturbed = copy.deepcopy(begun)
    total = carry_on(undisturbed, killed_after=-1)
    expected = {key: o for key, o in undisturbed.snapshot().items() if key[0] != "Pod"}
    assert undisturbed.status(NAME)["phase"] == "Ready"
    for point in range(total):
        made = copy.deepcopy(begun)
        carry_on(made, killed_after=point)
        found = {key: o for key, o in made.snapshot().items() if key[0] != "Pod"}
        assert found.keys() == expected.keys(), f"killed after write {point}"
        for key in expected:
            if key[0] != "LlamaDeployment":
                assert found[key] == expected[key], f"{key}, killed after write {point}"
        assert made.status(NAME)["ready"] == undisturbed.status(NAME)["ready"]
        assert made.cut_requests == []


@pytest.mark.timeout(120)
def test_random_faults_heal(seed: int, campaign: int) -> None:
    chance = random.Random(seed)
    for _ in range(6 * campaign):
        made = cluster(nodes=6, replicas=2)
        told = []
        for second in range(80):
            if chance.random() < 0.15:
                told.append((second, fail_at_random(made, chance)))
            if chance.random() < 0.05:
                replicas = chance.choice((0, 1, 2, 3))
                made.edit(NAME, replicas=replicas, engine={"maxRunning": chance.choice((64, 128, 256))})
                told.append((second, f"edited to {replicas} replicas"))
            made.pass_over(NAME, budget=chance.choice((None, None, None, 0, 1, 3, 7)))
            made.tick()
        for node in sorted(made.down):
            made.bring_back(node)
        made.edit(NAME, replicas=2)
        made.tick(400)
        made.converge(NAME, ticks=800)
        assert made.status(NAME)["phase"] == "Ready", (told, made.status(NAME))
        assert made.status(NAME)["ready"] == "2/2"
        assert len(made.groups()) == 2
        assert kinds(made)["ConfigMap"] == 3, told


def test_a_stateful_set_deleted_from_above_its_pods_is_made_anew_and_adopts_them() -> None:
    made = serving()
    pods = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in made.pods()}
    made.objects.pop(("StatefulSet", f"{NAME}-0"))
    for pod in made.pods():
        del pod["metadata"]["ownerReferences"]
    found = desired(made.observe(NAME), SETTINGS)
    assert [w.object["kind"] for w in found.writes if isinstance(w, Apply)] == ["StatefulSet"]
    made.converge(NAME)
    assert {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in made.pods()} == pods
    assert made.status(NAME)["phase"] == "Ready"


def test_pods_of_an_old_revision_that_belong_to_nobody_do_not_keep_their_devices() -> None:
    made = serving()
    made.objects.pop(("StatefulSet", f"{NAME}-0"))
    for pod in made.pods():
        del pod["metadata"]["ownerReferences"]
    made.edit(NAME, engine={"maxRunning": 128})
    made.converge(NAME)
    assert {pod["metadata"]["labels"][names.GROUP] for pod in made.pods()} == set(made.groups())
    assert made.status(NAME)["phase"] == "Ready"
