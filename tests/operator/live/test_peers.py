"""Faults that users of other operators for multi-node serving have reported: none of them here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.cluster.processes import wait_until
from tests.operator.live.process import Operator
from tests.operator.live.proxy import ApiProxy
from tests.operator.live.world import World, meanwhile, path_of

pytestmark = pytest.mark.cluster

Start = Callable[..., Operator]
Pods = dict[str, str]


def uids(world: World, space: str, component: str = "worker", **labels: str) -> Pods:
    """Pods that are meant to stay, by name."""
    return {
        pod["metadata"]["name"]: pod["metadata"]["uid"]
        for pod in world.list("pods", space, **labels)
        if pod["metadata"]["labels"].get("app.kubernetes.io/component") == component
        and not pod["metadata"].get("deletionTimestamp")
    }


def whole(world: World, space: str, group: str, size: int = 2) -> bool:
    pods = world.list("pods", space, group=group)
    return len(pods) == size and all(
        pod["spec"].get("nodeName") and not pod["metadata"].get("deletionTimestamp") for pod in pods
    )


@pytest.mark.parametrize("lost", ["llama-0-1", "llama-0-0"], ids=["worker", "leader"])
@pytest.mark.parametrize("operator_lives", [True, False], ids=["seen", "unseen"])
def test_a_lost_pod_is_made_anew_once_and_the_others_stay(
    world: World, proxy: ApiProxy, operators: Start, space: str, lost: str, operator_lives: bool
) -> None:
    """LeaderWorkerSet #998: the StatefulSet re-creates a worker before anybody looks, and the group stays broken. #804
    and #291: the leader is restarted twice.
    """
    operator = operators()
    world.deploy(space)
    world.wait_ready(space)
    world.wait_quiet(proxy)
    before = uids(world, space)
    if not operator_lives:
        operator.kill()
    seen: dict[str, set[str]] = {}

    def see() -> None:
        for name, uid in uids(world, space).items():
            seen.setdefault(name, set()).add(uid)

    with meanwhile(see):
        # At once: who plays the kubelets here would delete what has the name, even if it is the successor.
        world.api.delete(path_of("pods", space, lost), gracePeriodSeconds="0")
        wait_until(lambda: uids(world, space).get(lost) not in (before[lost], None), "the successor")
        wait_until(lambda: whole(world, space, "llama-0"), "a whole group, without a gate in its way", 20.0)
        if not operator_lives:
            operators()
        world.wait_ready(space)
        world.wait_quiet(proxy)
    assert {name: len(found) for name, found in seen.items()} == {lost: 2, **dict.fromkeys(before.keys() - {lost}, 1)}
    assert [o["metadata"]["name"] for o in world.list("statefulsets", space)] == ["llama-0"]


def test_an_operator_that_restarts_amid_an_update_updates_one_group_at_a_time(
    world: World, proxy: ApiProxy, operators: Start, space: str
) -> None:
    """LeaderWorkerSet #225."""
    operator = operators()
    world.deploy(space, replicas=4, rollout={"maxSurge": 0, "maxUnavailable": 1})
    world.wait_ready(space)
    old = {o["metadata"]["uid"] for o in world.list("statefulsets", space)}
    fewest = 4
    sets: set[str] = set()

    def see() -> None:
        nonlocal fewest
        ready: dict[str, int] = {}
        for pod in world.list("pods", space):
            labels, metadata = pod["metadata"]["labels"], pod["metadata"]
            is_ready = any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))
            if "serving.arriero.dev/group" in labels and is_ready and not metadata.get("deletionTimestamp"):
                group = f"{labels['serving.arriero.dev/group']} {labels['serving.arriero.dev/revision']}"
                ready[group] = ready.get(group, 0) + 1
        fewest = min(fewest, sum(count == 2 for count in ready.values()))
        sets.update(o["metadata"]["uid"] for o in world.list("statefulsets", space))

    restarts = 0
    with meanwhile(see):
        world.edit(space, engine={"maxRunning": 128})
        while old & {o["metadata"]["uid"] for o in world.list("statefulsets", space)} and restarts < 30:
            count = len(proxy.writes(space))
            wait_until(lambda n=count: len(proxy.writes(space)) >= n + 3 or finished(world, space), "progress", 30.0)
            operator.kill()
            operator = operators()
            restarts += 1
        wait_until(lambda: finished(world, space), "the end of the update")
        world.wait_ready(space)
        world.wait_quiet(proxy)
    print(f"{restarts} restarts amid an update of 4 groups: never fewer than {fewest} of them whole and ready")
    assert restarts >= 4
    assert fewest == 3, "one at a time"
    assert len(sets - old) == 4, "each group was replaced once"


