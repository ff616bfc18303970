"""Metrics of one router process, and of all of its siblings put together.

Times in seconds, sizes in tokens or bytes, as the names say. docs/metrics.md lists them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from arriero_router.core.replay import Break

if TYPE_CHECKING:
    from arriero_router.core.dispatch import Dispatcher, Grant

disable_created_metrics()  # type: ignore[no-untyped-call]  # twice the lines, for what process_start_time says once

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SMALL = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
_WAITS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_LATENCY = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SAME_EVERYWHERE = ("arriero_router_replica_ready", "arriero_router_info")
"""Gauges that siblings do not share out: all see the same thing, so the highest is told, not the sum."""


class Metrics:
    """Of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = _Requests()
        self.registry.register(self._requests)
        self._models = _Models()
        self.registry.register(self._models)

    def request(self, face: str, model: str, status: int | str) -> None:
        key = (face, model, status)
        counts = self._requests.counts
        counts[key] = counts.get(key, 0) + 1

    def model(self, name: str, dispatcher: Dispatcher) -> ModelMetrics:
        """Those of one served model, in place of an earlier one of that name."""
        metrics = ModelMetrics(name, dispatcher)
        self._models.of[name] = metrics
        return metrics

    def forget(self, model: ModelMetrics) -> None:
        if self._models.of.get(model.name) is model:
            del self._models.of[model.name]

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Requests(Collector):
    """By face, model and status."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str, int | str], int] = {}

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(
            "arriero_router_requests", "Requests answered.", labels=("face", "model", "status")
        )
        for (face, model, status), count in self.counts.items():
            family.add_metric((face, model, str(status)), count)
        yield family


class _Models(Collector):
    """All models' families, each once."""

    def __init__(self) -> None:
        self.of: dict[str, ModelMetrics] = {}

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for model in self.of.values():
            for family in model.collect():
                kept = families.setdefault(family.name, family)
                if kept is not family:
                    kept.samples += family.samples
        return families.values()


class ModelMetrics:
    """Plain counts, put into families when asked."""

    def __init__(self, name: str, dispatcher: Dispatcher) -> None:
        self.first = Buckets(_LATENCY)
        self.added = Buckets(_SMALL)
        self.held = Buckets(_WAITS)
        self.replays = 0
        self.prompt_marks = 0
        self.matched_marks = 0
        self.cached_tokens = 0
        self.index_size: Callable[[], int] = lambda: 0
        self.name = name
        self._dispatcher = dispatcher
        self._picks: dict[tuple[str, str], int] = {}
        self._breaks: dict[Break, int] = {}

    def picked(self, grant: Grant) -> None:
        key = (grant.replica.name, grant.reason)
        self._picks[key] = self._picks.get(key, 0) + 1
        self.prompt_marks += len(grant.ask.marks)
        self.matched_marks += grant.matched

    def broke(self, kind: Break) -> None:
        self._breaks[kind] = self._breaks.get(kind, 0) + 1

    def collect(self) -> Iterator[Metric]:
        name, pool = self.name, self._dispatcher.pool

        def gauge(metric: str, text: str, rows: Iterable[tuple[tuple[str, ...], float]], *labels: str) -> Metric:
            family = GaugeMetricFamily(f"arriero_router_{metric}", text, labels=("model", *labels))
            for values, value in rows:
                family.add_metric((name, *values), value)
            return family

        def counter(metric: str, text: str, rows: Iterable[tuple[tuple[str, ...], float]], *labels: str) -> Metric:
            family = CounterMetricFamily(f"arriero_router_{metric}", text, labels=("model", *labels))
            for values, value in rows:
                family.add_metric((name, *values), value)
            return family

        replicas = pool.replicas
        yield gauge(
            "replica_in_flight",
            "Requests of the router on a replica.",
            [((replica.name,), replica.in_flight) for replica in replicas],
            "replica",
        )
        yield gauge(
            "replica_pending_bytes",
            "Bytes of prompt on their way to a first token, beyond what the replica's cache held.",
            [((replica.name,), replica.pending) for replica in replicas],
            "replica",
        )
        yield gauge(
            "replica_ready",
            "1 if a replica takes new requests.",
            [((replica.name,), float(replica.eligible)) for replica in replicas],
            "replica",
        )
        yield gauge("held", "Requests waiting for a replica.", [((), self._dispatcher.held)])
        yield gauge("prefix_index_marks", "Chunks of prompts in the prefix index.", [((), self.index_size())])
        yield counter(
            "picks", "Requests sent to a replica, by what decided.", sorted(self._picks.items()), "replica", "reason"
        )
        yield counter("ejections", "Replicas left out because they kept failing.", [((), pool.ejections)])
        yield counter("replays", "Requests taken over by another replica.", [((), self.replays)])
        yield counter(
            "broken_attempts",
            "Attempts that ended without a whole answer.",
            [((kind.value,), count) for kind, count in sorted(self._breaks.items(), key=lambda item: item[0].value)],
            "reason",
        )
        yield counter("prompt_chunks", "Chunks of prompts sent.", [((), self.prompt_marks)])
        yield counter(
            "prompt_chunks_matched", "Of these, in the replica's cache by the index.", [((), self.matched_marks)]
        )
        yield counter(
            "cached_prompt_tokens", "Prompt tokens that replicas found in their cache.", [((), self.cached_tokens)]
        )
        yield self.first.family(
            "arriero_router_time_to_first_token_seconds",
            "From the whole request to the first byte of its answer, holding included.",
            name,
        )
        yield self.added.family(
            "arriero_router_added_latency_seconds",
            "From the whole request to its way to a replica, holding aside.",
            name,
        )
        yield self.held.family("arriero_router_hold_seconds", "Waits of held requests.", name)


class Buckets:
    """A histogram without labels and locks: every request passes here twice."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, text: str, model: str) -> Metric:
        family = Metric(name, text, "histogram")
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            family.add_sample(f"{name}_bucket", {"model": model, "le": bound}, total)
        family.add_sample(f"{name}_count", {"model": model}, total)
        family.add_sample(f"{name}_sum", {"model": model}, self._sum)
        return family


def merged(texts: Iterable[str]) -> bytes:
    """The metrics of several processes as those of one: sums, but for what all of them see alike."""
    families: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            kept = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            rows = values.setdefault(kept.name, {})
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                if family.name in _SAME_EVERYWHERE:
                    rows[key] = max(rows.get(key, sample.value), sample.value)
                else:
                    rows[key] = rows.get(key, 0.0) + sample.value
    for name, family in families.items():
        for (sample_name, labels), value in values[name].items():
            family.add_sample(sample_name, dict(labels), value)

    class _All(Collector):
        def collect(self) -> Iterable[Metric]:
            return families.values()

    registry = CollectorRegistry()
    registry.register(_All())
    return generate_latest(registry)
