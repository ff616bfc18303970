"""What /metrics shows, in Prometheus' text format. The names are documented in docs/metrics.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from arriero_worker.engine.messages import EngineStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_INTER_TOKEN = (0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_END_TO_END = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)


class Metrics:
    """Counts what the faces see; what the engine counts is taken from its status when asked for."""

    def __init__(
        self,
        model: str,
        latest: Callable[[], EngineStatus | None],
        connected: Callable[[], bool],
        ready: Callable[[], bool],
    ) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        labels = ("model",)
        self._requests = Counter(
            "arriero_requests",
            "Requests answered, by face, method or route, and status.",
            ("model", "face", "route", "status"),
            registry=self.registry,
        )
        self._answers = Counter(
            "arriero_answers",
            "Sequences ended, by why.",
            ("model", "finish_reason"),
            registry=self.registry,
        )
        self.first_token = Histogram(
            "arriero_time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            labels,
            buckets=_FIRST_TOKEN,
            registry=self.registry,
        ).labels(model)
        self.inter_token = Histogram(
            "arriero_inter_token_seconds",
            "Between two tokens of one sequence.",
            labels,
            buckets=_INTER_TOKEN,
            registry=self.registry,
        ).labels(model)
        self.end_to_end = Histogram(
            "arriero_request_duration_seconds",
            "From the arrival of a request to its last token.",
            labels,
            buckets=_END_TO_END,
            registry=self.registry,
        ).labels(model)
        self._model = model
        self.registry.register(_EngineCollector(model, latest, connected, ready))
        ProcessCollector(registry=self.registry)

    def request(self, face: str, route: str, status: str) -> None:
        self._requests.labels(self._model, face, route, status).inc()

    def answer(self, finish_reason: str) -> None:
        self._answers.labels(self._model, finish_reason).inc()

    def watch_http(self, connections: Callable[[], int], held: Callable[[], int]) -> None:
        """Show the HTTP server's own numbers."""
        gauge = Gauge("arriero_http_connections", "Open HTTP connections.", ("model",), registry=self.registry)
        gauge.labels(self._model).set_function(lambda: float(connections()))
        gauge = Gauge("arriero_http_held_bytes", "Bytes of unanswered requests.", ("model",), registry=self.registry)
        gauge.labels(self._model).set_function(lambda: float(held()))

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """The engine's own numbers. Gauges fall to 0 while it is away; counters keep their last value."""

    def __init__(
        self,
        model: str,
        latest: Callable[[], EngineStatus | None],
        connected: Callable[[], bool],
        ready: Callable[[], bool],
    ) -> None:
        self._model = model
        self._latest = latest
        self._connected = connected
        self._ready = ready

    def collect(self) -> Iterator[Metric]:
        connected = self._connected()
        status = self._latest()
        live = status if connected else None

        def gauge(name: str, text: str, value: float) -> Metric:
            family = GaugeMetricFamily(f"arriero_{name}", text, labels=("model",))
            family.add_metric((self._model,), value)
            return family

        def counter(name: str, text: str, value: float) -> Metric:
            family = CounterMetricFamily(f"arriero_{name}", text, labels=("model",))
            family.add_metric((self._model,), value)
            return family

        blocks = live.kv_blocks if live else 0
        used = live.kv_blocks_used if live else 0
        yield gauge("engine_connected", "1 while the engine process is there.", float(connected))
        yield gauge("ready", "1 while new requests are taken.", float(self._ready()))
        yield gauge("epoch", "The group's membership number.", live.epoch if live else 0)
        yield gauge("requests_running", "Sequences with a place in the running batch.", live.running if live else 0)
        yield gauge("requests_waiting", "Sequences waiting for one.", live.waiting if live else 0)
        yield gauge("kv_blocks", "KV cache blocks there are.", blocks)
        yield gauge("kv_blocks_used", "KV cache blocks held by running sequences.", used)
        yield gauge("kv_usage_ratio", "The share of KV cache blocks in use, 0 to 1.", used / blocks if blocks else 0.0)
        if status is None:
            return
        yield counter("prompt_tokens", "Prompt tokens of requests, cached ones included.", status.prompt_tokens)
        yield counter("generated_tokens", "Tokens sampled.", status.generated_tokens)
        yield counter("cached_tokens", "Prompt tokens found in the prefix cache.", status.cached_tokens)
        yield counter("preemptions", "Sequences put back to waiting for want of KV blocks.", status.preemptions)
        yield counter("steps", "Forward passes.", status.steps)
        yield counter("recoveries", "Times the group formed again after losing a rank.", status.recoveries)
        memory = GaugeMetricFamily("arriero_rank_memory_bytes", "Memory of a rank.", labels=("model", "rank"))
        loaded = GaugeMetricFamily("arriero_rank_loaded_ratio", "Share of weights loaded.", labels=("model", "rank"))
        for rank in live.ranks if live else ():
            memory.add_metric((self._model, str(rank.rank)), rank.memory_bytes)
            share = rank.bytes_loaded / rank.bytes_total if rank.bytes_total else 0.0
            loaded.add_metric((self._model, str(rank.rank)), share)
        yield memory
        yield loaded