def finished(world: World, space: str) -> bool:
    status = world.status(space)
    seen = world.get("llamadeployments", space, "llama")["metadata"]["generation"]
    return bool(
        status.get("observedGeneration") == seen
        and status.get("updatedReplicas") == status.get("replicas") == 4
        and status["phase"] == "Ready"
    )


def test_nothing_of_a_group_is_left_after_scaling_down(
    world: World, proxy: ApiProxy, operators: Start, space: str
) -> None:
    """LeaderWorkerSet #694; here with an operator that dies at the first removal."""
    operator = operators()
    world.deploy(space, replicas=3)
    world.wait_ready(space)
    kept = uids(world, space)
    world.edit(space, replicas=1)
    wait_until(lambda: len(world.list("statefulsets", space)) < 3, "the first group's end", interval=0.01)
    operator.kill()
    operators()
    wait_until(lambda: len(uids(world, space)) == 2, "end of the pods")
    world.wait_ready(space)
    world.wait_quiet(proxy)
    (group,) = {o["metadata"]["name"] for o in world.list("statefulsets", space)}
    left = {
        (plural, name)
        for (plural, name), o in world.children(space).items()
        if o["metadata"]["labels"].get("serving.arriero.dev/group", group) != group
    }
    assert not left
    assert uids(world, space).items() <= kept.items(), "those that stay were never touched"


def test_pods_that_a_dead_node_never_lets_go_are_fenced_and_replaced(
    world: World, proxy: ApiProxy, operators: Start, space: str
) -> None:
    """LeaderWorkerSet #508: a pod stuck in Terminating on a node that is gone holds its name for ever."""
    operators(config={"lostSeconds": 1})
    world.deploy(space)
    world.wait_ready(space)
    world.wait_quiet(proxy)
    before = uids(world, space)
    node = world.get("pods", space, "llama-0-0")["spec"]["nodeName"]
    began = time.monotonic()
    with dead(world, node):
        world.api.delete(path_of("pods", space, "llama-0-1"))
        assert world.get("pods", space, "llama-0-1")["metadata"]["deletionTimestamp"], "nobody is there to end it"

        def moved() -> bool:
            pods = world.list("pods", space, group="llama-0")
            places = {pod["spec"].get("nodeName") for pod in pods}
            return len(pods) == 2 and node not in places and None not in places

        wait_until(moved, "the group on another node", 60.0)
        world.wait_ready(space)
        print(f"a group whose node died serves elsewhere after {time.monotonic() - began:.1f} s")
        assert not uids(world, space).items() & before.items()


@contextmanager
def dead(world: World, node: str) -> Iterator[None]:
    """Nobody plays this node's kubelet, and the cluster has noticed."""
    path = f"/api/v1/nodes/{node}"
    world.api.patch(path, {"metadata": {"labels": {"type": "dead"}}})
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def silence() -> bool:
        conditions = world.api.get(path)["status"]["conditions"]
        for entry in conditions:
            if entry["type"] == "Ready" and entry["status"] == "True":
                entry.update(status="Unknown", reason="NodeStatusUnknown", lastTransitionTime=now)
                world.api.patch(f"{path}/status", {"status": {"conditions": conditions}})
                return False
        return True

    try:
        wait_until(silence, "a dead node")
        yield
    finally:
        world.api.patch(path, {"metadata": {"labels": {"type": "kwok"}}})


def test_a_router_s_settings_restart_no_worker_and_an_image_of_workers_no_router(
    world: World, proxy: ApiProxy, operators: Start, space: str
) -> None:
    """AIBrix #2041: an update of one role restarts all."""
    operator = operators()
    world.deploy(space)
    world.wait_ready(space)
    workers, routers = uids(world, space), uids(world, space, "router")
    world.edit(space, router={"policy": "round-robin", "replicas": 2})
    wait_until(lambda: len(new := uids(world, space, "router")) == 2 and not new.items() & routers.items(), "routers")
    world.wait_ready(space)
    world.wait_quiet(proxy)
    assert uids(world, space) == workers

    routers = uids(world, space, "router")
    world.edit(space, engine={"maxRunning": 64})
    wait_until(lambda: not uids(world, space).items() & workers.items(), "other workers")
    operator.kill()
    operators(config={"workerImage": "arriero-worker:3"})
    wait_until(lambda: image_of(world, space) == {"arriero-worker:3"}, "workers of another image")
    world.wait_ready(space)
    world.wait_quiet(proxy)
    assert uids(world, space, "router") == routers


