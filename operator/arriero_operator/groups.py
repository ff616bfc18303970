"""The groups of a deployment as they are seen: StatefulSets, their pods, and what the leaders report. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from arriero_operator import names
from arriero_operator.observe import Node, Object, Observed, Pod, RankReport, Report, seconds_of

_SERVED = ("Serving", "Draining")


@dataclass(frozen=True, slots=True)
class Group:
    """One replica's pods, and how they are."""

    name: str
    replica: int
    revision: str
    size: int
    """Pods that it should have; 0 where only leftovers of it are there."""
    stateful_set: Object | None
    deleting: bool
    """The StatefulSet is gone or going, pods of it are still there."""
    draining_since: float | None
    gated: bool
    """Its template still has the gate: the group was never placed as a whole."""
    pods: tuple[Pod, ...]
    """By index, at most one of each."""
    report: Report | None
    """What its leader's pod says."""
    lost: frozenset[str]
    """Names of its pods on nodes that are lost."""
    orphaned: bool = False
    """Its StatefulSet was deleted from above its pods, which belong to nobody now: made anew, it adopts them."""
    downloads: tuple[RankReport, ...] = ()
    """What those of its pods say that are still fetching the model."""

    @property
    def leader(self) -> Pod | None:
        return next((pod for pod in self.pods if pod.index == 0), None)

    @property
    def live(self) -> bool:
        """It is there and meant to stay."""
        return not self.deleting and self.draining_since is None

    @property
    def complete(self) -> bool:
        """Every pod is there and meant to stay."""
        return len(self.pods) == self.size and all(pod.deleting_since is None for pod in self.pods)

    @property
    def placed(self) -> bool:
        return self.complete and all(pod.node for pod in self.pods)

    @property
    def ready(self) -> bool:
        """It answers requests. A leader's pod is ready while the whole group serves; the engine itself says sooner when
        it does not, and a lost node cannot say so for a while.
        """
        leader, report = self.leader, self.report
        if leader is None or not leader.ready or self.lost or not self.live or not self.complete:
            return False
        return report is None or report.phase == "Serving"

    @property
    def load(self) -> int:
        return self.report.requests if self.report else 0

    @property
    def idle(self) -> bool:
        """No request can be on it: its leader's containers do not run, or the engine has not served, or it says that it
        has drained. Silence proves nothing.
        """
        leader = self.leader
        if leader is None or not leader.started or leader.name in self.lost or not _running(leader):
            return True
        if self.report is None:
            return False
        return self.report.drained or (self.report.phase not in _SERVED and not self.report.requests)

    def unready_for(self, now: float) -> float:
        """Seconds since it was last ready, or since it began."""
        if self.ready:
            return 0.0
        leader = self.leader
        return now - max(leader.created, leader.ready_changed) if leader else 0.0

    def incomplete_for(self, now: float) -> float:
        """Seconds since a pod of a group that had its place is without one."""
        waiting = [pod.created for pod in self.pods if not pod.node and not pod.gated]
        return now - min(waiting) if waiting and not self.gated else 0.0


def groups_of(observed: Observed, lost_seconds: float) -> list[Group]:
    """Every group of which anything is left, by replica."""
    sets = {seen["metadata"]["name"]: seen for seen in observed.of_kind("StatefulSet")}
    members: dict[str, list[Pod]] = {}
    for pod in observed.pods:
        if pod.group:
            members.setdefault(pod.group, []).append(pod)
    lost = lost_pods(observed.pods, observed.nodes, observed.now, lost_seconds)
    found = [
        _group(observed, name, sets.get(name), members.get(name, []), lost) for name in sorted(sets.keys() | members)
    ]
    return sorted(found, key=lambda group: group.replica)


def _group(observed: Observed, name: str, seen: Object | None, pods: list[Pod], lost: Collection[str]) -> Group:
    metadata = seen["metadata"] if seen else {}
    template = ((seen["spec"].get("template") or {}).get("spec") or {}) if seen else {}
    labels = metadata.get("labels") or (pods[0].labels if pods else {})
    number = name.rpartition("-")[2]
    pods.sort(key=lambda pod: pod.index)
    leader = next((pod.name for pod in pods if pod.index == 0), "")
    draining = (metadata.get("annotations") or {}).get(names.DRAINING)
    orphaned = seen is None and all(pod.deleting_since is None and not _controlled(pod) for pod in pods)
    return Group(
        name=name,
        replica=int(number) if number.isdecimal() else 0,
        revision=labels.get(names.REVISION) or "",
        size=_size(seen, pods) if seen or orphaned else 0,
        stateful_set=seen,
        deleting=(seen is None and not orphaned) or bool(metadata.get("deletionTimestamp")),
        draining_since=(seconds_of(draining) or 0.0) if draining else None,
        gated=any(gate.get("name") == names.GATE for gate in template.get("schedulingGates") or []),
        pods=tuple(pods),
        report=observed.reports.get(leader),
        downloads=tuple(
            rank
            for pod in pods
            if (told := observed.reports.get(pod.name)) is not None and told.phase == "Downloading"
            for rank in told.ranks
        ),
        lost=frozenset(pod.name for pod in pods if pod.name in lost),
        orphaned=orphaned,
    )


def _size(seen: Object | None, pods: list[Pod]) -> int:
    if seen is not None:
        return int(seen["spec"].get("replicas") or 0)
    size = pods[0].annotations.get(names.GROUP_SIZE, "")
    return int(size) if size.isdecimal() else 0


def _controlled(pod: Pod) -> bool:
    owners = (pod.raw.get("metadata") or {}).get("ownerReferences") or []
    return any(owner.get("controller") for owner in owners)


def lost_pods(pods: Collection[Pod], nodes: Collection[Node], now: float, lost_seconds: float) -> set[str]:
    """Names of pods whose node is gone, or has not been ready for long. While no node at all is ready it is more likely
    that the cluster's own eyes are shut: then none counts as lost.
    """
    if all(node.lost_since is not None for node in nodes):
        return set()
    well = {node.name for node in nodes if node.lost_since is None or now - node.lost_since < lost_seconds}
    return {pod.name for pod in pods if pod.node and not pod.over and pod.node not in well}


def _running(pod: Pod) -> bool:
    statuses = (pod.raw.get("status") or {}).get("containerStatuses") or []
    return any((status.get("state") or {}).get("running") is not None for status in statuses)
