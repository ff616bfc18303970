"""One pass: from what is observed of a LlamaDeployment to what is to be written. Pure and level-triggered.

Nothing is remembered between passes, so an operator that ends after any write is continued by the next one. Once what
is observed is what is wanted, nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from arriero_operator import names, router, workers
from arriero_operator.accept import Accepted, accept
from arriero_operator.children import Child
from arriero_operator.groups import Group, groups_of, lost_pods
from arriero_operator.inspector import inspector_pod, stale
from arriero_operator.observe import Node, Observed, Pod, timestamp
from arriero_operator.placement import Gang, gangs, place
from arriero_operator.rollout import Steps, Target, next_steps
from arriero_operator.settings import Settings
from arriero_operator.situation import Situation
from arriero_operator.status import events, status_of
from arriero_operator.verdict import Verdicts
from arriero_operator.wanted import Wanted
from arriero_operator.writes import Apply, Delete, Drain, Patch, SetStatus, Write, delete_of, delete_pod

_PRUNED = (
    "ConfigMap",
    "Deployment",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "Role",
    "RoleBinding",
    "Service",
    "ServiceAccount",
)
"""Kinds of which whatever is ours but not wanted any more is deleted; StatefulSets go through the rollout."""

_RETRY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Desired:
    """What one pass wants done, in this order."""

    writes: tuple[Write, ...]
    calls: tuple[Drain, ...]
    again_after: float | None
    """Seconds after which another pass is due though nothing else has changed; None: only changes wake it."""


def desired(observed: Observed, settings: Settings) -> Desired:
    """The one decision of the operator."""
    if observed.resource["metadata"].get("deletionTimestamp"):
        return Desired((), (), None)  # owner references do the rest
    accepted = accept(observed, settings)
    groups = groups_of(observed, settings.lost_seconds)
    wanted = accepted.wanted
    steps, revision = Steps(), ""
    if wanted is not None:
        revision = workers.revision_of(wanted)
        steps = next_steps(groups, _target(wanted, revision), observed.now)
    waiting = _waiting(observed)
    verdicts = observed.verdicts
    if verdicts is None:
        verdicts = place(observed.nodes, waiting, observed.now, settings.patience_seconds)
    children = _children(wanted, groups, steps, revision, observed) if wanted is not None else []
    taken = [f"{child.kind} {child.name}" for child in children if _is_anothers(observed, child)]
    situation = Situation(
        observed=observed,
        accepted=accepted,
        groups=tuple(groups),
        revision=revision,
        missing={name: verdict.missing for (space, name), verdict in verdicts.items() if space == observed.namespace},
        taken=tuple(taken),
    )
    status = status_of(situation)
    writes: list[Write] = [
        *_inspection(observed, accepted, settings),
        *(_applies(observed, wanted, children) if wanted is not None else []),
        *_fences(observed, groups),
        *(_orphans(groups, steps, revision) if wanted is not None else []),
        *_recalls(observed, verdicts, settings),
        *_pins(observed, verdicts),
        *(_mark_draining(group, observed.now) for group in steps.drain if not group.orphaned),
        *_removals(steps.delete),
        *(_prunes(observed, children) if wanted is not None else []),
        *events(situation, status),
    ]
    if status != (observed.resource.get("status") or {}):
        writes.append(SetStatus(status))
    again = [
        limit for limit in (_again(observed, steps, waiting, settings), wanted and wanted.scale.again_after) if limit
    ]
    return Desired(tuple(writes), tuple(_drains(groups, steps, accepted)), min(again, default=None))


def _waiting(observed: Observed) -> list[Gang]:
    """The groups whose placement matters here: this deployment's, and those before them."""
    if not any(pod.gated for pod in observed.pods):
        return []
    found = gangs([*observed.pods, *observed.others])
    mine = [position for position, gang in enumerate(found) if gang.is_of(observed.namespace, observed.name)]
    return found[: max(mine, default=-1) + 1]


def _target(wanted: Wanted, revision: str) -> Target:
    spec = wanted.deployment.spec
    return Target(
        replicas=wanted.replicas,
        revision=revision,
        max_surge=spec.rollout.max_surge,
        max_unavailable=spec.rollout.max_unavailable,
        drain_seconds=spec.rollout.drain_seconds,
        unready_seconds=wanted.settings.unready_seconds,
        patience_seconds=wanted.settings.patience_seconds,
    )