def image_of(world: World, space: str) -> set[str]:
    pods = world.list("pods", space)
    workers = [pod for pod in pods if "serving.arriero.dev/group" in pod["metadata"]["labels"]]
    return {pod["spec"]["containers"][0]["image"] for pod in workers}


@pytest.mark.parametrize(("tensor", "pipeline", "per_node"), [(1, 4, 1), (2, 2, 2), (4, 2, 2)])
def test_each_device_that_a_group_holds_has_a_rank(
    world: World, operator: Operator, space: str, tensor: int, pipeline: int, per_node: int
) -> None:
    """KServe #6044: a pipeline that is ignored while its GPUs stay allocated."""
    world.deploy(
        space,
        parallelism={"tensor": tensor, "pipeline": pipeline},
        accelerator={"type": "H100-80GB", "perNode": per_node},
    )
    world.wait_ready(space)
    check_devices(world, space, tensor * pipeline)
    assert world.status(space)["plan"]["layout"] == f"TP{tensor}xPP{pipeline}"


def check_devices(world: World, space: str, ranks: int) -> None:
    pods = world.list("pods", space, group="llama-0")
    held = sum(int(pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) for pod in pods)
    (launch,) = (o for o in world.list("configmaps", space, group="llama-0"))
    told: Any = json.loads(launch["data"]["launch.json"])
    assert held == ranks
    assert len(told["pods"]) == len(pods)
    assert told["layout"]["tensor"] * told["layout"]["pipeline"] == ranks


def test_a_group_over_several_nodes_becomes_ready_and_a_smaller_one_gives_devices_back(
    world: World, operator: Operator, space: str
) -> None:
    """KServe #6043: a multi-node deployment that never becomes Ready. Nodes of one device each here."""
    with small_nodes(world, space, 4) as selector:
        template = {"spec": {"nodeSelector": selector}}
        world.deploy(space, parallelism={"tensor": 1, "pipeline": 4}, podTemplate=template)
        world.wait_ready(space)
        assert len({pod["spec"]["nodeName"] for pod in world.list("pods", space, group="llama-0")}) == 4
        rollout = {"maxSurge": 0, "maxUnavailable": 1}
        world.edit(space, parallelism={"tensor": 1, "pipeline": 2}, rollout=rollout)
        wait_until(lambda: world.status(space).get("plan", {}).get("layout") == "TP1xPP2", "the new plan")
        world.wait_ready(space)
        wait_until(lambda: len(uids(world, space)) == 2, "two devices given back")
        world.edit(space, replicas=3)
        wait_until(lambda: world.status(space).get("ready") == "2/3", "the one more that fits")
        wait_until(lambda: "needs " in world.status(space).get("message", ""), "word of what is missing")
        status = world.status(space)
        assert "nvidia.com/gpu" in status["message"], status["message"]
        print(status["message"])
        world.remove(space)
        world.wait_gone(space)


@contextmanager
def small_nodes(world: World, space: str, count: int) -> Iterator[dict[str, str]]:
    names = [f"n{space[-8:]}-{number}" for number in range(count)]
    world.add_nodes(names, gpus=1, pool=space)
    try:
        yield {"pool": space}
    finally:
        for name in names:
            world.api.delete(f"/api/v1/nodes/{name}-0")


def test_deployments_with_swapped_names_and_namespaces_are_two(
    world: World, proxy: ApiProxy, operator: Operator, spaces: Callable[[], str]
) -> None:
    """dask-kubernetes: what is remembered under (name, namespace) where it should be (namespace, name) leaks."""
    first, second = spaces(), spaces()
    world.deploy(first, name=second[-20:].strip("-"))
    world.deploy(second, name=first[-20:].strip("-"))
    world.wait_ready(first, name=second[-20:].strip("-"))
    world.wait_ready(second, name=first[-20:].strip("-"))
    kept = world.snapshot(second, first[-20:].strip("-"))
    (resource,) = world.list("llamadeployments", first)
    assert not resource["metadata"].get("finalizers"), (
        "nothing holds up the deletion of a deployment, or of its namespace"
    )
    world.remove(first, second[-20:].strip("-"))
    world.wait_gone(first)
    world.wait_quiet(proxy)
    assert world.snapshot(second, first[-20:].strip("-")) == kept
    series = [operator.metric("arriero_deployment_ready_replicas", f'namespace="{n}"') for n in (first, second)]
    assert series == [0.0, 1.0], "the series of what is gone are gone"
    operator.kill()
    world.remove(second, first[-20:].strip("-"))
    world.wait_gone(second)
    assert not world.list("llamadeployments", second), "it is deleted though no operator is there"
