"""A cluster in memory: an API server's writes, and what controllers, scheduler, kubelets and engines make of them.

Time is the test's own. What must never happen is checked as it happens: a node that holds more than it has, an
immutable field that changes, a pod that is deleted with requests on it.
"""

from __future__ import annotations

import copy
import random
from fractions import Fraction
from typing import Any

from arriero_operator import names
from arriero_operator.desired import Desired, desired
from arriero_operator.observe import Observed, Pod, RankReport, Report, nodes_of, timestamp
from arriero_operator.quantity import parse_quantity, pod_requests, resources
from arriero_operator.scheduling import admits
from arriero_operator.settings import Settings
from arriero_operator.writes import Apply, Delete, Drain, Emit, Patch, SetStatus, Write

SETTINGS = Settings(worker_image="registry.example/arriero-worker:1", router_image="registry.example/arriero-router:1")
NAMESPACE = "llamas"
BEGIN = 1_800_000_000.0


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


class FakeCluster:
    def __init__(self, settings: Settings = SETTINGS) -> None:
        self.settings = settings
        self.now = BEGIN
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.applied: dict[tuple[str, str], dict[str, Any]] = {}
        self.nodes: dict[str, dict[str, Any]] = {}
        self.down: set[str] = set()
        self.routers_down = False
        self.events: dict[str, Emit] = {}
        self.requests: dict[str, int] = {}
        """Requests on a group."""
        self.draining: set[str] = set()
        """Uids of leader pods whose engines were asked to drain."""
        self.broken: set[str] = set()
        """Images whose workers never serve."""
        self.epochs: dict[str, int] = {}
        self.formed: dict[str, tuple[str, ...]] = {}
        self.started: dict[str, float] = {}
        self.load_seconds = 3.0
        self.cut_requests: list[str] = []
        """Pods that were deleted with requests on them, without a drain and without being lost."""
        self.uids = 0
        self.writes = 0

    # What a test does

    def add_nodes(self, count: int, rack: str = "", gpus: int = 8, prefix: str = "node") -> None:
        for number in range(count):
            name = f"{prefix}-{number}"
            labels = {names.HOSTNAME: name}
            if rack:
                labels["topology.kubernetes.io/rack"] = rack
            allocatable = {"nvidia.com/gpu": str(gpus), "cpu": "64", "memory": "512Gi", "pods": "110"}
            self.nodes[name] = {
                "metadata": {"name": name, "labels": labels},
                "spec": {},
                "status": {"allocatable": allocatable, "conditions": [_ready(True, self.now)]},
            }

    def create(self, name: str, **spec: Any) -> None:
        whole: dict[str, Any] = {
            "model": {"name": "llama", "source": {"huggingFace": {"repo": "meta-llama/Llama-3.1-70B-Instruct"}}},
            "accelerator": {"type": "H100-80GB", "perNode": 8},
            "parallelism": {"tensor": 8, "pipeline": 2},
            "rollout": {"drainSeconds": 20},
        }
        whole.update(spec)
        metadata = {
            "name": name,
            "namespace": NAMESPACE,
            "uid": self._uid(),
            "generation": 1,
            "creationTimestamp": timestamp(self.now),
        }
        self.objects["LlamaDeployment", name] = {
            "apiVersion": "serving.arriero.dev/v1alpha1",
            "kind": "LlamaDeployment",
            "metadata": metadata,
            "spec": whole,
        }

    def edit(self, name: str, **spec: Any) -> None:
        resource = self.objects["LlamaDeployment", name]
        resource["spec"] = merge_patch(resource["spec"], spec)
        resource["metadata"]["generation"] += 1

    def remove(self, name: str) -> None:
        del self.objects["LlamaDeployment", name]

    def lose(self, node: str) -> None:
        """Its kubelet falls silent, and the cluster has noticed."""
        self.down.add(node)
        self.nodes[node]["status"]["conditions"] = [_ready(False, self.now)]

    def bring_back(self, node: str) -> None:
        self.down.discard(node)
        self.nodes[node]["status"]["conditions"] = [_ready(True, self.now)]
        for key, pod in [*self.objects.items()]:
            # A kubelet ends what the API server does not know any more, and what it is told to.
            if key[0] == "Pod" and pod["spec"].get("nodeName") == node and _deleted(pod):
                self._drop(key)

    def status(self, name: str) -> dict[str, Any]:
        return self.objects["LlamaDeployment", name].get("status") or {}

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        return next(entry for entry in self.status(name)["conditions"] if entry["type"] == kind)

    def pods(self, group: str = "") -> list[dict[str, Any]]:
        found = [o for (kind, _), o in sorted(self.objects.items()) if kind == "Pod"]
        return [pod for pod in found if names.GROUP in pod["metadata"]["labels"] and group in ("", _group(pod))]

    def groups(self) -> list[str]:
        return sorted(name for kind, name in self.objects if kind == "StatefulSet")

    def snapshot(self) -> dict[tuple[str, str], Any]:
        """All objects without what differs from one run to the next: uids and times."""
        return {key: _bare(o) for key, o in sorted(self.objects.items())}

    # The operator

    def observe(self, name: str) -> Observed:
        resource = self.objects["LlamaDeployment", name]
        pods = [Pod.of(o) for (kind, _), o in self.objects.items() if kind == "Pod"]
        mine = [pod for pod in pods if pod.labels.get(names.DEPLOYMENT) == name]
        others = [pod for pod in pods if pod not in mine and pod.group]
        children = [o for (kind, _), o in self.objects.items() if kind not in ("Pod", "LlamaDeployment")]
        return Observed(
            resource=resource,
            objects=tuple(children),
            pods=tuple(mine),
            others=tuple(others),
            nodes=nodes_of(self.nodes.values(), [pod.raw for pod in pods]),
            reports={pod.name: report for pod in mine if (report := self._report(pod)) is not None},
            config=None,
            now=self.now,
        )

    def pass_over(self, name: str, budget: int | None = None) -> tuple[Desired, bool]:
        """One pass of the operator, killed once `budget` writes were made; whether it got to its end."""
        found = desired(self.observe(name), self.settings)
        for number, write in enumerate(found.writes):
            if number == budget:
                return found, False
            self.write(write)
        for call in found.calls:
            self._drain(call)
        return found, True

    def converge(self, *deployments: str, ticks: int = 400) -> int:
        """Passes and ticks until nothing is written or changed for some time; how many writes that took."""
        total = quiet = 0
        for _ in range(ticks):
            made = 0
            for name in deployments:
                if ("LlamaDeployment", name) in self.objects:
                    made += len(self.pass_over(name)[0].writes)
            total += made
            quiet = quiet + 1 if self.tick_changes_nothing(bool(made)) else 0
            if quiet > 3:
                return total
        raise AssertionError(f"no rest after {ticks} ticks: {self.snapshot().keys()}")

    def tick_changes_nothing(self, written: bool) -> bool:
        """A tick, and whether neither it nor the pass before it changed anything."""
        before = None if written else self.snapshot()
        self.tick()
        return before is not None and self.snapshot() == before

    def run(self, seconds: int, *deployments: str) -> None:
        for _ in range(seconds):
            for name in deployments:
                self.pass_over(name)
            self.tick()

    def write(self, write: Write) -> None:
        self.writes += 1
        match write:
            case Apply(rendered, new):
                key = rendered["kind"], rendered["metadata"]["name"]
                assert new == (key not in self.objects)
                self._apply(rendered)
            case Patch(_, kind, name, uid, body):
                seen = self.objects.get((kind, name))
                if seen is not None and seen["metadata"]["uid"] == uid:
                    self.objects[kind, name] = merge_patch(seen, body)
            case Delete():
                self._delete(write)
            case Emit(name):
                self.events.setdefault(name, write)
            case SetStatus(status):
                name = next(o["metadata"]["name"] for o in self.objects.values() if self._is_writing(o, status))
                self.objects["LlamaDeployment", name]["status"] = copy.deepcopy(dict(status))

    def _is_writing(self, o: dict[str, Any], status: Any) -> bool:
        selector = f"{names.DEPLOYMENT}={o['metadata']['name']},"
        return o["kind"] == "LlamaDeployment" and status["selector"].startswith(selector)

    # The API server

    def _uid(self) -> str:
        self.uids += 1
        return f"uid-{self.uids}"

    def _apply(self, rendered: Any) -> None:
        rendered = copy.deepcopy(dict(rendered))
        key = rendered["kind"], rendered["metadata"]["name"]
        owner = rendered["metadata"]["ownerReferences"][0]["uid"]
        assert any(o["metadata"]["uid"] == owner for o in self.objects.values()), "an owner that does not exist"
        seen = self.objects.get(key)
        applied = copy.deepcopy(rendered)
        if seen is None:
            rendered["metadata"] |= {"uid": self._uid(), "creationTimestamp": timestamp(self.now)}
            merged = rendered | ({"status": {"phase": "Pending"}} if key[0] == "Pod" else {})
            self.epochs.pop(key[1], None)
            self.formed.pop(key[1], None)
        else:
            if seen.get("immutable"):
                assert seen["data"] == rendered["data"], f"{key} is immutable"
            if key[0] == "StatefulSet":
                for field in ("serviceName", "podManagementPolicy", "selector"):
                    assert seen["spec"][field] == rendered["spec"][field], f"{key}: {field} cannot change"
            merged = merge_patch(_without(seen, self.applied.get(key, {}), rendered), rendered)
            if key[0] == "Service":  # a map that is applied as a whole
                merged["spec"]["selector"] = rendered["spec"]["selector"]
        self.applied[key] = applied
        self.objects[key] = _defaulted(merged)

    def _delete(self, write: Delete) -> None:
        key = write.kind, write.name
        seen = self.objects.get(key)
        if seen is None or seen["metadata"]["uid"] != write.uid:
            return
        if write.kind != "Pod":
            self._drop(key)
            return
        self._end_pod(seen, write.grace_seconds)

    def _end_pod(self, pod: dict[str, Any], grace: int | None) -> None:
        lost = pod["spec"].get("nodeName") in self.down or pod["spec"].get("nodeName") not in (*self.nodes, None)
        leads = pod["metadata"]["name"].endswith("-0")
        if self.requests.get(_group(pod), 0) and leads and _is_ready(pod) and not lost:
            self.cut_requests.append(pod["metadata"]["name"])
        if grace == 0 or not pod["spec"].get("nodeName"):
            self._drop(("Pod", pod["metadata"]["name"]))
        else:
            pod["metadata"].setdefault("deletionTimestamp", timestamp(self.now + 30))

    def _drop(self, key: tuple[str, str]) -> None:
        self.objects.pop(key, None)
        self.applied.pop(key, None)

    # Controllers, scheduler, kubelets, engines

    def tick(self, seconds: float = 1.0) -> None:
        self.now += seconds
        self._collect_garbage()
        self._end_deleted()
        self._stateful_sets()
        self._routers()
        self._schedule()
        self._run_pods()
        self._check_nodes()

    def _collect_garbage(self) -> None:
        while True:
            uids = {o["metadata"]["uid"] for o in self.objects.values()}
            orphans = [
                key
                for key, o in self.objects.items()
                if any(ref["uid"] not in uids for ref in o["metadata"].get("ownerReferences", []))
            ]
            for key in orphans:
                if key[0] == "Pod":
                    if not _deleted(self.objects[key]):
                        self._end_pod(self.objects[key], None)
                else:
                    self._drop(key)
            if not any(key[0] != "Pod" for key in orphans):
                return

    def _end_deleted(self) -> None:
        for key, pod in [*self.objects.items()]:
            if key[0] == "Pod" and _deleted(pod) and pod["spec"].get("nodeName") not in self.down:
                self._drop(key)

    def _stateful_sets(self) -> None:
        for (kind, name), o in [*self.objects.items()]:
            if kind != "StatefulSet":
                continue
            for index in range(o["spec"]["replicas"]):
                if ("Pod", f"{name}-{index}") not in self.objects:
                    self._make_pod(o, f"{name}-{index}", index)

    def _routers(self) -> None:
        for (kind, _), o in self.objects.items():
            if kind == "Deployment" and not self.routers_down:
                o["status"] = {"availableReplicas": o["spec"]["replicas"]}
            elif kind == "Deployment":
                o["status"] = {}

    def _make_pod(self, owner: dict[str, Any], name: str, index: int) -> None:
        pod = copy.deepcopy(owner["spec"]["template"])
        pod["metadata"] |= {
            "name": name,
            "namespace": NAMESPACE,
            "uid": self._uid(),
            "creationTimestamp": timestamp(self.now),
            "ownerReferences": [{"uid": owner["metadata"]["uid"], "controller": True}],
        }
        pod["metadata"]["labels"][names.POD_INDEX] = str(index)
        self.objects["Pod", name] = {"apiVersion": "v1", "kind": "Pod", **pod, "status": {"phase": "Pending"}}

    def _schedule(self) -> None:
        for key, o in sorted(self.objects.items()):
            if key[0] != "Pod" or o["spec"].get("nodeName") or o["spec"].get("schedulingGates"):
                continue
            pod = Pod.of(o)
            for name, node in self.nodes.items():
                (seen,) = nodes_of([node], [])
                if name not in self.down and admits(seen, pod) and self._fits(name, pod):
                    o["spec"]["nodeName"] = name
                    o["status"]["startTime"] = timestamp(self.now)
                    self.started[o["metadata"]["uid"]] = self.now
                    break

    def _fits(self, node: str, pod: Pod) -> bool:
        used = self._used(node)
        allocatable = resources(self.nodes[node]["status"]["allocatable"])
        return all(
            used.get(name, Fraction(0)) + amount <= allocatable.get(name, Fraction(0))
            for name, amount in pod.requests.items()
        )

    def _used(self, node: str) -> dict[str, Fraction]:
        used: dict[str, Fraction] = {}
        for (kind, _), o in self.objects.items():
            if kind == "Pod" and o["spec"].get("nodeName") == node:
                for name, amount in pod_requests(o["spec"]).items():
                    used[name] = used.get(name, Fraction(0)) + amount
        return used

    def _check_nodes(self) -> None:
        for name, node in self.nodes.items():
            for resource, amount in self._used(name).items():
                assert amount <= parse_quantity(node["status"]["allocatable"][resource]), (
                    f"{name} has too much {resource}"
                )

    def _run_pods(self) -> None:
        for group in {_group(pod) for pod in self.pods()}:
            members = self.pods(group)
            alive = [pod for pod in members if pod["spec"].get("nodeName") and pod["spec"]["nodeName"] not in self.down]
            whole = {pod["metadata"]["uid"] for pod in alive if not _deleted(pod)}
            size = int(members[0]["metadata"]["annotations"][names.GROUP_SIZE])
            image = members[0]["spec"]["containers"][0]["image"]
            loaded = all(self.now - self.started[uid] >= self.load_seconds for uid in whole)
            serves = len(whole) == size and loaded and image not in self.broken
            if serves and self.formed.get(group) != tuple(sorted(whole)):
                self.formed[group] = tuple(sorted(whole))
                self.epochs[group] = self.epochs.get(group, 0) + 1
            leader = next((pod["metadata"]["uid"] for pod in alive if pod["metadata"]["name"].endswith("-0")), "")
            draining = leader in self.draining
            if draining and self.requests.get(group, 0):
                self.requests[group] -= 1
            for pod in alive:
                pod["status"]["phase"] = "Running"
                running = {"startedAt": timestamp(self.started[pod["metadata"]["uid"]])}
                pod["status"]["containerStatuses"] = [{"name": names.WORKER, "state": {"running": running}}]
                if _is_ready(pod) != (serves and not draining):
                    pod["status"]["conditions"] = [_ready(serves and not draining, self.now)]

    def _report(self, pod: Pod) -> Report | None:
        """What the leader's engine says, if the operator can reach it."""
        if pod.index or not pod.group or pod.phase != "Running" or pod.node in self.down:
            return None
        size = int(pod.annotations[names.GROUP_SIZE])
        members = {Pod.of(o).index: Pod.of(o) for o in self.pods(pod.group)}
        ranks = []
        for index in range(size):
            member = members.get(index)
            up = member is not None and member.phase == "Running" and member.node not in self.down
            age = self.now - self.started.get(member.uid, self.now) if member else 0.0
            loading = up and age < self.load_seconds
            phase = "Starting" if not up else "Loading" if loading else "Serving" if pod.ready else "Joining"
            part = int(100 * 2**30 * min(1.0, age / self.load_seconds)) if up else 0
            ranks.append(RankReport(index, index, phase, self.epochs.get(pod.group, 0), part, 100 * 2**30, age))
        order = ("Starting", "Loading", "Warming", "Joining", "Serving")
        phase = min((rank.phase for rank in ranks), key=order.index)
        if pod.uid in self.draining:
            phase = "Draining"
        return Report(phase, self.epochs.get(pod.group, 0), tuple(ranks), running=self.requests.get(pod.group, 0))

    def _drain(self, call: Drain) -> None:
        self.draining.add(self.objects["Pod", call.pod]["metadata"]["uid"])


