"""Find the fastest launch parameters on this machine's GPU, and write them into its tuning table.

    python -m benchmarks.gpu.autotune                        # every operation that declares candidates
    python -m benchmarks.gpu.autotune --only rms_norm --minutes 5
    python -m benchmarks.gpu.autotune --list                 # needs no GPU

The timed cases of benchmarks/gpu are launched with each candidate (CANDIDATES in benchmarks/gpu/cases), as the
benchmark launches them. At each size that a case asks its table with, the candidate is taken that takes the least time
over that size's cases; the present row stays unless another is faster by more than one in a hundred. A candidate that
does not launch, or computes something else than the case's twin, is passed over and said to be. The table is written
after each of its keys: an interrupted run, or one whose time is up, keeps what it has found.

What is found is checked like every row: run python -m tools.kernels_table after it.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import triton
from benchmarks.gpu import tables
from benchmarks.gpu.candidates import all_candidates
from benchmarks.gpu.case import Case, all_cases
from benchmarks.gpu.machine import describe
from benchmarks.gpu.measure import draw, first_difference, time_graph

from arriero_kernels.tuning import Parameters, Tuning

BETTER = 0.99
"""The share of the present row's time that another must not exceed to replace it."""
WRONG = 0.05

Timer = Callable[[Case, Tuning], float]
"""Seconds of a case's launch with a tuning. Raises what the launch raises."""


class TimeIsUpError(Exception):
    """No other launch begins in this run."""


@dataclass(frozen=True)
class Recording(Tuning):
    """A tuning that notes with which size each key was asked for."""

    sizes: dict[str, int] = field(default_factory=dict)

    def choose(self, op: str, size: int) -> Parameters:
        self.sizes[op] = size
        return Tuning.choose(self, op, size)


def sizes_asked(case: Case, device: torch.device, tuning: Tuning) -> dict[str, int]:
    """The size with which a case's launch asks for each key. Launches it."""
    recording = Recording(tuning.device, tuning.multiprocessors, tuning.ops)
    case.make(device, recording).call()
    return recording.sizes


def with_rows(tuning: Tuning, key: str, rows: tables.Rows) -> Tuning:
    return replace(tuning, ops={**tuning.ops, key: rows})


def best_of(times: Mapping[int, Sequence[float]]) -> int:
    """Of candidates by number, each with its seconds in the same cases, the one with the least time, cases counted
    alike. 0, the present row, stays unless another is faster by more than 1 - BETTER.
    """
    least = [min(column) for column in zip(*times.values(), strict=True)]
    costs = {number: sum(spent / best for spent, best in zip(row, least, strict=True)) for number, row in times.items()}
    number = min(costs, key=lambda n: (costs[n], n))
    return number if 0 not in costs or costs[number] < BETTER * costs[0] else 0


def tune(
    key: str,
    candidates: Sequence[Parameters],
    cases: Mapping[int, Sequence[Case]],
    tuning: Tuning,
    timer: Timer,
    say: Callable[[str], None],
) -> dict[int, Parameters]:
    """The parameters found for a key at each size of `cases`. Raises TimeIsUpError, from the timer.

    A size at which not even the present row launches is left out.
    """
    found: dict[int, Parameters] = {}
    for size, those in sorted(cases.items()):
        present = {name: value for name, value in tuning.choose(key, size).items() if name != "enable_fp_fusion"}
        tried = [present]
        for candidate in candidates:
            if (whole := {**present, **candidate}) not in tried:
                tried.append(whole)
        times: dict[int, list[float]] = {}
        for number, parameters in enumerate(tried):
            try:
                times[number] = [timer(case, tuning.using(key, **parameters)) for case in those]
            except TimeIsUpError:
                raise
            except Exception as error:  # one candidate that cannot be launched must not end the others' run
                say(f"{key} at {size}: {_plain(parameters)} passed over: {type(error).__name__}: {error}")
        if not times:
            continue
        number = best_of(times)
        found[size] = tried[number]
        gain = "" if 0 not in times else f", {math.fsum(times[0]) / math.fsum(times[number]):.2f}x the present row"
        say(f"{key} at {size}: {_plain(tried[number])} of {len(times)}{gain}")
    return found


