"""Which groups come and go next. Pure.

A group is made in one revision and keeps it: its pods, and their successors, all run the same. A new revision means new
groups beside or instead of the old ones, within maxSurge and maxUnavailable; the bounds are those of a Kubernetes
Deployment, but groups that are still leaving count as there, because they hold devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arriero_operator.groups import Group


@dataclass(frozen=True, slots=True)
class Target:
    """What a deployment is to come to."""

    replicas: int
    revision: str
    max_surge: int
    max_unavailable: int
    drain_seconds: float
    unready_seconds: float
    """How long a group of an old revision is not ready before it makes room for a waiting new one."""
    patience_seconds: float
    """How long a group that lost a pod waits for room for its successor before it starts over."""


@dataclass(frozen=True, slots=True)
class Steps:
    """What is to be done now."""

    create: tuple[int, ...] = ()
    """Replica numbers of new groups."""
    drain: tuple[Group, ...] = ()
    """Groups to be marked as leaving."""
    delete: tuple[Group, ...] = ()
    """Groups that may go now: nothing is on them, or their time to drain is over."""
    again_after: float | None = None
    """Seconds until a time limit ends; None: none runs."""


def next_steps(groups: Sequence[Group], target: Target, now: float) -> Steps:
    """One step towards the target; taken again and again, it gets there."""
    leaving = _leaving(groups, target, now)
    live = [group for group in groups if group.live and group not in leaving]
    chosen = _chosen(live, target, now)
    drain: list[Group] = []
    delete = [*leaving]
    for group in chosen:
        (delete if group.idle else drain).append(group)
    delete += [group for group in groups if _may_go(group, target, now)]
    ends = [
        max(0.0, group.draining_since + target.drain_seconds - now)
        for group in groups
        if group.draining_since is not None and not group.deleting and group not in delete
    ]
    ends += [max(0.0, target.patience_seconds - waited) for group in live if (waited := group.incomplete_for(now)) > 0]
    return Steps(
        create=_created(groups, live, target),
        drain=tuple(drain),
        delete=tuple(delete),
        again_after=min(ends, default=None),
    )


def _created(groups: Sequence[Group], live: Sequence[Group], target: Target) -> tuple[int, ...]:
    """The lowest numbers that nothing bears, as many as are wanted and allowed."""
    new = sum(group.revision == target.revision for group in live)
    count = min(target.replicas - new, target.replicas + target.max_surge - len(groups))
    used = {group.replica for group in groups}
    free = (number for number in range(len(groups) + max(0, count)) if number not in used)
    return tuple(number for number, _ in zip(free, range(count), strict=False))


def _leaving(groups: Sequence[Group], target: Target, now: float) -> list[Group]:
    """Groups that start over: each lost a pod whose successor finds no room. They serve nobody, and two of them could
    hold what the other lacks for ever; once both gave back, the first in order is placed as a whole.
    """
    return [
        group
        for group in groups
        if group.live and not group.ready and group.idle and group.incomplete_for(now) >= target.patience_seconds
    ]


def _chosen(live: Sequence[Group], target: Target, now: float) -> list[Group]:
    """Live groups that are to leave: not-ready ones first, then those with least on them, then the youngest."""
    old = [group for group in live if group.revision != target.revision]
    new = [group for group in live if group.revision == target.revision]
    floor = max(0, target.replicas - target.max_unavailable)
    ready = sum(group.ready for group in live)
    chosen: list[Group] = []

    surplus = len(new) - target.replicas if new else 0
    for group in sorted(new, key=_leaves_first)[: max(0, surplus)]:
        if not group.ready or ready > min(target.replicas, floor):
            chosen.append(group)
            ready -= group.ready
    if target.replicas == 0:
        return [*chosen, *old]

    # As many old groups as leave enough of them that are, or may yet become, ready.
    unready_new = sum(not group.ready for group in new if group not in chosen)
    budget = len(live) - len(chosen) - floor - unready_new
    homeless = any(not group.placed for group in new)
    for group in sorted(old, key=_leaves_first):
        if group.ready:
            if budget > 0 and ready > floor:
                chosen.append(group)
                ready, budget = ready - 1, budget - 1
        elif budget > 0 or (homeless and group.unready_for(now) >= target.unready_seconds):
            # A group that serves nobody and is to go anyway may hold just what the new ones wait for.
            chosen.append(group)
            budget -= 1
    return chosen


def _leaves_first(group: Group) -> tuple[bool, bool, int, int]:
    return group.ready, group.placed, group.load, -group.replica


def _may_go(group: Group, target: Target, now: float) -> bool:
    """Marked as leaving, and drained, or past its time."""
    since = group.draining_since
    if since is None or group.deleting:
        return False
    return group.idle or now - since >= target.drain_seconds