def fail_at_random(cluster: FakeCluster, chance: random.Random) -> str:
    """One fault of those that a cluster has; what it was."""
    pods = [pod for pod in cluster.pods() if not _deleted(pod)]
    up = [name for name in cluster.nodes if name not in cluster.down]
    kind = chance.choice(("pod", "node", "back", "object", "nothing"))
    if kind == "pod" and pods:
        pod = chance.choice(pods)
        cluster._drop(("Pod", pod["metadata"]["name"]))
        return f"pod {pod['metadata']['name']} deleted by force"
    if kind == "node" and len(up) > 1:
        node = chance.choice(up)
        cluster.lose(node)
        return f"node {node} lost"
    if kind == "back" and cluster.down:
        node = chance.choice(sorted(cluster.down))
        cluster.bring_back(node)
        return f"node {node} back"
    if kind == "object":
        key = chance.choice(
            [key for key in sorted(cluster.objects) if key[0] not in ("Pod", "LlamaDeployment")] or [("", "")]
        )
        cluster._drop(key)
        return f"{key} deleted"
    return "nothing"


def _group(pod: dict[str, Any]) -> str:
    return str(pod["metadata"]["labels"].get(names.GROUP, ""))


def _deleted(o: dict[str, Any]) -> bool:
    return "deletionTimestamp" in o["metadata"]


