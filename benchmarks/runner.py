"""Microseconds that the runner spends around the model in a decode step: the micro-batch's tensors, and sampling.

    python benchmarks/runner.py [--json FILE] [--steps N] [--running N ...] [--vocab V ...]

N sequences of about 1,000 tokens decode; one in 16 takes a new block each step. Columns:

- `batch`: apply the plan and build the tensors of the forward pass, and the layout of the results.
- `greedy`: the highest of V logits of every row, which at many rows is reading them from memory.
- `drawn`: temperature 1 alone, so every token of the vocabulary takes part; `top-p 0.9` and `top-k 50` add the filter.
- `logprobs`: what the chosen token's log-probability and the 5 highest add to greedy.
- `step`: all of `Runner.execute` at greedy, with a model that does nothing but hand out logits.

Logits are normal with deviation 3. One thread. Figures are medians and minima; on a shared machine the minimum is the
steadier one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arriero_worker.engine.messages import SamplingParams
from arriero_worker.engine.step import Admit, Chunk, Grow, StepPlan
from arriero_worker.group.comm import Solo
from arriero_worker.model.forward import ForwardBatch
from arriero_worker.runner.batch import BatchState, Step
from arriero_worker.runner.results import ResultLayout
from arriero_worker.runner.runner import Runner
from arriero_worker.runner.sampler import Sampler

BLOCK = 16
CONTEXT = 1000
PEER_BATCH_US = {"nano-vllm": {256: 332, 1024: 1378}}
"""Measured once, on a similar machine: building the input tensors of a decode step."""
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50": {"top_k": 50},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
}


@dataclass(frozen=True)
class Figure:
    what: str
    running: int
    vocab: int
    median_us: float
    minimum_us: float
    us_per_row: float


class Decodes:
    """Plans of N sequences that decode in step, from the admission on."""

    def __init__(self, running: int, sampling: SamplingParams, steps: int) -> None:
        rng = random.Random(running)
        self.lengths = [CONTEXT + rng.randrange(BLOCK) for _ in range(running)]
        self.blocks = iter(range(10**9))
        self.slots = np.array(rng.sample(range(running), running), dtype="<i4").tobytes()
        self.step = 0
        self.max_context = CONTEXT + BLOCK + steps + 1
        self.admission = StepPlan(
            0,
            chunks=[Chunk(i, length - 1, 1, True) for i, length in enumerate(self.lengths)],
            grows=[Grow(i, [next(self.blocks) for _ in range(-(-n // BLOCK))]) for i, n in enumerate(self.lengths)],
            admits=[Admit(i, [1] * length, length, sampling) for i, length in enumerate(self.lengths)],
        )

    def plan(self) -> StepPlan:
        self.step += 1
        # The token fed at this step is at position length + step - 1.
        new = [i for i, length in enumerate(self.lengths) if (length + self.step - 1) % BLOCK == 0]
        return StepPlan(self.step, self.slots, grows=[Grow(i, [next(self.blocks)]) for i in new])


class Logits:
    """A stage that computes nothing: fresh logits, made beforehand."""

    def __init__(self, logits_NV: torch.Tensor) -> None:
        self.logits_NV = logits_NV

    def forward(self, batch: ForwardBatch, kv: Any, hidden: torch.Tensor | None, /) -> torch.Tensor:
        return self.logits_NV


def _times(call: Callable[[], Callable[[], object]], steps: int) -> list[float]:
    """Microseconds of what `call` returns, without those of `call` itself."""
    times = []
    for _ in range(steps):
        timed = call()
        begin = time.perf_counter_ns()
        timed()
        times.append((time.perf_counter_ns() - begin) / 1000)
    return times


def _figure(what: str, running: int, vocab: int, times: list[float]) -> Figure:
    median = statistics.median(times)
    return Figure(what, running, vocab, round(median, 1), round(min(times), 1), round(median / running, 2))


def _layout(state: BatchState, step: Step, vocab: int) -> ResultLayout:
    tops = state.logprobs_S.take(step.slots_N)
    asked = np.flatnonzero(tops >= 0)
    return ResultLayout(step.number, step.slots_N, asked, tops[asked].tolist(), step.prompts, vocab)


def measure_batch(running: int, steps: int) -> Figure:
    decodes = Decodes(running, SamplingParams(max_tokens=1, temperature=0.0), steps)
    state = BatchState(running, decodes.max_context, BLOCK)
    state.apply(decodes.admission)

    def prepared() -> Callable[[], object]:
        plan = decodes.plan()
        return lambda: _layout(state, state.apply(plan), 1)

    return _figure("batch", running, 0, _times(prepared, steps))


def measure_sampling(what: str, logits_NV: torch.Tensor, steps: int) -> Figure:
    running, vocab = logits_NV.shape
    decodes = Decodes(running, SamplingParams(max_tokens=1, **SAMPLINGS[what]), steps)
    state = BatchState(running, decodes.max_context, BLOCK)
    sampler = Sampler(state, vocab)
    sampler.admit(decodes.admission.admits)
    state.apply(decodes.admission)
    scratch = logits_NV.clone()

    def prepared() -> Callable[[], object]:
        step = state.apply(decodes.plan())
        scratch.copy_(logits_NV)
        layout = _layout(state, step, vocab)
        return lambda: sampler.sample(step, layout, scratch)

    return _figure(what, running, vocab, _times(prepared, steps))


def measure_step(logits_NV: torch.Tensor, steps: int) -> Figure:
    running, vocab = logits_NV.shape
    decodes = Decodes(running, SamplingParams(max_tokens=1, temperature=0.0), steps)
    runner = Runner(
        Logits(logits_NV),
        None,
        BatchState(running, decodes.max_context, BLOCK),
        Solo(),
        None,
        stage=0,
        pipeline=1,
        leader=True,
        vocab_size=vocab,
        hidden_size=1,
        dtype=torch.float32,
    )
    runner.execute(decodes.admission)

    def prepared() -> Callable[[], object]:
        plan = decodes.plan()
        return lambda: runner.execute(plan)

    return _figure("step", running, vocab, _times(prepared, steps))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures and the machine's description here")
    parser.add_argument("--steps", type=int, default=200, help="of the batch; of sampling a tenth of it")
    parser.add_argument("--running", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000])
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: list[Figure] = []

    def show(figure: Figure) -> None:
        figures.append(figure)
        print(
            f"{figure.what:<10} {figure.running:>7} {figure.vocab or '-':>7} {figure.median_us:>11} "
            f"{figure.minimum_us:>11} {figure.us_per_row:>10}",
            flush=True,
        )

    print(f"{'':<10} {'running':>7} {'vocab':>7} {'median us':>11} {'min us':>11} {'us per row':>10}")
    fewer = max(options.steps // 10, 3)
    for running in options.running:
        show(measure_batch(running, options.steps))
        for vocab in options.vocab:
            logits_NV = torch.randn(running, vocab, generator=torch.Generator().manual_seed(0)) * 3
            show(measure_step(logits_NV, fewer))
            for what in SAMPLINGS:
                show(measure_sampling(what, logits_NV, fewer))
    for name, peer in PEER_BATCH_US.items():
        print(f"for comparison, {name}, batch: " + ", ".join(f"{us} us at {n}" for n, us in peer.items()))
    if options.json:
        machine = {"processor": _processor(), "cores": os.cpu_count(), "torch": torch.__version__}
        report = {"machine": machine, "figures": [asdict(figure) for figure in figures]}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
