"""Whatever breaks, the deployment says so and comes back by itself; each test prints how long that took."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from tests.cluster.pods import SLEEPER, pod
from tests.cluster.processes import wait_until
from tests.e2e.product import CHECKPOINT, Llama
from tests.worker.download.servers import Fault, ObjectStore

pytestmark = pytest.mark.cluster

LIMA = "The capital of Peru is Lima."


def worker(**fields: object) -> dict[str, object]:
    """A podTemplate that changes the worker's container."""
    return {"spec": {"containers": [{"name": "worker", **fields}]}}


# So large that a node of eight processors has room for one pod, or for two.
ONE_PER_NODE = worker(resources={"requests": {"cpu": "5"}})
TWO_PER_NODE = worker(resources={"requests": {"cpu": "3"}})


@pytest.fixture
def serving(llama: Llama) -> Llama:
    """Two stages on two nodes, ready."""
    began = llama.apply(podTemplate=ONE_PER_NODE)
    print(f"Available {llama.wait_for('Ready') - began:.1f} s after its creation")
    assert llama.ask() == LIMA
    return llama


def harm(llama: Llama, what: str, action: Callable[[], object], *, streams: int = 2) -> float:
    """Do it under load, and wait until the deployment has noticed and is Ready again; how long that took."""
    epoch = llama.epoch()
    with llama.load(streams) as load:
        wait_until(lambda: len(load.answers) >= streams, "streams that end", 60.0)
        began = time.monotonic()
        action()
        llama.wait(lambda: llama.epoch() > epoch and llama.is_("Ready"), f"Ready after {what}")
        took = time.monotonic() - began
        answered = len(load.answers)
        wait_until(lambda: len(load.answers) >= answered + streams, "streams after it", 90.0)
    print(f"{what}: Ready again after {took:.1f} s; {len(load.answers)} streams, {len(load.broken)} broken")
    assert load.broken == []
    assert set(load.answers) == {LIMA}
    return took


def test_a_killed_worker_container_is_started_again_and_the_others_keep_theirs(serving: Llama) -> None:
    before = serving.uids()
    harm(serving, "killed container", lambda: serving.kill_container("tiny-llama-0-1"))
    assert serving.uids() == before
    restarts = {p["metadata"]["name"]: p["status"]["containerStatuses"][0]["restartCount"] for p in serving.pods()}
    assert restarts == {"tiny-llama-0-0": 0, "tiny-llama-0-1": 1}


def test_a_deleted_pod_is_replaced_and_the_others_keep_their_weights(serving: Llama) -> None:
    before = serving.uids()
    harm(
        serving,
        "deleted pod",
        lambda: serving.kubectl("delete", "pod", "tiny-llama-0-1", "--force", "--grace-period=0"),
    )
    after = serving.uids()
    assert after["tiny-llama-0-0"] == before["tiny-llama-0-0"]
    assert after["tiny-llama-0-1"] != before["tiny-llama-0-1"]


def test_a_deleted_leader_is_replaced_and_its_streams_go_on(serving: Llama) -> None:
    before = serving.uids()
    harm(
        serving,
        "deleted leader",
        lambda: serving.kubectl("delete", "pod", "tiny-llama-0-0", "--force", "--grace-period=0"),
    )
    assert serving.uids()["tiny-llama-0-1"] == before["tiny-llama-0-1"]


def test_a_pod_kill_costs_a_fraction_of_making_the_group_anew(llama: Llama) -> None:
    """Four stages, so that the lost one is a quarter of the work: on this machine it all shares the same processors."""
    llama.apply(pipeline=4, podTemplate=TWO_PER_NODE)
    llama.wait_for("Ready")
    one, whole = [], []
    for _ in range(2):
        last = llama.pods()[-1]["metadata"]["name"]
        delete = ("delete", "pod", last, "--force", "--grace-period=0")
        one.append(harm(llama, "one pod of four", lambda words=delete: llama.kubectl(*words), streams=1))  # type: ignore[misc]
        (made,) = llama.kubectl.get("statefulsets")["items"]
        began = time.monotonic()
        name = made["metadata"]["name"]
        llama.kubectl("delete", "statefulset", name, "--cascade=foreground", "--timeout=100s", timeout=120.0)

        def anew(uid: str = made["metadata"]["uid"]) -> bool:
            sets = llama.kubectl.get("statefulsets")["items"]
            return [entry["metadata"]["uid"] != uid for entry in sets] == [True] and llama.is_("Ready")

        llama.wait(anew, "a new group that serves")
        whole.append(time.monotonic() - began)
    ratio = min(one) / min(whole)
    print(f"one pod {min(one):.1f} s, the whole group {min(whole):.1f} s: {ratio:.2f}")
    assert ratio < 0.6