def _ready(ready: bool, now: float) -> dict[str, str]:
    return {"type": "Ready", "status": str(ready), "lastTransitionTime": timestamp(now)}


def _is_ready(pod: dict[str, Any]) -> bool:
    return any(entry["status"] == "True" for entry in pod["status"].get("conditions", []) if entry["type"] == "Ready")


def _without(seen: Any, applied: Any, rendered: Any) -> Any:
    """What was applied before and is not applied any more goes away."""
    if not (isinstance(seen, dict) and isinstance(applied, dict)):
        return seen
    rendered = rendered if isinstance(rendered, dict) else {}
    return {
        key: _without(value, applied.get(key), rendered.get(key))
        for key, value in seen.items()
        if key not in applied or key in rendered
    }


def _defaulted(o: dict[str, Any]) -> dict[str, Any]:
    """A few of the defaults that an API server fills in, in maps and in lists."""
    if o["kind"] == "Service":
        o["spec"] = {"sessionAffinity": "None", "type": "ClusterIP", "ipFamilies": ["IPv4"], **o["spec"]}
    if o["kind"] in ("StatefulSet", "Deployment"):
        pod = o["spec"]["template"]["spec"]
        pod |= {"dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler", "restartPolicy": "Always"}
        for container in pod["containers"]:
            container |= {"terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File"}
            requests = container["resources"].setdefault("requests", {})
            requests |= container["resources"].get("limits", {})
        for volume in pod["volumes"]:
            if "configMap" in volume:
                volume["configMap"]["defaultMode"] = 420
    return o


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        volatile = ("uid", "creationTimestamp", "lastTransitionTime", "since", "phaseSince", "startTime")
        times = (names.PINNED_AT, names.DRAINING, names.ORDER, names.APPLIED)
        return {key: _bare(part) for key, part in value.items() if key not in (*volatile, *times, "deletionTimestamp")}
    return [_bare(part) for part in value] if isinstance(value, list) else value