def _children(wanted: Wanted, groups: Sequence[Group], steps: Steps, revision: str, observed: Observed) -> list[Child]:
    """Everything wanted, in the order in which it is made: what pods refer to comes before the pods."""
    children = router.deployment_children(wanted.name)
    leaving = {group.name for group in (*steps.delete, *steps.drain)}
    for group in groups:
        children += workers.group_access(wanted.name, group.replica)
        if group.revision != revision or group.deleting:
            # It keeps what it was made with; a change would mix two revisions in one group.
            continue
        children.append(workers.group_config(wanted.name, group.replica, revision))
        if group.live and group.name not in leaving:
            gated = group.gated and not group.placed
            domain = None if gated else _domain(wanted, group, observed.nodes)
            children.append(workers.group_pods(wanted.name, group.replica, revision, gated=gated, domain=domain))
    for replica in steps.create:
        children += [
            *workers.group_access(wanted.name, replica),
            workers.group_config(wanted.name, replica, revision),
            workers.group_pods(wanted.name, replica, revision, gated=True),
        ]
    return children


def _domain(wanted: Wanted, group: Group, nodes: Sequence[Node]) -> tuple[str, str] | None:
    """Label and value of the nodes that a placed group stays on: taken once, when its gate goes, and kept."""
    placement = wanted.deployment.spec.placement
    if placement is None or group.stateful_set is None:
        return None
    kept = (group.stateful_set["metadata"].get("annotations") or {}).get(names.DOMAIN)
    if kept:
        key, _, value = kept.partition("=")
        return (key, value) if key == placement.topology_key else None
    if not group.gated:
        return None
    labels = {node.name: node.labels.get(placement.topology_key) for node in nodes}
    values = {labels.get(pod.node) for pod in group.pods}
    value = values.pop() if len(values) == 1 else None
    return (placement.topology_key, value) if value is not None else None


def _applies(observed: Observed, wanted: Wanted, children: Sequence[Child]) -> list[Write]:
    writes = (
        child.write(wanted, observed.find(child.kind, child.name))
        for child in children
        if not _is_anothers(observed, child)
    )
    return [write for write in writes if write is not None]


def _is_anothers(observed: Observed, child: Child) -> bool:
    """Whether somebody else's object has the name: it is left alone, and said so."""
    seen = observed.find(child.kind, child.name)
    return seen is not None and not observed.owns(seen)


def _inspection(observed: Observed, accepted: Accepted, settings: Settings) -> list[Write]:
    deployment = accepted.deployment
    if deployment is None:
        return []
    seen = [pod for pod in observed.pods if pod.labels.get(names.COMPONENT) == names.INSPECTOR]
    if outdated := [pod for pod in seen if stale(deployment, pod) and pod.deleting_since is None]:
        return [delete_pod(pod, "the model's source has changed") for pod in outdated]
    lost = lost_pods(seen, observed.nodes, observed.now, settings.lost_seconds)
    if lost:
        return [delete_pod(pod, f"its node {pod.node} is lost", 0) for pod in seen if pod.name in lost]
    # One that failed is tried again, for the source may only have been away.
    if failed := [pod for pod in seen if pod.phase == "Failed" and observed.now - pod.created >= _RETRY_SECONDS]:
        return [delete_pod(pod, "to look once more") for pod in failed if pod.deleting_since is None]
    if accepted.must_inspect and not seen:
        return [Apply(inspector_pod(deployment, observed.namespace, observed.uid, settings), new=True)]
    return []


def _fences(observed: Observed, groups: Sequence[Group]) -> list[Write]:
    """Pods on lost nodes go at once: nobody is there to end them, and their successors need their names. The engine's
    epochs see to it that what may still run there is refused by the group.
    """
    found = []
    for group in groups:
        for pod in group.pods:
            if pod.name in group.lost:
                found.append(delete_pod(pod, f"its node {pod.node} is lost", grace_seconds=0))
    return list(found)


def _orphans(groups: Sequence[Group], steps: Steps, revision: str) -> list[Write]:
    """Pods that no StatefulSet will adopt again, since their group is not to stay."""
    return [
        delete_pod(pod, "it belongs to nobody")
        for group in groups
        if group.orphaned and (group.revision != revision or group in steps.delete or group in steps.drain)
        for pod in group.pods
    ]