def run(
    only: str,
    directory: Path,
    name: str,
    multiprocessors: int,
    measured: str,
    device: torch.device,
    timer: Timer,
    cases: Sequence[Case],
    candidates: Mapping[str, Mapping[str, Sequence[Parameters]]],
    say: Callable[[str], None],
) -> bool:
    """Tune what `only` is part of the name of (an operation or a key), and write the table. Returns whether all was
    done: False where the time was up before.
    """
    path = tables.path_of(name, directory)
    content = tables.read(path, name, multiprocessors)
    ops = {key: tables.rows_of(content, key) for key in content["ops"]}
    tuning = Tuning(content["device"], multiprocessors, ops)
    for op, by_key in candidates.items():
        keys = [key for key in by_key if only in op or only in key]
        if not keys:
            continue
        asked = [(case, sizes_asked(case, device, tuning)) for case in cases if case.op == op and case.timed]
        for key in keys:
            by_size: dict[int, list[Case]] = {}
            for case, sizes in asked:
                if key in sizes:
                    by_size.setdefault(sizes[key], []).append(case)
            try:
                found = tune(key, by_key[key], by_size, tuning, timer, say)
            except TimeIsUpError:
                say(f"the time is up: {key} and what follows it stay as they were")
                return False
            if found:
                content = tables.with_found(content, key, found, measured)
                tuning = with_rows(tuning, key, tables.rows_of(content, key))
                tables.write(path, content)
    say(f"written: {path}")
    return True


def timer_until(end: float, l2_bytes: int, budget: float) -> Timer:
    """Times on the device, `budget` seconds a launch, until the monotonic clock shows `end`."""

    def timer(case: Case, tuning: Tuning) -> float:
        if time.monotonic() > end:
            raise TimeIsUpError
        works = draw(case, torch.device("cuda"), l2_bytes, tuning)
        first = works[0]
        if first.twin is not None and not (error := first_difference(first.call(), first.twin())) < WRONG:
            raise ArithmeticError(f"not what the twin computes: relative error {error:.2g}")
        return time_graph([work.call for work in works], budget).seconds

    return timer


def _plain(parameters: Parameters) -> str:
    return " ".join(f"{name}={value}" for name, value in parameters.items())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.autotune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only operations and keys whose name contains it")
    parser.add_argument("--minutes", type=float, default=20.0, help="begin no launch after so many (default 20)")
    parser.add_argument("--seconds", type=float, default=0.05, help="of timing, for each launch (default 0.05)")
    parser.add_argument("--tables", type=Path, default=tables.DIRECTORY, metavar="DIR", help="where the tables lie")
    parser.add_argument("--list", action="store_true", help="show what would be tried")
    arguments = parser.parse_args(argv)
    candidates = all_candidates()
    chosen = [
        (op, key, tried)
        for op, by_key in candidates.items()
        for key, tried in by_key.items()
        if arguments.only in op or arguments.only in key
    ]
    if not chosen:
        parser.error(f"no operation's or key's name contains {arguments.only!r}; --list shows them")
    if arguments.list:
        for op, key, tried in chosen:
            print(f"{op}: {key}: {len(tried)} candidates")
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device: parameters are tuned on the device they are for; --list shows them", file=sys.stderr)
        return 2
    machine = describe()
    measured = f"{datetime.date.today().isoformat()}, Triton {triton.__version__}, driver {machine['driver']}"
    timer = timer_until(time.monotonic() + 60 * arguments.minutes, machine["l2_bytes"], arguments.seconds)
    done = run(
        arguments.only, arguments.tables, machine["device"], machine["multiprocessors"], measured,
        torch.device("cuda"), timer, all_cases(), candidates, lambda line: print(line, flush=True),
    )  # fmt: skip
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
