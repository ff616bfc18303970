"""What a load test found: percentiles, a table, JSON, a plot."""

from __future__ import annotations

import math
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from rich import box
from rich.table import Table

from arriero_cli.bench_load import Sample

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Spread:
    """Of times in seconds; None where nothing was measured."""

    p50: float | None
    p90: float | None
    p99: float | None
    mean: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        p50, p90, p99 = (percentile(ordered, percent) for percent in PERCENTILES)
        return cls(p50, p90, p99, sum(ordered) / len(ordered) if ordered else None)


@dataclass(frozen=True, slots=True)
class Level:
    """What one load level gave."""

    mode: str
    """concurrency or rate"""
    value: float
    requests: int
    failures: dict[str, int]
    """By status or kind."""
    seconds: float
    """From the first request's due time to the last one's end."""
    prompt_tokens: int
    output_tokens: int
    ttft: Spread
    """Time to the first piece of the answer, from the moment the request was due."""
    inter_token: Spread
    """Between one piece of an answer and the next."""
    latency: Spread
    """To the end of the answer, from the moment the request was due."""
    send_lag: Spread
    """How late the client itself sent: large values say that the client was the bottleneck."""

    @property
    def label(self) -> str:
        return f"{self.mode} {self.value:g}"

    @property
    def output_rate(self) -> float:
        """Output tokens per second."""
        return self.output_tokens / self.seconds

    @property
    def total_rate(self) -> float:
        """Prompt and output tokens per second."""
        return (self.prompt_tokens + self.output_tokens) / self.seconds

    @property
    def request_rate(self) -> float:
        """Whole answers per second."""
        return (self.requests - sum(self.failures.values())) / self.seconds


def summarize(mode: str, value: float, samples: Sequence[Sample]) -> Level:
    """At least one sample is needed."""
    good = [sample for sample in samples if not sample.failure]
    return Level(
        mode=mode,
        value=value,
        requests=len(samples),
        failures=dict(Counter(sample.failure for sample in samples if sample.failure).most_common()),
        seconds=max(sample.end for sample in samples) - min(sample.due for sample in samples),
        prompt_tokens=sum(sample.prompt_tokens for sample in good),
        output_tokens=sum(sample.output_tokens for sample in good),
        ttft=Spread.of([sample.ttft for sample in good]),
        inter_token=Spread.of([gap for sample in good for gap in sample.gaps]),
        latency=Spread.of([sample.latency for sample in good]),
        send_lag=Spread.of([sample.sent - sample.due for sample in samples]),
    )


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """Of sorted values, interpolated between neighbours; None of nothing."""
    if not ordered:
        return None
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def table(levels: Sequence[Level]) -> Table:
    """One row per level; times in milliseconds as p50 / p90 / p99."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption="times in ms: p50 / p90 / p99", caption_justify="left")
    for name in ("load", "ok", "failed", "output tok/s", "total tok/s", "req/s", "first token", "inter-token", "whole"):
        found.add_column(name, justify="left" if name == "load" else "right", no_wrap=True)
    for level in levels:
        failed = sum(level.failures.values())
        found.add_row(
            level.label,
            str(level.requests - failed),
            str(failed),
            f"{level.output_rate:,.1f}",
            f"{level.total_rate:,.1f}",
            f"{level.request_rate:,.2f}",
            *(_milliseconds(spread) for spread in (level.ttft, level.inter_token, level.latency)),
        )
    return found


def failure_lines(levels: Sequence[Level]) -> list[str]:
    return [
        f"{level.label}: {count} of {level.requests} failed: {kind}"
        for level in levels
        for kind, count in level.failures.items()
    ]


def as_json(level: Level) -> dict[str, object]:
    return {
        **asdict(level),
        "output_tokens_per_second": level.output_rate,
        "total_tokens_per_second": level.total_rate,
        "requests_per_second": level.request_rate,
    }


def environment() -> dict[str, object]:
    """The machine and the programs that the load came from."""
    return {
        "arriero": metadata.version("arriero"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
    }


def draw(levels: Sequence[Level], title: str, path: Path) -> None:
    """Throughput and latencies over the load, as a picture. Needs matplotlib. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    throughput, first, between = figure.subplots(1, 3)
    loads = [level.value for level in levels]
    throughput.plot(loads, [level.output_rate for level in levels], marker="o", label="output")
    throughput.plot(loads, [level.total_rate for level in levels], marker="o", label="prompt and output")
    throughput.set_title("tokens per second")
    for axes, name, spreads in (
        (first, "time to first token, ms", [level.ttft for level in levels]),
        (between, "between tokens, ms", [level.inter_token for level in levels]),
    ):
        for percent in PERCENTILES:
            values = [getattr(spread, f"p{percent}") for spread in spreads]
            axes.plot(loads, [math.nan if v is None else v * 1e3 for v in values], marker="o", label=f"p{percent}")
        axes.set_title(name)
    for axes in (throughput, first, between):
        axes.set_xlabel("requests at once" if levels[0].mode == "concurrency" else "requests per second")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _milliseconds(spread: Spread) -> str:
    values = (spread.p50, spread.p90, spread.p99)
    return "-" if spread.p50 is None else " / ".join(_figure(v * 1e3) for v in values if v is not None)


def _figure(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
