"""What each routing policy makes of simulated replicas: hit rate, time to first token, throughput, balance.

    python benchmarks/router_policy.py [--json FILE] [--seconds S] [--seed N] [--runs N] [--jobs N] [--scene NAME ...]

Virtual time, no sockets: the router's own index and policies in front of 8 engines (`engine_model.py`) whose caches
hold 225k tokens each: a quarter of 150 tenants' prefixes of 6k tokens, were nothing else there. What an engine tells a
router comes late: marks after 50 ms, its load every 500 ms.

Beside the policies: `random`; `prefix` in four routers that each see a quarter of the requests and nothing of one
another; `prefix` without any word of the caches; and two oracles that know every cache and queue as they are at that
moment. `oracle` takes the replica that has the first token earliest; `oracle, far-sighted` also counts what has to be
computed there, which takes time from other requests and room from other prefixes, and how many requests it has, both
with the weights that `prefix` gives them. `prefix` is compared with whichever is the better, figure by figure.

Load is in per cent of the capacity: the rate up to which the far-sighted oracle keeps p90 TTFT below 2 s. Every policy
meets the same requests at the same times: a third of the time at half the rate, to warm the caches, a sixth at the
rate, and the half that is counted. A figure is of several such runs, each with a seed of its own, put together.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine_model import MARK, MODELS, Conversation, Engine, Request

from arriero_faces.prefix import CHUNK
from arriero_router.core.ask import Ask
from arriero_router.core.policies import POLICIES
from arriero_router.core.policies.prefix import CROWDED, EVEN, MISS, REQUEST, SLACK
from arriero_router.core.policy import Pick, Policy
from arriero_router.core.prefix_index import PrefixIndex
from arriero_router.core.replica import Endpoint, Replica, Report

TOLD_AFTER = 0.05
REPORT_EVERY = 0.5
REPLICAS = 8
TENANTS = 150
BYTES_PER_TOKEN = CHUNK // MARK
ORACLES = ("oracle", "oracle, far-sighted")
CLOSE = (*ORACLES, "prefix", "prefix, 4 routers", "prefix, untold")
RIVALS = (*CLOSE, *list(POLICIES)[1:], "random")
BEARABLE_S = 2.0
"""p90 TTFT at what is called full load."""


@dataclass(frozen=True)
class Scene:
    """Where requests come from. Lengths in tokens; all but the prefix are drawn from half to one and a half of it."""

    name: str
    engine: str
    zipf: float = 0.0
    """Exponent of the tenants' popularity; 0: all alike."""
    prefix: int = 6000
    question: int = 1200
    answer: int = 250
    turns: int = 1
    """Of a conversation, from 1 on, in the mean half of it; each repeats all before it."""
    thinking: float = 0.0
    """Mean seconds between an answer and the next question."""
    loads: tuple[float, ...] = (0.5, 0.7, 0.85, 0.95)


SCENES = {
    scene.name: scene
    for scene in (
        Scene("even", "70B FP8, 2 x H100"),
        Scene("zipf", "70B FP8, 2 x H100", zipf=1.0),
        Scene("turns", "70B FP8, 2 x H100", zipf=1.0, prefix=1600, question=400, turns=11, thinking=8.0),
        Scene("even-8b", "8B FP8, 1 x H100", loads=(0.85,)),
    )
}


@dataclass(frozen=True)
class Figure:
    scene: str
    load: float
    policy: str
    requests: int
    hit_rate: float
    """Of the prompts' tokens."""
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    output_tokens_per_s: float
    worst_load: float
    """The most loaded replica's mean number of requests, over the mean of all replicas: of the worst run."""
    worst_prefill: float
    """The same of tokens prefilled."""


TARGETS = {"ttft_p90_s": 1.1, "output_tokens_per_s": 0.9, "hit_rate": 0.9, "worst_load": 1.5}
"""What `prefix` may be, over the better oracle's figure (a worst load: over the mean), at each load."""


