"""How long a launch takes on the device: replays of a CUDA graph, over inputs that the cache cannot hold."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from benchmarks.gpu.case import Case, Outputs, Work

from arriero_kernels.tuning import Tuning

_MAX_SETS = 64
_CACHES = 3
"""So many times the L2 cache, the sets of inputs are larger than it."""
_SPAN = 20e-6
"""Least time of one replay, so that its own launch is hidden."""


@dataclass(frozen=True, slots=True)
class Timing:
    seconds: float
    """Of one launch, the median over replays."""
    spread: float
    """(9th decile - 1st decile) / median."""
    replays: int


@dataclass(frozen=True, slots=True)
class Measured:
    op: str
    name: str
    bytes: int
    flops: int
    unit: str
    sets: int
    """Sets of inputs taken in turn."""
    cold: bool
    """Whether the sets together exceed the L2 cache, so that inputs come from memory."""
    ours: Timing
    twin: Timing | None
    error: float | None
    """|ours - twin| / |twin| of the first outputs, which proves nothing but that both compute the same thing."""


def events_seconds(call: Callable[[], object], times: int) -> float:
    """Median seconds of a call that takes long against its launch, after three that are not counted."""
    for _ in range(3):
        call()
    return statistics.median(_timed(call) for _ in range(times))


def draw(case: Case, device: torch.device, l2_bytes: int, tuning: Tuning | None) -> list[Work]:
    """Sets of a case's inputs, so many that the cache cannot hold them, for launches with the tuning."""
    works = [case.make(device, tuning)]
    wanted = min(_MAX_SETS, -(-_CACHES * l2_bytes // max(1, works[0].bytes)))
    return works + [case.make(device, tuning) for _ in range(wanted - 1)]


def measure(case: Case, l2_bytes: int, budget: float) -> Measured:
    """Time a case and its twin, `budget` seconds each. Raises what the launches raise."""
    device = torch.device("cuda")
    works = draw(case, device, l2_bytes, None)
    first = works[0]
    error = None if first.twin is None else first_difference(first.call(), first.twin())
    ours = time_graph([work.call for work in works], budget)
    twins = [work.twin for work in works if work.twin is not None]
    twin = time_graph(twins, budget) if twins else None
    cold = first.bytes * len(works) > 2 * l2_bytes
    measured = Measured(case.op, case.name, first.bytes, first.flops, first.unit, len(works), cold, ours, twin, error)
    del works, first, twins
    gc.collect()
    torch.cuda.empty_cache()
    return measured


def time_graph(calls: Sequence[Callable[[], object]], budget: float) -> Timing:
    """Seconds of one call, from at least 10 replays of a graph that makes all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    rounds = 1
    while True:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        graph.replay()
        once = min(_timed(graph.replay) for _ in range(3))
        if once >= 10 * _SPAN or rounds >= 64:
            break
        rounds *= 4
    replays = max(10, min(2000, int(budget / once)))
    times = sorted(_timed(graph.replay) / (len(calls) * rounds) for _ in range(replays))
    middle = statistics.median(times)
    return Timing(middle, (times[int(replays * 0.9)] - times[int(replays * 0.1)]) / middle, replays)


def _timed(call: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def first_difference(ours: Outputs, theirs: Outputs) -> float:
    """|ours - theirs| / |theirs| of the first tensors."""
    a, b = (x if isinstance(x, torch.Tensor) else x[0] for x in (ours, theirs))
    return float(((a.double() - b.double()).norm() / b.double().norm()).item())
