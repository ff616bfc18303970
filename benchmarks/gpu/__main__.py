"""Measure every kernel on this machine's GPU, beside its PyTorch twin and the machine's own ceilings; then the engine.

    python -m benchmarks.gpu --json benchmarks/results/gpu-h200.json
    python -m benchmarks.gpu --only rms_norm --minutes 2
    python -m benchmarks.gpu --parts engine --minutes 8
    python -m benchmarks.gpu --list                              # needs no GPU

A figure that this run did not produce stands nowhere: cases for which the time did not suffice are listed under
"not_run", those that failed with their reason. The JSON is written after each case, so that an interrupted run loses
nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.case import Case, all_cases
from benchmarks.gpu.engine import LOADS, measure_engine
from benchmarks.gpu.machine import ceilings, clocks, describe
from benchmarks.gpu.measure import Measured, measure

WRONG = 0.05
"""Relative error from which a case does not compute what its twin does."""


def roofline_seconds(measured: Measured, found: dict[str, float | None]) -> float | None:
    """The least time that the measured ceilings leave: of moving the bytes, or of the arithmetic."""
    bandwidth = found["copy_bytes_per_second"]
    peak = found[f"{measured.unit}_flops"]
    if bandwidth is None or (measured.flops and peak is None):
        return None
    return max(measured.bytes / bandwidth, measured.flops / peak if measured.flops and peak else 0.0)


def entry(measured: Measured, found: dict[str, float | None]) -> dict[str, Any]:
    """A case as it stands in the JSON."""
    floor = roofline_seconds(measured, found)
    seconds = measured.ours.seconds
    return {
        **asdict(measured),
        "roofline_seconds": floor,
        "of_roofline": None if floor is None else floor / seconds,
        "bytes_per_second": measured.bytes / seconds,
        "flops_per_second": measured.flops / seconds if measured.flops else None,
        "faster_than_twin": None if measured.twin is None else measured.twin.seconds / seconds,
        "agrees": None if measured.error is None else measured.error < WRONG,
    }


def run(
    cases: Sequence[Case], minutes: float, budget: float, path: Path | None, engine_minutes: float = 0.0
) -> dict[str, Any]:
    """Measure until the time is up: kernels, then for the last `engine_minutes` of it the engine. Returns what the JSON
    holds.
    """
    end = time.monotonic() + 60 * (minutes - engine_minutes)
    machine = describe()
    report: dict[str, Any] = {
        "machine": machine,
        "clocks_before": clocks(),
        "ceilings": ceilings(),
        "cases": [],
        "failed": [],
        "not_run": [],
    }
    for case in cases:
        if time.monotonic() > end:
            report["not_run"].append(case.label)
            continue
        try:
            measured = measure(case, machine["l2_bytes"], budget)
        except Exception as error:  # one case that cannot run must not cost the others their figures
            report["failed"].append({"case": case.label, "reason": f"{type(error).__name__}: {error}"})
            print(f"{case.label:64} failed: {error}", flush=True)
            continue
        report["cases"].append(entry(measured, report["ceilings"]))
        print(_line(report["cases"][-1]), flush=True)
        _write(report, path)
    if engine_minutes:
        left = engine_minutes + max(0.0, end - time.monotonic()) / 60

        def written(found: dict[str, Any]) -> None:
            report["engine"] = found
            _write(report, path)

        bandwidth = report["ceilings"]["copy_bytes_per_second"]
        written(measure_engine(left, bandwidth, machine["device"], written))
    report["clocks_after"] = clocks()
    _write(report, path)
    return report


def _line(case: dict[str, Any]) -> str:
    def share(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    flags = "" if case["agrees"] in (True, None) else f"  WRONG: error {case['error']:.2g}"
    return (
        f"{case['op'] + ': ' + case['name']:64} {case['ours']['seconds'] * 1e6:10.2f} us"
        f" {share(case['of_roofline'], '7.1%')} of roofline{'' if case['cold'] else ' (cached)'}"
        f" {share(case['faster_than_twin'], '7.2f')}x the twin{flags}"
    )


def _write(report: dict[str, Any], path: Path | None) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(report, indent=1) + "\n")
    unfinished.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no case after so many (default 9)")
    parser.add_argument(
        "--seconds", type=float, default=0.2, help="of timing, for each case and each twin (default 0.2)"
    )
    parser.add_argument(
        "--parts", default="kernels,engine", metavar="NAMES", help="kernels, engine or both (default), by commas"
    )
    parser.add_argument(
        "--engine-minutes", type=float, default=4.0, help="of the minutes, for the engine beside kernels (default 4)"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose label contains it")
    parser.add_argument("--list", action="store_true", help="show what would be measured")
    arguments = parser.parse_args(argv)
    parts = set(arguments.parts.split(","))
    if unknown := parts - {"kernels", "engine"}:
        parser.error(f"--parts knows kernels and engine, not {', '.join(sorted(unknown))}")
    if arguments.only:
        parts = {"kernels"}
    cases = [case for case in all_cases() if case.timed and arguments.only in case.label and "kernels" in parts]
    if arguments.list:
        print("\n".join([case.label for case in cases] + [load.label for load in LOADS if "engine" in parts]))
        return 0
    if not cases and "kernels" in parts:
        parser.error(f"no case's label contains {arguments.only!r}; --list shows them")
    if not torch.cuda.is_available():
        print("no CUDA device: --list shows what would be measured", file=sys.stderr)
        return 2
    share = 0.0
    if "engine" in parts:
        share = min(arguments.engine_minutes, arguments.minutes) if "kernels" in parts else arguments.minutes
    report = run(cases, arguments.minutes, arguments.seconds, arguments.json, share)
    wrong = [case for case in report["cases"] if case["agrees"] is False]
    print(f"{len(report['cases'])} measured, {len(report['failed'])} failed, {len(report['not_run'])} not run")
    return 1 if wrong or report["failed"] or report.get("engine", {}).get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