def test_a_node_cut_off_for_a_moment_keeps_its_pods(serving: Llama) -> None:
    before = serving.uids()
    node = serving.cluster.node(serving.pod("tiny-llama-0-1")["spec"]["nodeName"])

    def cut() -> None:
        # As long as the engine takes to notice. The operator may lead from the node that is cut, and then it is late.
        node.cut()
        wait_until(lambda: not serving.engine_serves("tiny-llama-0-0"), "the engine's notice of the cut", 30.0)
        node.mend()

    harm(serving, "node cut off and back", cut)
    assert serving.uids() == before


def test_a_node_gone_for_good_is_left_behind(llama: Llama) -> None:
    llama.apply(podTemplate=TWO_PER_NODE)
    llama.wait_for("Ready")
    before = llama.uids()
    (place,) = {entry["spec"]["nodeName"] for entry in llama.pods()}
    began = time.monotonic()
    llama.cluster.node(place).cut()

    def elsewhere() -> bool:
        nodes = {entry["spec"].get("nodeName") for entry in llama.pods()}
        return bool(nodes) and place not in nodes and llama.is_("Ready")

    llama.wait(elsewhere, "the group on the other node")
    print(f"node lost: Ready elsewhere after {time.monotonic() - began:.1f} s")
    assert not set(llama.uids().values()) & set(before.values())
    assert f"its node {place} is lost" in llama.product.operator_log()


def test_a_restarted_kubelet_changes_nothing(serving: Llama) -> None:
    before, epoch = serving.uids(), serving.epoch()
    place = serving.pod("tiny-llama-0-1")["spec"]["nodeName"]
    with serving.load(2) as load:
        began = time.monotonic()
        serving.cluster.restart_kubelet(place)
        wait_until(lambda: len(load.answers) >= 4, "streams meanwhile", 90.0)
    serving.wait_for("Ready")
    print(f"kubelet restarted: Ready after {time.monotonic() - began:.1f} s; {len(load.answers)} streams")
    assert load.broken == []
    assert (serving.uids(), serving.epoch()) == (before, epoch)


def test_operators_killed_while_they_work(llama: Llama) -> None:
    """Each time one begins to lead it is killed, until the deployment is Ready all the same."""
    began = llama.apply()
    killed: list[str] = []
    while not llama.is_("Ready") and time.monotonic() - began < 240:
        leader = llama.product.leader()
        if leader and leader not in killed and len(killed) < 3:
            llama.product.system("delete", "pod", leader, "--force", "--grace-period=0", check=False)
            killed.append(leader)
        time.sleep(0.5)
    print(f"Available {time.monotonic() - began:.1f} s after its creation, over {len(killed)} killed operators")
    assert killed
    assert llama.is_("Ready")
    assert llama.ask() == LIMA


@pytest.mark.parametrize(("victim", "seconds"), [("kube-apiserver", 60.0), ("etcd", 5.0)])
def test_serving_goes_on_without_the_control_plane(serving: Llama, victim: str, seconds: float) -> None:
    before, epoch, address = serving.uids(), serving.epoch(), serving.address()
    (program,) = [program for program in serving.cluster.control_plane.programs if program.name == victim]
    with serving.load(1) as load:
        assert address
        program.kill()
        time.sleep(seconds)  # the fault itself: so long it is away
        answered = len(load.answers)
        program.start()
        began = time.monotonic()
        serving.cluster.wait_for_api()
        serving.wait_for("Ready")
        wait_until(lambda: len(load.answers) > answered, "streams after it", 60.0)
    assert answered, "nobody was answered meanwhile"
    assert load.broken == []
    assert (serving.uids(), serving.epoch()) == (before, epoch)
    # The operator is at work again: it does what it is asked.
    serving.kubectl("patch", "llama", "tiny-llama", "--type=merge", '--patch={"spec": {"router": {"replicas": 2}}}')

    def two_routers() -> bool:
        return serving.kubectl.get("deployment", "tiny-llama-router")["spec"]["replicas"] == 2

    serving.wait(two_routers, "the operator's next write", 90.0)
    took = time.monotonic() - began
    print(f"{victim} away for {seconds:.0f} s: {answered} answers meanwhile, reconciled {took:.1f} s after its return")