def _recalls(observed: Observed, verdicts: Verdicts, settings: Settings) -> list[Write]:
    """Pods that are to be made anew, gated: those that were pinned but found their place taken, and those that hold
    room which the rest of their group cannot complete. Their group has never run.
    """
    found: dict[str, Delete] = {}
    for pod in observed.pods:
        if _stranded(pod, observed.now, settings):
            found[pod.name] = delete_pod(pod, f"its place on {pod.pinned} was taken")
    for (space, _), verdict in verdicts.items():
        if space == observed.namespace:
            for pod in verdict.give_back:
                if pod.labels.get(names.DEPLOYMENT) == observed.name:
                    found[pod.name] = delete_pod(pod, f"its group cannot be completed: {verdict.missing}")
    return list(found.values())


def _stranded(pod: Pod, now: float, settings: Settings) -> bool:
    unbound = bool(pod.pinned) and not pod.gated and not pod.node and pod.deleting_since is None
    return unbound and now - pod.pinned_at >= settings.bind_seconds


def _pins(observed: Observed, verdicts: Verdicts) -> list[Write]:
    """Each gated pod of a group that fits gets its node and loses its gate, in one patch."""
    found: list[Write] = []
    mine = {pod.name: pod for pod in observed.pods if pod.gated}
    for (space, _), verdict in verdicts.items():
        for name, node in verdict.pins.items():
            pod = mine.get(name)
            if space != observed.namespace or pod is None:
                continue
            gates = [gate for gate in pod.raw["spec"]["schedulingGates"] if gate.get("name") != names.GATE]
            body = {
                "metadata": {"uid": pod.uid, "annotations": {names.PINNED_AT: timestamp(observed.now)}},
                "spec": {"nodeSelector": {names.HOSTNAME: node.hostname}, "schedulingGates": gates},
            }
            found.append(Patch("v1", "Pod", name, pod.uid, body))
    return found


def _mark_draining(group: Group, now: float) -> Patch:
    assert group.stateful_set is not None, "only live groups are drained"
    metadata = group.stateful_set["metadata"]
    body = {"metadata": {"uid": metadata["uid"], "annotations": {names.DRAINING: timestamp(now)}}}
    return Patch("apps/v1", "StatefulSet", group.name, metadata["uid"], body)


def _removals(groups: Iterable[Group]) -> list[Write]:
    return [
        delete_of(group.stateful_set, "nothing is on it any more")
        for group in groups
        if group.stateful_set is not None and not group.deleting
    ]


def _prunes(observed: Observed, children: Sequence[Child]) -> list[Write]:
    kept = {(child.kind, child.name) for child in children}
    return [
        delete_of(seen, "it is not wanted any more")
        for kind in _PRUNED
        for seen in observed.of_kind(kind)
        if (kind, seen["metadata"]["name"]) not in kept
        and not seen["metadata"].get("deletionTimestamp")
        and not _held(seen, observed)
    ]


def _held(seen: Any, observed: Observed) -> bool:
    """A launch file stays as long as a pod mounts it."""
    if seen["kind"] != "ConfigMap":
        return False
    labels = seen["metadata"].get("labels") or {}
    mine = (labels.get(names.GROUP), labels.get(names.REVISION))
    sets = [o["metadata"].get("labels") or {} for o in observed.of_kind("StatefulSet")]
    holders = [*(pod.labels for pod in observed.pods), *sets]
    return mine[0] is not None and any((h.get(names.GROUP), h.get(names.REVISION)) == mine for h in holders)


def _drains(groups: Sequence[Group], steps: Steps, accepted: Accepted) -> list[Drain]:
    """Leaders that are to be asked: all that are marked, since the mark may be all that got written."""
    seconds = accepted.deployment.spec.rollout.drain_seconds if accepted.deployment else 0
    marked = [*steps.drain, *(group for group in groups if group.draining_since is not None and not group.deleting)]
    return [
        Drain(group.leader.name, float(seconds))
        for group in marked
        if group not in steps.delete and group.leader is not None and group.leader.started and not group.idle
    ]


def _again(observed: Observed, steps: Steps, waiting: Sequence[Gang], settings: Settings) -> float | None:
    """The nearest time limit: drains, nodes about to count as lost, pins about to count as failed, patience."""
    limits = [] if steps.again_after is None else [steps.again_after]
    for node in observed.nodes:
        if node.lost_since is not None and any(pod.node == node.name for pod in observed.pods):
            limits.append(node.lost_since + settings.lost_seconds - observed.now)
    for pod in observed.pods:
        if pod.pinned and not pod.gated and not pod.node:
            limits.append(pod.pinned_at + settings.bind_seconds - observed.now)
    for gang in waiting:
        limits.append(gang.waiting_since + settings.patience_seconds - observed.now)
    ahead = [limit for limit in limits if limit > 0]
    return min(ahead, default=None)
