"""The conditions of a deployment. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from arriero_operator.observe import Object, timestamp
from arriero_operator.resource_status import Condition, GroupStatus
from arriero_operator.situation import Situation

_LOADED = ("Joining", "Serving", "Recovering", "Draining")
_TOLD = ("Downloading", "Loading", "Failed")
"""Phases that say themselves how far the model is, or why it is not."""
_LIMIT = 32768


class _Said(NamedTuple):
    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str


def conditions_of(situation: Situation, groups: Sequence[GroupStatus], ready: int) -> list[Condition]:
    """All of them, in the order in which they come true; each keeps the time of its last turn."""
    observed = situation.observed
    old = {entry.get("type"): entry for entry in (observed.resource.get("status") or {}).get("conditions") or []}
    generation = int(observed.resource["metadata"].get("generation") or 0)
    staying = [group for group in groups if group.phase not in ("Draining", "Leaving")]
    said = (
        _accepted(situation),
        _planned(situation),
        _scheduled(situation, staying),
        _loaded(situation, staying),
        _available(situation, ready),
        _progressing(situation, groups, ready),
        _degraded(situation, staying),
    )
    return [
        Condition(
            type=each.type,
            status=each.status,
            reason=each.reason,
            message=each.message[:_LIMIT],
            last_transition_time=_turned(old.get(each.type), each.status, observed.now),
            observed_generation=generation,
        )
        for each in said
    ]


def _turned(old: Object | None, status: str, now: float) -> str:
    if old and old.get("status") == status and old.get("lastTransitionTime"):
        return str(old["lastTransitionTime"])
    return timestamp(now)


def _accepted(situation: Situation) -> _Said:
    problems = situation.accepted.problems
    if problems:
        return _Said("Accepted", "False", "InvalidSpec", "; ".join(problems))
    return _Said("Accepted", "True", "Valid", "the spec is valid")


def _planned(situation: Situation) -> _Said:
    accepted = situation.accepted
    if accepted.problems:
        return _Said("Planned", "False", "InvalidSpec", "the spec is not valid")
    if accepted.unplanned:
        return _Said("Planned", "False", accepted.reason, accepted.unplanned)
    plan = accepted.plan
    if plan is None:
        return _Said("Planned", "Unknown", accepted.reason, accepted.waiting)
    needs = max(stage.total_bytes for stage in plan.stages) / 2**30
    has = f" of {plan.device_bytes / 2**30:.1f}" if plan.device_bytes else ""
    pods = "1 pod" if plan.pods_per_group == 1 else f"{plan.pods_per_group} pods"
    return _Said(
        "Planned",
        "True",
        "Fits",
        f"tensor {plan.layout.tensor} x pipeline {plan.layout.pipeline} in {pods} per replica, "
        f"{needs:.1f}{has} GiB on the fullest device, KV for {plan.kv_tokens} tokens",
    )


def _scheduled(situation: Situation, groups: Sequence[GroupStatus]) -> _Said:
    if blocked := _not_yet(situation, "Scheduled", groups):
        return blocked
    for group in groups:
        if lack := situation.missing.get(group.name):
            return _Said("Scheduled", "False", "NotEnoughRoom", f"{group.name} {lack}{_hint(situation)}")
    waiting = [group.name for group in groups if group.phase == "Waiting"]
    if waiting:
        return _Said("Scheduled", "False", "Placing", f"{_names(waiting)} get their nodes")
    unplaced = [g.name for g in situation.groups if g.live and not g.placed]
    if unplaced:
        return _Said("Scheduled", "False", "Replacing", f"pods of {_names(unplaced)} are being made anew")
    return _Said("Scheduled", "True", "Placed", "every pod has its node")


def _hint(situation: Situation) -> str:
    """What helps an update that has no room beside what serves."""
    old = any(group.live and group.revision != situation.revision for group in situation.groups)
    wanted = situation.accepted.wanted
    if not old or wanted is None or wanted.deployment.spec.rollout.max_unavailable:
        return ""
    return "; an update finds room in place of an old group with rollout: {maxSurge: 0, maxUnavailable: 1}"


def _loaded(situation: Situation, groups: Sequence[GroupStatus]) -> _Said:
    if blocked := _not_yet(situation, "ModelLoaded", groups):
        return blocked
    loading = [group for group in groups if group.phase not in _LOADED]
    if loading:
        group = loading[0]
        told = group.message if group.message and group.phase in _TOLD else f"is {group.phase.lower()}"
        reason = group.phase if group.phase in _TOLD else "Loading"
        return _Said("ModelLoaded", "False", reason, f"{group.name}: {told}")
    return _Said("ModelLoaded", "True", "Loaded", "every rank has its weights")


def _available(situation: Situation, ready: int) -> _Said:
    wanted = situation.accepted.wanted
    count = f"{ready} of {situation.replicas} replicas answer requests"
    if wanted is not None and situation.replicas == 0:
        return _Said("Available", "False", "ScaledToZero", "no replica is wanted")
    allowed = wanted.deployment.spec.rollout.max_unavailable if wanted else 0
    if ready and ready >= situation.replicas - allowed:
        if situation.router_down:
            return _Said("Available", "False", "RouterUnavailable", f"{count}, but {situation.router_down}")
        return _Said("Available", "True", "EnoughReplicas", count if wanted else f"{ready} replicas answer requests")
    return _Said("Available", "False", "TooFewReplicas", count)


def _progressing(situation: Situation, groups: Sequence[GroupStatus], ready: int) -> _Said:
    if situation.accepted.wanted is None:
        reason = "Planning" if situation.accepted.waiting else "Refused"
        return _Said("Progressing", "True" if situation.accepted.waiting else "False", reason, "there is no plan yet")
    if situation.stable and ready == situation.replicas:
        return _Said("Progressing", "False", "Complete", "there is what is wanted")
    old = sum(group.revision != situation.revision for group in situation.groups)
    if old:
        return _Said("Progressing", "True", "Updating", f"{old} of {len(groups)} groups are of an old revision")
    return _Said("Progressing", "True", "Converging", f"{ready} of {situation.replicas} replicas are ready")


def _degraded(situation: Situation, groups: Sequence[GroupStatus]) -> _Said:
    if situation.accepted.problems or situation.accepted.unplanned:
        return _Said("Degraded", "True", "Refused", "what is wanted cannot be made; what there was is kept")
    if situation.taken:
        taken = ", ".join(situation.taken)
        return _Said(
            "Degraded", "True", "NameTaken", f"{taken}: exists and belongs to somebody else; delete or rename it"
        )
    if situation.refused:
        return _Said("Degraded", "True", "ApiRefused", situation.refused)
    for group in groups:
        if group.phase in ("Failed", "Recovering"):
            reason = "GroupFailed" if group.phase == "Failed" else "GroupRecovering"
            return _Said("Degraded", "True", reason, f"{group.name}: {group.message or 'forms again'}")
    return _Said("Degraded", "False", "AsExpected", "nothing is wrong")


def _not_yet(situation: Situation, kind: str, groups: Sequence[GroupStatus]) -> _Said | None:
    if not groups and situation.accepted.wanted is None:
        return _Said(kind, "Unknown", "NotPlanned", "there is no plan yet")
    if not groups and situation.replicas == 0:
        return _Said(kind, "Unknown", "ScaledToZero", "no replica is wanted")
    if not groups:
        return _Said(kind, "False", "Creating", "the groups are being made")
    return None


def _names(words: Sequence[str]) -> str:
    return " and ".join(words) if len(words) < 4 else f"{words[0]} and {len(words) - 1} others"