def test_an_image_that_cannot_be_pulled_is_told_and_healed(llama: Llama) -> None:
    nobody = f"{llama.cluster.layout.address}:1"  # where no registry listens
    llama.apply(podTemplate=worker(image=f"{nobody}/arriero-worker:none"))
    llama.wait(lambda: "ErrImagePull" in message(llama) or "ImagePullBackOff" in message(llama), "word of the image")
    print(message(llama))
    began = llama.apply(rollout={"maxSurge": 0, "maxUnavailable": 1, "drainSeconds": 10})
    llama.wait_for("Ready")
    print(f"Available {time.monotonic() - began:.1f} s after the image was right")


def test_full_nodes_are_told_and_taken_once_they_are_free(llama: Llama) -> None:
    resources = {"requests": {"cpu": "7"}}
    for name in ("filler-1", "filler-2"):
        filler = pod(name, SLEEPER, resources=resources)
        filler["spec"]["nodeName"] = name.replace("filler", "node")
        llama.kubectl.apply(filler)
    llama.apply(podTemplate=ONE_PER_NODE)
    llama.wait(lambda: "needs" in message(llama) and "has" in message(llama), "word of what is missing", 60.0)
    print(message(llama))
    assert llama.condition("Scheduled")["reason"] == "NotEnoughRoom"
    llama.kubectl("delete", "pod", "filler-1", "--now")
    time.sleep(3)
    assert not any(entry["spec"].get("nodeName") for entry in llama.pods()), "half a group was placed"
    began = time.monotonic()
    llama.kubectl("delete", "pod", "filler-2", "--now")
    llama.wait_for("Ready")
    print(f"Available {time.monotonic() - began:.1f} s after there was room")


def test_what_users_break_by_hand_is_put_back(serving: Llama) -> None:
    began = time.monotonic()
    for what in ("service/tiny-llama-router", "service/tiny-llama-0", "deployment/tiny-llama-router"):
        serving.kubectl("delete", what, "--wait=false")
    serving.kubectl("patch", "networkpolicy", "tiny-llama-0", "--type=merge", '--patch={"spec": {"ingress": []}}')
    serving.kubectl("scale", "statefulset", "tiny-llama-0", "--replicas=1")
    serving.wait(lambda: len(serving.pods()) == 2 and serving.is_("Ready"), "Ready after it")

    def whole() -> bool:
        policy = serving.kubectl.get("networkpolicy", "tiny-llama-0")
        names = {entry["metadata"]["name"] for entry in serving.kubectl.get("services")["items"]}
        return len(policy["spec"]["ingress"]) == 3 and {"tiny-llama-router", "tiny-llama-0"} <= names

    serving.wait(whole, "everything as it was", 60.0)
    print(f"five hands in it: as it was after {time.monotonic() - began:.1f} s")
    assert serving.ask() == LIMA


def test_a_slow_and_failing_download_is_told_and_heals(llama: Llama) -> None:
    files = {f"tiny/{path.name}": path.read_bytes() for path in CHECKPOINT.iterdir() if path.is_file()}
    store = ObjectStore(files, host=llama.cluster.layout.address)
    try:
        secret = {
            "AWS_ACCESS_KEY_ID": store.key,
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": store.main.url,
        }
        metadata = {"name": "store"}
        llama.kubectl.apply({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": secret})
        refused = Fault(".safetensors", times=1_000_000, status=403)
        store.main.faults.append(refused)
        source = {"objectStore": {"uri": "s3://models/tiny", "secretRef": {"name": "store"}}}
        llama.apply(model={"name": "tiny-llama", "source": source})
        llama.wait(lambda: "cannot be fetched" in message(llama), "word of the refusal")
        print(message(llama))
        assert llama.is_("Degraded")

        refused.times = 0
        store.main.limit = store.main.body_bytes + sum(map(len, files.values())) // 2
        llama.wait(lambda: "of" in message(llama) and groups(llama) == ["Downloading"], "word of the progress")
        print(message(llama))
        store.main.limit = -1
        began = time.monotonic()
        llama.wait_for("Ready")
        print(f"Available {time.monotonic() - began:.1f} s after the store answered well")
        assert llama.ask() == LIMA
    finally:
        store.close()


def groups(llama: Llama) -> list[str]:
    return [str(group["phase"]) for group in llama.status().get("groups") or []]


def message(llama: Llama) -> str:
    return str(llama.status().get("message") or "")
