"""Write docs/performance.md from benchmarks/results/*.json: no figure stands there that no run has produced.

A test compares; `python -m tools.performance_page` writes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.engine import LOADS, PUBLISHED

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
CASES = ROOT / "benchmarks" / "gpu" / "cases"

_HEAD = """# Performance

Every figure on this page was measured by a script of `benchmarks/` and stands in `benchmarks/results`;
`python -m tools.performance_page` writes the page from there. A figure that no run has produced is left empty. Compare
figures of one table only: each is one run, on one machine, which the line above it names.
"""

_AIMS = {
    "paged_attention": "prefill 90 % of cuDNN's SDPA",
    "decode_attention": "85 % of copy bandwidth",
    "fp8_matmul": "95 % of `torch._scaled_mm`",
    "int8_matmul": "95 % of `torch._int_mm`",
    "int4_matmul": "3.5 x bfloat16's product at 16 rows",
}
_AIM = "90 % of copy bandwidth"

Result = Mapping[str, Any]
Row = Sequence[object]


def page(results: Path = RESULTS) -> str:
    """The whole page, from the JSON files of a folder."""
    parts: list[str] = [_HEAD, *_gpu(results), *_gpu_engine(results)]
    for name, title, section in (
        ("engine_cpu", "The engine on processors", _engine_cpu),
        ("scheduler", "The scheduler", _scheduler),
        ("router", "The router: processor time and delay", _router),
        ("router_chaos", "The router: replicas that die", _chaos),
        ("router_policy", "The router: policies", _policy),
        ("operator_scale", "The operator at scale", _operator),
    ):
        parts.append(f"\n## {title}\n\n`benchmarks/{name}.py`")
        found = _read(results / f"{name}.json")
        parts.append(": no run yet.\n" if found is None else f", {_machine(found)}.\n\n" + section(found))
    return "".join(parts)


def _read(path: Path) -> Result | None:
    return json.loads(path.read_text()) if path.exists() else None


def _machine(found: Result) -> str:
    machine = found["machine"]
    return f"on {machine.get('cores', '?')} cores ({machine.get('processor', 'unknown')})"


def table(head: Sequence[str], rows: Iterable[Row], words: int = 1) -> str:
    """Markdown; the first `words` columns hold words, the others figures."""
    rule = ["---" if i < words else "---:" for i in range(len(head))]
    lines = [head, rule, *([_cell(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.0%}"


def _gpu(results: Path) -> Iterator[str]:
    runs = sorted(results.glob("gpu-*.json"))
    yield "\n## Kernels on a GPU\n\n`python -m benchmarks.gpu`"
    head = ("operation", "case", "aim", "us", "of the roofline", "PyTorch's time / ours")
    if not runs:
        yield ": no run yet, so its figures are empty. What the compiler says of each kernel is in kernels.md.\n\n"
        names = sorted(path.stem for path in CASES.glob("*.py") if path.stem != "__init__")
        yield table(head, [(f"`{name}`", None, _AIMS.get(name, _AIM), None, None, None) for name in names], 3)
        return
    for path in runs:
        found = json.loads(path.read_text())
        machine = found["machine"]
        yield f", on {machine['device']}, torch {machine['torch']}, triton {machine['triton']}.\n\n"
        yield table(head, [_kernel(case) for case in found["cases"]], 3)
        missing = [*found["not_run"], *(f"{entry['case']} ({entry['reason']})" for entry in found["failed"])]
        if missing:
            yield f"\nWithout a figure: {'; '.join(missing)}.\n"


def _kernel(case: Result) -> Row:
    aim = _AIMS.get(case["op"], _AIM)
    seconds = case["ours"]["seconds"] * 1e6
    return (f"`{case['op']}`", case["name"], aim, seconds, _share(case["of_roofline"]), case["faster_than_twin"])


def _gpu_engine(results: Path) -> Iterator[str]:
    """What runs measured of the loads of benchmarks/gpu/engine.py; without a run, empty cells beside what is known."""
    yield "\n## The engine on a GPU\n\n`python -m benchmarks.gpu --parts engine`"
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("gpu-*.json"))]
    runs = [found for found in runs if found.get("engine", {}).get("loads")]
    if not runs:
        yield ": no run yet. Beside the empty cells: TensorRT-LLM 1.0's published figures for one H200.\n\n"
        published = PUBLISHED["NVIDIA H200"]
        known = {
            load.label: published[load.model].get((load.prompt, load.output)) if load.weights == "fp8" else None
            for load in LOADS
        }
        yield _loads([{**asdict(load), "published": known[load.label]} for load in LOADS])
    for found in runs:
        machine, engine = found["machine"], found["engine"]
        yield f", on {machine['device']}, torch {machine['torch']}, triton {machine['triton']}.\n\n"
        yield _loads(engine["loads"])
        missing = [f"{entry['load']} ({entry['reason']})" for entry in (*engine["not_run"], *engine["failed"])]
        if missing:
            yield f"\nWithout a figure: {'; '.join(missing)}.\n"
        if (floor := engine.get("floor")) and "failed" not in floor:
            yield (
                "\nThe floor, transformers' `generate` with 8B in bfloat16: "
                f"{1e3 * floor['batch1_decode_seconds']:.3g} ms per token alone, "
                f"{floor['batch32_tokens_per_second']:,.0f} tokens per second of 32.\n"
            )


def _loads(loads: Sequence[Result]) -> str:
    head = ("model", "weights, KV", "tokens in / out", "tokens per second", "TensorRT-LLM's", "of it")
    together = [
        (
            load["model"],
            f"{load['weights']}, {load['kv']}",
            f"{load['prompt']} / {load['output']}",
            load.get("output_tokens_per_second"),
            load["published"],
            _share(load.get("of_published")),
        )
        for load in loads
        if not load["batch1"]
    ]
    alone = [
        (
            load["model"],
            f"{load['weights']}, {load['kv']}",
            load["decode_seconds"] * 1e3 if "decode_seconds" in load else None,
            _share(load.get("of_bound")),
        )
        for load in loads
        if load["batch1"]
    ]
    columns = ("model", "weights, KV", "ms per token of one sequence", "of the bandwidth bound (aim 85 %)")
    return table(head, together, 3) + "\n" + table(columns, alone, 2)


def _engine_cpu(found: Result) -> str:
    def tokens(batch: str, name: str) -> float | None:
        return statistics.median(found[batch][name]) if name in found[batch] else None

    rows = [
        (name, tokens("batch1", name), tokens("batch8", name), found["serving"].get(name))
        for name in ("arriero", "llama.cpp", "transformers")
    ]
    share = _share(found["of_bandwidth"])
    return (
        table(("tokens per second", "batch 1", "batch 8", "serving a mix"), rows)
        + f"\nBatch 1 is {share} of what the memory's bandwidth allows. Greedy tokens in float32 equal those of "
        f"transformers: {'yes' if found['equality']['equal'] else 'no'}.\n"
    )


def _scheduler(found: Result) -> str:
    aims = found["targets_us"]
    rows = [
        (
            row["scene"],
            row["running"],
            row["cpu_median_us"],
            row["cpu_p99_us"],
            aims.get(str(row["running"])) if row["scene"] == "decode" else None,
        )
        for row in found["figures"]
    ]
    return table(("scene", "running", "us per step", "99th percentile", "aim"), rows)


def _router(found: Result) -> str:
    medians = found["medians"]

    def figure(name: str, scene: str, key: str) -> object:
        return medians[name].get(scene, {}).get(key)

    def added(name: str) -> float | None:
        first, direct = figure(name, "one", "first_p50_us"), figure("direct", "one", "first_p50_us")
        return first - direct if isinstance(first, float) and isinstance(direct, float) else None

    names = [name for name in medians if name != "direct"]
    rows: list[Row] = [
        (
            name,
            figure(name, "whole", "cpu_us"),
            figure(name, "paced", "cpu_us"),
            figure(name, "whole", "per_second"),
            added(name),
            figure(name, "gRPC", "cpu_per_message_us"),
        )
        for name in names
    ]
    rows.append(("*aim*", 80, 600, None, 500, 20))
    head = [
        *("router", "CPU us per request", "CPU us per paced stream of 32 chunks", "requests per second"),
        *("delay added to one client, us", "CPU us per gRPC message"),
    ]
    return (
        table(head, rows)
        + "\n*floor* parses and passes on with uvloop and httptools and decides nothing; *grpc.aio passthrough* does "
        "the same with gRPC.\n"
    )


def _chaos(found: Result) -> str:
    columns = ("requests", "streams", "failed", "cut", "wrong", "miscounted", "pauses_median_s", "pauses_worst_s")
    head = ("router", "requests", "streams", "failed", "cut", "wrong", "miscounted", "median pause, s", "worst, s")
    kills = [(name, *(part["kills"][c] for c in columns)) for name, part in found["routers"].items() if "kills" in part]
    outage = [
        (name, part["outage"]["requests"], part["outage"]["answered"], part["outage"]["failed"])
        for name, part in found["routers"].items()
        if "outage" in part
    ]
    return (
        f"Two replicas of the tiny Llama, {found['clients']} clients, {found['rounds']} times kill -9 of a whole "
        "replica.\n\n"
        + table(head, kills)
        + "\nBoth replicas down for 20 s:\n\n"
        + table(("router", "requests", "answered", "failed"), outage)
    )


def _policy(found: Result) -> str:
    names = [f"{row['policy']}" for row in found["figures"]]
    order = list(dict.fromkeys(names))
    chosen = [row for row in found["figures"] if row["scene"] == "even" and row["load"] == 0.85]
    by_name = {row["policy"]: row for row in chosen}
    rows = [
        (name, _share(row["hit_rate"]), row["ttft_p90_s"], row["output_tokens_per_s"], row["worst_load"])
        for name in order
        if (row := by_name.get(name))
    ]
    head = (
        "policy",
        "prefix hits",
        "90th percentile of time to first token, s",
        "tokens per second",
        "worst / mean load",
    )
    return (
        f"Simulated in virtual time: {found['replicas']} replicas of a 70B model, {found['tenants']} tenants with "
        "prefixes of 6,000 tokens, at 85 % of what the oracle's replicas can serve.\n\n" + table(head, rows)
    )


def _operator(found: Result) -> str:
    head = [
        *("measurement", "phase", "s until all created", "s until all ready"),
        *("operator's CPU s", "its peak MiB", "its writes", "all writes"),
    ]
    rows: list[Row] = []
    for name, phases in found["measurements"].items():
        for phase, seen in phases.items():
            if not isinstance(seen, Mapping):
                continue
            seconds = seen.get("seconds", {})
            seconds = seconds if isinstance(seconds, Mapping) else {}
            peak = seen.get("operator_peak_bytes")
            rows.append(
                (
                    name,
                    phase,
                    seconds.get("created"),
                    seconds.get("ready"),
                    seen["operator_cpu_seconds"],
                    None if peak is None else peak / 2**20,
                    seen["own_writes"],
                    seen.get("all_writes"),
                )
            )
    return (
        f"{found['groups']} groups of {found['pods_per_group']} pods on {found['nodes']} nodes that KWOK simulates, a "
        "real API server, everything on this machine. *many*: a deployment per group; *one*: all groups in one "
        "deployment. *second pass*: the operator is started again and looks at everything once.\n\n"
        + table(head, rows, 2)
    )


if __name__ == "__main__":
    PAGE.write_text(page())
