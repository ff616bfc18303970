"""How many replicas the load asks for. Pure.

More at once, fewer only after fewer have been enough for a while: what is remembered for that stands in the status. The
load is what the engines run and have waiting, and what the routers hold, so that it also counts while no replica is
there at all. Where somebody who should tell is silent, nothing is taken away.
"""

from __future__ import annotations

from dataclasses import dataclass

from arriero_operator.observe import Object, Observed, seconds_of
from arriero_plan.resource import Spec


@dataclass(frozen=True, slots=True)
class Scale:
    """The number of replicas wanted, and what leads to the next one."""

    replicas: int
    lower: int | None = None
    """The most that was needed since fewer were enough; None: all are needed."""
    lower_since: float | None = None
    """Since when."""
    again_after: float | None = None
    """Seconds until `lower` is what is wanted."""


def scale_of(spec: Spec, observed: Observed) -> Scale:
    """Without autoscaling, what the spec says."""
    auto = spec.autoscaling
    if auto is None:
        return Scale(spec.replicas)
    old: Object = (observed.resource.get("status") or {}).get("autoscaling") or {}
    bounds = (auto.min_replicas, auto.max_replicas)
    now = _within(bounds, int(old.get("replicas", spec.replicas)))
    load = observed.held + sum(report.requests for report in observed.reports.values())
    needed = _within(bounds, -(-load // auto.target_running_per_replica))
    if needed > now:
        return Scale(needed)
    if needed == now or not observed.told:
        return Scale(now)
    since = seconds_of(old.get("lowerSince"))
    lower = min(now, max(needed, int(old.get("lower", 0)))) if since is not None else needed
    if since is None:
        since = observed.now
    left = since + auto.scale_down_seconds - observed.now
    if left <= 0:
        return Scale(lower)
    return Scale(now, lower, since, left) if lower < now else Scale(now)


def _within(bounds: tuple[int, int], replicas: int) -> int:
    least, most = bounds
    return min(max(replicas, least), most)
