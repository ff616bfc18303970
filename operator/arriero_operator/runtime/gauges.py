"""Each deployment's own figures, from the status that was written last."""

from __future__ import annotations

from typing import get_args

from prometheus_client import Gauge

from arriero_operator.observe import Object, Observed
from arriero_operator.resource_status import Phase
from arriero_operator.runtime import metrics
from arriero_operator.runtime.store import Key

_PHASES = get_args(Phase)


def show(observed: Observed, resource: Object | None) -> None:
    """Set the gauges of one deployment."""
    status = (resource or observed.resource).get("status") or {}
    labels = (observed.namespace, observed.name)
    ready, _, wanted = str(status.get("ready") or "0/0").partition("/")
    metrics.REPLICAS.labels(*labels).set(int(wanted or 0))
    metrics.READY.labels(*labels).set(int(ready))
    metrics.TOKENS.labels(*labels).set(status.get("tokensPerSecond") or 0)
    metrics.EPOCH.labels(*labels).set(max((g.get("epoch") or 0 for g in status.get("groups") or []), default=0))
    for phase in _PHASES:
        metrics.PHASE.labels(*labels, phase).set(phase == status.get("phase"))


def forget(key: Key) -> None:
    """The deployment is gone, and so are its series."""
    for gauge in (metrics.REPLICAS, metrics.READY, metrics.TOKENS, metrics.EPOCH):
        _remove(gauge, *key)
    for phase in _PHASES:
        _remove(metrics.PHASE, *key, phase)


def clear() -> None:
    """Who does not lead knows nothing of any deployment."""
    for gauge in (metrics.REPLICAS, metrics.READY, metrics.TOKENS, metrics.EPOCH, metrics.PHASE):
        gauge.clear()


def _remove(gauge: Gauge, *labels: str) -> None:
    try:
        gauge.remove(*labels)
    except KeyError:
        pass  # it never was shown