class Router:
    """One router process: the real index, the real policy, and the counts that a pool keeps."""

    def __init__(self, policy: str, seed: int) -> None:
        self.index = PrefixIndex()
        self.policy: Policy | None = POLICIES[policy](self.index, random.Random(seed)) if policy in POLICIES else None
        self.replicas = [Replica(Endpoint(f"replica-{slot}", "", 0), slot) for slot in range(REPLICAS)]
        self.shares = [1.0] * REPLICAS

    def pick(self, ask: Ask, now: float) -> Pick:
        assert self.policy is not None
        pick = self.policy.pick(ask, self.replicas, self.shares, now)
        pick.replica.in_flight += 1
        pick.replica.pending += ask.size - CHUNK * pick.matched
        self.policy.sent(ask, pick)
        return pick


class Simulation:
    def __init__(self, scene: Scene, rate: float, policy: str, seconds: float, seed: int) -> None:
        self.scene, self.policy, self.seconds, self.seed = scene, policy, seconds, seed
        self.rate = rate
        self.warm = seconds / 2
        self.random, self.dice = random.Random(seed), random.Random(seed + 1)
        self.now = 0.0
        self.numbers = itertools.count()
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        name, _, variant = policy.partition(", ")
        self.told = name == "prefix" and variant != "untold"
        self.routers = [Router(name, seed + n) for n in range(4 if variant == "4 routers" else 1)]
        self.engines = [Engine(MODELS[scene.engine], slot, self.tell) for slot in range(REPLICAS)]
        self.sent: dict[Request, tuple[Router, Pick, int]] = {}
        self.weights = list(itertools.accumulate((n + 1) ** -scene.zipf for n in range(TENANTS)))
        self.shared = [[self.random.getrandbits(64) for _ in range(scene.prefix // MARK)] for _ in range(TENANTS)]
        if self.told:
            for router in self.routers:
                for slot in range(REPLICAS):
                    router.index.reset(slot, [])
        self.measured: list[tuple[float, int, int]] = []
        self.prefilled = [0] * REPLICAS
        self.output = 0
        self.loads = [0] * REPLICAS

    def at(self, time: float, do: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self.events, (time, next(self.numbers), do, args))

    def run(self) -> None:
        self.at(0.0, self.open)
        self.at(REPORT_EVERY, self.report)
        while self.events:
            self.now, _, do, args = heapq.heappop(self.events)
            if self.now > self.seconds:
                break
            do(*args)

    # Clients

    def open(self) -> None:
        """A conversation begins, and the next one will."""
        rate = self.rate if self.now > self.seconds / 3 else self.rate / 2
        self.at(self.now + self.random.expovariate(rate), self.open)
        tenant = self.random.choices(range(TENANTS), cum_weights=self.weights)[0]
        turns = self.random.randint(1, self.scene.turns)
        # All that a conversation draws comes from its own generator: no policy changes what another one is asked.
        rng = random.Random(self.random.getrandbits(64))
        self.ask(Conversation(tenant, self.shared[tenant], turns, rng, next(self.numbers), length=self.scene.prefix))

    def ask(self, conversation: Conversation) -> None:
        scene, rng = self.scene, conversation.rng
        conversation.turns -= 1
        conversation.length += round(scene.question * rng.uniform(0.5, 1.5))
        answer = round(scene.answer * rng.uniform(0.5, 1.5))
        request = Request(next(self.numbers), self.now, conversation, scene.prefix, conversation.length, answer)
        conversation.length += answer
        router = self.routers[self.dice.randrange(len(self.routers))]
        if router.policy is None:
            engine = self.choose(request)
        else:
            session = str(conversation.number if scene.turns > 1 else conversation.tenant)
            marks = conversation.marks(request.prompt)
            ask = Ask(model="", marks=marks, size=request.prompt * BYTES_PER_TOKEN, session=session)
            pick = router.pick(ask, self.now)
            engine = self.engines[pick.replica.slot]
            self.sent[request] = router, pick, ask.size - CHUNK * pick.matched
        engine.arrive(request)
        if not engine.stepping:
            self.step(engine)

    def choose(self, request: Request) -> Engine:
        if self.policy == "random":
            return self.engines[self.dice.randrange(REPLICAS)]
        far = self.engines[0].model.token if self.policy != "oracle" else 0.0
        part = sum(engine.requests for engine in self.engines) / REPLICAS
        crowd = MISS * request.prompt / ((CROWDED - EVEN) * part + SLACK)

        def cost(engine: Engine) -> tuple[float, int]:
            there = REQUEST / BYTES_PER_TOKEN * engine.requests + crowd * max(0.0, engine.requests - EVEN * part)
            beyond = far * ((MISS - 1) * engine.uncached(request) + there)
            return engine.first_token(request, self.now) + beyond, engine.requests

        return min(self.engines, key=cost)

    # Engines

    def step(self, engine: Engine) -> None:
        if engine.start_step(self.now):
            self.at(engine.step_ends, self.stepped, engine)

    def stepped(self, engine: Engine) -> None:
        first, ended = engine.end_step(self.now)
        measured = self.now > self.warm
        for request in first:
            if measured:
                self.measured.append((self.now - request.came, request.hit, request.prompt))
                self.prefilled[engine.slot] += request.prompt - request.hit
            if request in self.sent:
                _, pick, pending = self.sent[request]
                pick.replica.pending -= pending
        for request in ended:
            if measured:
                self.output += request.answer
            if request in self.sent:
                self.sent.pop(request)[1].replica.in_flight -= 1
            if request.conversation.turns:
                pause = request.conversation.rng.expovariate(1 / self.scene.thinking)
                self.at(self.now + pause, self.ask, request.conversation)
        self.step(engine)

    # What routers hear

    def tell(self, slot: int, added: list[int], removed: list[int]) -> None:
        if self.told:
            self.at(self.now + TOLD_AFTER, self.hear, slot, added, removed)

    def hear(self, slot: int, added: list[int], removed: list[int]) -> None:
        for router in self.routers:
            if added:
                router.index.add(slot, added)
            if removed:
                router.index.remove(slot, removed)

    def report(self) -> None:
        self.at(self.now + REPORT_EVERY, self.report)
        for engine in self.engines:
            if self.now > self.warm:
                self.loads[engine.slot] += engine.requests
            waiting = len(engine.waiting)
            for router in self.routers:
                router.replicas[engine.slot].report = Report(True, running=engine.requests - waiting, waiting=waiting)


def simulate(scene: str, load: float, rate: float, policy: str, seconds: float, seeds: Sequence[int]) -> Figure:
    runs = [Simulation(SCENES[scene], rate, policy, seconds, seed) for seed in seeds]
    for run in runs:
        run.run()
    first_tokens = [measured for run in runs for measured in run.measured]
    ttft = statistics.quantiles([seconds for seconds, _, _ in first_tokens], n=100, method="inclusive")
    hits, prompts = (sum(measured[n] for measured in first_tokens) for n in (1, 2))
    return Figure(
        scene=scene,
        load=load,
        policy=policy,
        requests=len(first_tokens),
        hit_rate=round(hits / prompts, 4),
        ttft_p50_s=round(ttft[49], 3),
        ttft_p90_s=round(ttft[89], 3),
        ttft_p99_s=round(ttft[98], 3),
        output_tokens_per_s=round(sum(run.output / (seconds - run.warm) for run in runs) / len(runs), 1),
        worst_load=round(max(max(run.loads) / statistics.mean(run.loads) for run in runs), 3),
        worst_prefill=round(max(max(run.prefilled) / statistics.mean(run.prefilled) for run in runs), 3),
    )


def capacity(scene: str, seconds: float, seeds: Sequence[int]) -> float:
    """Conversations a second that are called full load."""
    model, shape = MODELS[SCENES[scene].engine], SCENES[scene]
    # Each token of a question and of an answer computed once, and nothing else, is more than any router can reach.
    turn = (shape.question + shape.answer) * model.token
    low, high = 0.0, REPLICAS / (turn * (1 + shape.turns) / 2)
    for _ in range(6):
        rate = (low + high) / 2
        if simulate(scene, 1.0, rate, ORACLES[1], seconds, seeds).ttft_p90_s < BEARABLE_S:
            low = rate
        else:
            high = rate
    return low


def misses(figures: Sequence[Figure]) -> list[str]:
    """Where a `prefix` that the targets are meant for, one router that is told of the caches, does not meet them."""
    late = []
    for figure in figures:
        if figure.policy != "prefix":
            continue
        oracles = [
            other
            for other in figures
            if other.policy in ORACLES and (other.scene, other.load) == (figure.scene, figure.load)
        ]
        where = f"{figure.scene} at {figure.load:.0%}"
        best = min(oracle.ttft_p90_s for oracle in oracles)
        if figure.ttft_p90_s > best * TARGETS["ttft_p90_s"]:
            late.append(f"p90 TTFT {figure.ttft_p90_s} s, the oracle's {best} s: {where}")
        for name in ("output_tokens_per_s", "hit_rate"):
            best = max(getattr(oracle, name) for oracle in oracles)
            if getattr(figure, name) < best * TARGETS[name]:
                late.append(f"{name} {getattr(figure, name)}, the oracle's {best}: {where}")
        if figure.worst_load > TARGETS["worst_load"]:
            late.append(f"the worst load is {figure.worst_load} times the mean: {where}")
    return late


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures and the machine's description here")
    parser.add_argument("--seconds", type=float, default=75.0, help="of virtual time, for each run")
    parser.add_argument("--seed", type=int, default=1, help="of the first run; each next one's is one more")
    parser.add_argument(
        "--runs", type=int, default=6, help="for each figure of `prefix` and oracles; a third for others"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--scene", nargs="+", choices=SCENES, default=list(SCENES))
    options = parser.parse_args()
    figures: list[Figure] = []
    seeds = range(options.seed, options.seed + options.runs)
    fewer = seeds[: max(1, options.runs // 3)]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        rates = dict(
            zip(
                options.scene,
                pool.starmap(capacity, [(scene, options.seconds, fewer) for scene in options.scene]),
                strict=True,
            )
        )
        cells = [
            (scene, load, rates[scene] * load, policy, options.seconds, seeds if policy in CLOSE else fewer)
            for scene in options.scene
            for load in SCENES[scene].loads
            for policy in RIVALS
        ]
        cell = ("", 0.0)
        for f in pool.imap(_simulate, cells):
            figures.append(f)
            if (f.scene, f.load) != cell:
                cell = f.scene, f.load
                print(f"\n{f.scene}, {f.load:.0%} of {rates[f.scene]:.1f} a second ({SCENES[f.scene].engine})")
                print("policy                hit rate  TTFT p50     p90     p99  tokens/s  worst load  worst prefill")
            print(
                f"{f.policy:<20} {f.hit_rate:>9.1%} {f.ttft_p50_s:>9} {f.ttft_p90_s:>7} {f.ttft_p99_s:>7}"
                f" {f.output_tokens_per_s:>9.0f} {f.worst_load:>11.2f} {f.worst_prefill:>14.2f}",
                flush=True,
            )
    late = misses(figures)
    print()
    for line in late:
        print(f"beyond the target: {line}", file=sys.stderr)
    if options.json:
        machine = {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()}
        report = {
            "machine": machine,
            "seeds": list(seeds),
            "seconds": options.seconds,
            "replicas": REPLICAS,
            "tenants": TENANTS,
            "engines": {name: asdict(model) for name, model in MODELS.items()},
            "scenes": [asdict(SCENES[scene]) | {"capacity_per_s": round(rates[scene], 2)} for scene in options.scene],
            "targets": TARGETS,
            "beyond_targets": late,
            "figures": [asdict(figure) for figure in figures],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if late else 0


def _simulate(cell: tuple[str, float, float, str, float, Sequence[int]]) -> Figure:
    return simulate(*cell)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
