"""Microseconds of Python that the scheduler spends per decode step: `schedule` + `commit`, with a stub for the model.

    python benchmarks/scheduler.py [--json FILE] [--steps N] [--running N ...] [--pipeline P ...]

Two scenes, both with the prefix cache on, KV blocks of 16 tokens, and step n + 1 scheduled before step n is committed:

- `decode`: N sequences of mixed length decode and none ends. One step in 16 of each sequence takes a new block and
publishes the full one. This is the figure that others' schedulers were measured by. - `serving`: N sequences run,
each ends after 64 to 192 tokens by its stop token or its limit, and another takes its place: queueing, look-up in a
cache that evicts, admission, a prefill chunk, first token. Every step counts.

The stub hands out tokens drawn beforehand; making them and the requests is not timed. Figures are the median, the
minimum and the 99th percentile over all steps; on a shared machine the minimum is the steadier one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

from arriero_worker.engine.messages import EngineRequest, SamplingParams
from arriero_worker.engine.scheduler import Scheduler, SchedulerSettings
from arriero_worker.engine.step import StepPlan, StepResult

VOCABULARY = 128_256
STOP = 128_009
TARGETS_US = {256: 150.0, 1024: 600.0}
"""What a decode step may cost with so many running sequences, one stage."""
PEERS_US = {
    "nano-vllm": {256: 188, 1024: 904},
    "mini-sglang": {256: 1221, 1024: 5734},
    "vLLM": {256: 2953, 1024: 13661},
}
"""Measured once, on a similar machine: schedule + commit of a decode step (vLLM 0.33, prefix cache on)."""


@dataclass(frozen=True)
class Figure:
    scene: str
    running: int
    pipeline: int
    steps: int
    median_us: float
    minimum_us: float
    p99_us: float
    tokens_per_step: float
    preemptions: int


class Bench:
    """One scheduler, its stub model, and the stopwatch around both of its calls."""

    def __init__(self, running: int, pipeline: int, blocks: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.scheduler = Scheduler(
            SchedulerSettings(
                block_size=16,
                kv_blocks=blocks,
                max_context=131_072,
                max_running=running,
                max_waiting=2 * running,
                max_batch_tokens=max(8192, running),
                pipeline=pipeline,
                vocab_size=VOCABULARY,
            ),
            time.monotonic,
        )
        self.requests = 0
        self.in_flight: deque[StepPlan] = deque()
        self.pool = [self.random.randrange(VOCABULARY - 1000) for _ in range(1 << 16)]
        self.prefixes = [self.pool[i * 64 : i * 64 + 64] for i in range(8)]

    def submit(self, max_tokens: int) -> None:
        prompt = self.random.choice(self.prefixes) + self.random.choices(self.pool, k=self.random.randint(16, 448))
        sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=(128_001, 128_008, STOP))
        refusal = self.scheduler.submit(EngineRequest(id=self.requests, prompt=prompt, sampling=sampling))
        assert refusal is None, refusal
        self.requests += 1

    def sample(self, plan: StepPlan, stop_chance: float) -> StepResult:
        count = sum(chunk.sample for chunk in plan.chunks) + len(plan.decodes) // 4
        start = self.random.randrange(len(self.pool) - count)
        tokens = self.pool[start : start + count]
        stops = int(count * stop_chance + self.random.random()) if stop_chance else 0
        for _ in range(stops):
            tokens[self.random.randrange(count)] = STOP
        return StepResult(plan.step, tokens)

    def step(self, stop_chance: float = 0.0) -> tuple[float, int]:
        """Schedule until nothing more may be in flight, commit the oldest: (microseconds of both, finished)."""
        begin = time.perf_counter_ns()
        while (plan := self.scheduler.schedule()) is not None:
            self.in_flight.append(plan)
        spent = time.perf_counter_ns() - begin
        result = self.sample(self.in_flight.popleft(), stop_chance)
        begin = time.perf_counter_ns()
        outputs = self.scheduler.commit(result)
        spent += time.perf_counter_ns() - begin
        return spent / 1000, len(outputs.finished)

    def figure(self, scene: str, times: list[float], tokens: int) -> Figure:
        return Figure(
            scene=scene,
            running=self.scheduler.settings.max_running,
            pipeline=self.scheduler.settings.pipeline,
            steps=len(times),
            median_us=round(statistics.median(times), 1),
            minimum_us=round(min(times), 1),
            p99_us=round(statistics.quantiles(times, n=100)[98], 1),
            tokens_per_step=round(tokens / len(times), 1),
            preemptions=self.scheduler.stats.preemptions,
        )


def decode(running: int, pipeline: int, steps: int) -> Figure:
    bench = Bench(running, pipeline, blocks=running * (512 + steps + 100) // 16, seed=running)
    for _ in range(running):
        bench.submit(max_tokens=100_000)
    bench.step()
    while bench.scheduler.stats.waiting or any(plan.chunks for plan in bench.in_flight):
        bench.step()
    for _ in range(pipeline):
        bench.step()
    gc.collect()
    before = bench.scheduler.stats.generated_tokens
    times = [bench.step()[0] for _ in range(steps)]
    return bench.figure("decode", times, bench.scheduler.stats.generated_tokens - before)


def serving(running: int, pipeline: int, steps: int) -> Figure:
    bench = Bench(running, pipeline, blocks=running * 40, seed=running)
    for _ in range(2 * running):
        bench.submit(bench.random.randint(64, 192))
    times: list[float] = []
    before = 0
    for step in range(steps + 200):
        if step == 200:  # the first wave is over by then, and the cache is full
            before = bench.scheduler.stats.generated_tokens
            times.clear()
        spent, finished = bench.step(stop_chance=1 / 1000)
        times.append(spent)
        for _ in range(finished):
            bench.submit(bench.random.randint(64, 192))
    return bench.figure("serving", times, bench.scheduler.stats.generated_tokens - before)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures and the machine's description here")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--running", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--pipeline", type=int, nargs="+", default=[1])
    options = parser.parse_args()
    figures = []
    print(
        f"{'scene':<8} {'running':>7} {'stages':>6} {'median us':>9} {'min us':>7} {'p99 us':>7}  {'tokens/step':>11}"
    )
    for pipeline in options.pipeline:
        for running in options.running:
            for scene in (decode, serving):
                figure = scene(running, pipeline, options.steps)
                figures.append(figure)
                print(
                    f"{figure.scene:<8} {running:>7} {pipeline:>6} {figure.median_us:>9} {figure.minimum_us:>7} "
                    f"{figure.p99_us:>7}  {figure.tokens_per_step:>11}",
                    flush=True,
                )
    for name, peer in PEERS_US.items():
        print(f"for comparison, {name}: " + ", ".join(f"{us} us at {running}" for running, us in peer.items()))
    late = [
        figure
        for figure in figures
        if figure.scene == "decode" and figure.pipeline == 1 and figure.median_us > TARGETS_US.get(figure.running, 1e9)
    ]
    for figure in late:
        print(f"over the target of {TARGETS_US[figure.running]:g} us: decode at {figure.running}", file=sys.stderr)
    if options.json:
        machine = {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()}
        report = {"machine": machine, "figures": [asdict(figure) for figure in figures], "targets_us": TARGETS_US}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if late else 0


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
