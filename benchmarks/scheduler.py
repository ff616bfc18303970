"""Microseconds of Python that the scheduler spends per decode step: `schedule` + `commit`, with a stub for the model.

    python benchmarks/scheduler.py [--json FILE] [--steps N] [--running N ...] [--pipeline P ...]

Two scenes, both with the prefix cache on, KV blocks of 16 tokens, and step n + 1 scheduled before step n is committed:

- `decode`: N sequences of mixed length decode and none ends. In each step one of 16 takes a new block and publishes the
  full one. This is what the figures of other schedulers are of.
- `serving`: N sequences run, each ends after 64 to 192 tokens by its stop token or its limit, and another takes its
  place: queueing, look-up in a cache that evicts, admission, a prefill chunk, first token. Every step counts.

The stub hands out tokens drawn beforehand; making them and submitting requests is not timed. `cpu` is the thread's own
time and is what the targets are compared with; `wall` includes what else the machine did.
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
    cpu_median_us: float
    cpu_p99_us: float
    wall_median_us: float
    wall_minimum_us: float
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
        self.start_watch()

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

    def start_watch(self) -> None:
        self.cpu_ns: list[int] = []
        self.wall_ns: list[int] = []
        self.generated = self.scheduler.stats.generated_tokens

    def step(self, stop_chance: float = 0.0) -> int:
        """Schedule until no more may be in flight, commit the oldest; note the time. Returns how many ended."""
        wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
        while (plan := self.scheduler.schedule()) is not None:
            self.in_flight.append(plan)
        cpu_spent, wall_spent = time.thread_time_ns() - cpu, time.perf_counter_ns() - wall
        result = self.sample(self.in_flight.popleft(), stop_chance)
        wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
        outputs = self.scheduler.commit(result)
        self.cpu_ns.append(cpu_spent + time.thread_time_ns() - cpu)
        self.wall_ns.append(wall_spent + time.perf_counter_ns() - wall)
        return len(outputs.finished)

    def figure(self, scene: str) -> Figure:
        steps = len(self.cpu_ns)
        return Figure(
            scene=scene,
            running=self.scheduler.settings.max_running,
            pipeline=self.scheduler.settings.pipeline,
            steps=steps,
            cpu_median_us=round(statistics.median(self.cpu_ns) / 1000, 1),
            cpu_p99_us=round(statistics.quantiles(self.cpu_ns, n=100)[98] / 1000, 1),
            wall_median_us=round(statistics.median(self.wall_ns) / 1000, 1),
            wall_minimum_us=round(min(self.wall_ns) / 1000, 1),
            tokens_per_step=round((self.scheduler.stats.generated_tokens - self.generated) / steps, 1),
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
    bench.start_watch()
    for _ in range(steps):
        bench.step()
    return bench.figure("decode")


def serving(running: int, pipeline: int, steps: int) -> Figure:
    bench = Bench(running, pipeline, blocks=running * 40, seed=running)
    for _ in range(2 * running):
        bench.submit(bench.random.randint(64, 192))
    for step in range(steps + 200):
        if step == 200:  # the first wave is over by then, and the cache is full
            gc.collect()
            bench.start_watch()
        for _ in range(bench.step(stop_chance=1 / 1000)):
            bench.submit(bench.random.randint(64, 192))
    return bench.figure("serving")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures and the machine's description here")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--running", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--pipeline", type=int, nargs="+", default=[1])
    options = parser.parse_args()
    figures = []
    print("microseconds per step            cpu              wall")
    print("scene    running stages   median     p99   median minimum  tokens")
    for pipeline in options.pipeline:
        for running in options.running:
            for scene in (decode, serving):
                f = scene(running, pipeline, options.steps)
                figures.append(f)
                print(
                    f"{f.scene:<8} {f.running:>7} {f.pipeline:>6}  {f.cpu_median_us:>7} {f.cpu_p99_us:>7}  "
                    f"{f.wall_median_us:>7} {f.wall_minimum_us:>7} {f.tokens_per_step:>7}",
                    flush=True,
                )
    for name, peer in PEERS_US.items():
        print(f"for comparison, {name}: " + ", ".join(f"{us} us at {running}" for running, us in peer.items()))
    late = [
        figure
        for figure in figures
        if figure.scene == "decode"
        and figure.pipeline == 1
        and figure.cpu_median_us > TARGETS_US.get(figure.running, 1e9)
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
