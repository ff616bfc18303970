"""The status of a deployment, and the Events that its turns make. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from arriero_operator import names
from arriero_operator.conditions import conditions_of
from arriero_operator.group_status import download_of, phase_of, problem_of, progress_of, ranks_of
from arriero_operator.groups import Group
from arriero_operator.observe import Object, Observed, timestamp
from arriero_operator.resource_status import (
    AutoscalingStatus,
    DeploymentStatus,
    Endpoint,
    GroupStatus,
    Phase,
    PlanStatus,
)
from arriero_operator.situation import Situation
from arriero_operator.wanted import Wanted, digest
from arriero_operator.writes import Emit
from arriero_plan.plan import Plan

_LIMIT = 4096
_EVENT_LIMIT = 1000
_TOLD = ("Serving", "Recovering", "Draining", "Failed")
"""Turns of one group that are worth an Event; the others show in that of the deployment."""
_WARNINGS = ("Invalid", "Degraded")


def status_of(situation: Situation) -> dict[str, Any]:
    """The whole status, as the API keeps it."""
    observed, accepted = situation.observed, situation.accepted
    old = observed.resource.get("status") or {}
    groups = [_group_status(group, situation, old) for group in situation.groups]
    ready = sum(group.ready for group in situation.groups)
    phase, message = _phase(situation, groups, ready)
    selector = names.selector(observed.name, names.WORKER)
    rates = [group.report.tokens_per_second for group in situation.groups if group.report]
    status = DeploymentStatus(
        observed_generation=int(observed.resource["metadata"].get("generation") or 0),
        phase=phase,
        phase_since=_since(old, "phase", "phaseSince", phase, observed.now),
        message=message[:_LIMIT] or None,
        conditions=conditions_of(situation, groups, ready),
        plan=_plan_status(accepted.plan) if accepted.plan else None,
        replicas=sum(not group.deleting for group in situation.groups),
        ready_replicas=ready,
        updated_replicas=sum(group.live and group.revision == situation.revision for group in situation.groups),
        ready=f"{ready}/{situation.replicas}",
        autoscaling=_autoscaling(accepted.wanted) if accepted.wanted else None,
        revision=situation.revision or None,
        selector=",".join(f"{key}={value}" for key, value in selector.items()),
        endpoint=_endpoint(observed) if accepted.wanted else None,
        tokens_per_second=_two_digits(sum(rates)) if rates else None,
        groups=groups,
    )
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)


def _group_status(group: Group, situation: Situation, old: Object) -> GroupStatus:
    problem = problem_of(group)
    phase = phase_of(group, problem)
    before: Object = next((entry for entry in old.get("groups") or [] if entry.get("name") == group.name), {})
    message = problem or (situation.missing.get(group.name, "") if phase == "Waiting" else progress_of(group))
    if phase in ("Serving", "Leaving"):
        message = ""
    return GroupStatus(
        name=group.name,
        revision=group.revision,
        phase=phase,
        since=_since(before, "phase", "since", phase, situation.observed.now),
        message=message[:_LIMIT] or None,
        epoch=group.report.epoch if group.report else 0,
        download=download_of(group),
        ranks=ranks_of(group),
    )


def _since(before: Object, field: str, since: str, value: str, now: float) -> str:
    return str(before[since]) if before.get(field) == value and before.get(since) else timestamp(now)


def _phase(situation: Situation, groups: Sequence[GroupStatus], ready: int) -> tuple[Phase, str]:
    """In one word and one sentence. What keeps it from being Ready comes first."""
    accepted = situation.accepted
    if accepted.problems:
        return "Invalid", "; ".join(accepted.problems)
    if accepted.unplanned:
        return "Invalid", accepted.unplanned
    if accepted.wanted is None:
        return "Planning", accepted.waiting
    if situation.replicas == 0:
        leaving = f"{len(groups)} still leaving" if groups else ""
        return "Idle", leaving
    if situation.taken:
        return "Degraded", f"{situation.taken[0]} exists and belongs to somebody else: delete or rename it"
    if situation.refused:
        return "Degraded", situation.refused
    if ready == situation.replicas and situation.stable:
        return ("Progressing", situation.router_down) if situation.router_down else ("Ready", "")
    told = next((f"{group.name}: {group.message}" for group in groups if group.message), "")
    phases = {group.phase for group in groups}
    if "Failed" in phases or "Recovering" in phases:
        failing = [g for g in groups if g.phase in ("Failed", "Recovering")]
        return "Degraded", next((f"{g.name}: {g.message}" for g in failing if g.message), f"{failing[0].name} recovers")
    if any(group.revision != situation.revision and group.live for group in situation.groups):
        return "Updating", told
    if ready:
        return "Progressing", told
    return ("Waiting" if not groups or "Waiting" in phases else "Loading"), told


def _plan_status(plan: Plan) -> PlanStatus:
    return PlanStatus(
        layout=f"TP{plan.layout.tensor}xPP{plan.layout.pipeline}",
        tensor=plan.layout.tensor,
        pipeline=plan.layout.pipeline,
        pods_per_group=plan.pods_per_group,
        devices_per_pod=plan.ranks_per_pod,
        bytes_per_device=max(stage.total_bytes for stage in plan.stages),
        device_bytes=plan.device_bytes,
        weights=plan.weights,
        max_context=plan.max_context,
        kv_tokens=plan.kv_tokens,
    )


def _autoscaling(wanted: Wanted) -> AutoscalingStatus | None:
    if wanted.deployment.spec.autoscaling is None:
        return None
    scale = wanted.scale
    since = timestamp(scale.lower_since) if scale.lower_since is not None else None
    return AutoscalingStatus(replicas=scale.replicas, lower=scale.lower, lower_since=since)


def _endpoint(observed: Observed) -> Endpoint:
    host = f"{names.router_name(observed.name)}.{observed.namespace}.svc"
    return Endpoint(http=f"http://{host}:8000", grpc=f"{host}:9000")


def _two_digits(rate: float) -> int:
    """So that a steady rate is no reason to write."""
    whole = round(rate)
    return round(whole, 2 - len(str(whole))) if whole >= 100 else whole


def events(situation: Situation, status: Mapping[str, Any]) -> list[Emit]:
    """One Event for each turn of a phase, named by the turn: emitted again after a crash it is the same one."""
    old = situation.observed.resource.get("status") or {}
    return list(_events(situation, old, status))


def _events(situation: Situation, old: Object, new: Mapping[str, Any]) -> Iterator[Emit]:
    if old.get("phase") != new["phase"]:
        yield _event(situation, "", old, "phaseSince", new["phase"], new.get("message") or "")
    before = {entry.get("name"): entry for entry in old.get("groups") or []}
    for group in new["groups"]:
        was = before.get(group["name"]) or {}
        if was.get("phase") != group["phase"] and group["phase"] in _TOLD:
            yield _event(situation, group["name"], was, "since", group["phase"], group.get("message") or "")


def _event(situation: Situation, group: str, old: Object, since: str, phase: str, message: str) -> Emit:
    observed = situation.observed
    identity = digest([observed.uid, group, old.get("phase"), old.get(since), phase])
    begun = f"{group}: " if group else ""
    was = f" (was {old['phase']})" if old.get("phase") else ""
    return Emit(
        name=f"{observed.name}.{identity}",
        type="Warning" if phase in (*_WARNINGS, "Failed", "Recovering") else "Normal",
        reason=f"Group{phase}" if group else phase,
        message=f"{begun}{phase}{was}{f': {message}' if message else ''}"[:_EVENT_LIMIT],
    )
