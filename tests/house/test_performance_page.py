"""docs/performance.md holds what benchmarks/results holds, and no figure without a run."""

from __future__ import annotations

import json

from tools import performance_page


def test_the_page_is_that_of_the_results():
    assert performance_page.PAGE.read_text() == performance_page.page(), "run: python -m tools.performance_page"


def test_without_results_the_page_holds_no_figure(tmp_path):
    text = performance_page.page(tmp_path)
    assert text.count("no run yet") == 8
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows
    assert all(line.endswith("|  |  |  |") for line in rows)
    assert "| 8B | fp8, fp8 | 128 / 128 |  | 27,911 |  |" in text
    assert "| 8B | bfloat16, bfloat16 |  |  |" in text


def test_a_gpu_run_fills_its_rows_and_names_what_is_missing(tmp_path):
    case = {"op": "rms_norm", "name": "T=1", "ours": {"seconds": 2.5e-6}, "of_roofline": 0.93, "faster_than_twin": 1.8}
    machine = {"device": "H200", "torch": "2.11", "triton": "3.6"}
    failed = [{"case": "sample: V=1", "reason": "RuntimeError: no"}]
    run = {"machine": machine, "cases": [case], "not_run": ["swiglu: T=1"], "failed": failed}
    what = {"model": "8B", "weights": "fp8", "kv": "fp8", "output": 128, "decode_seconds": 0.002}
    loads = [
        {**what, "prompt": 128, "batch1": True, "published": None, "of_published": None, "of_bound": 0.871},
        {**what, "prompt": 1000, "batch1": False, "published": 20000, "of_published": 1.1, "of_bound": None},
    ]
    loads[1]["output_tokens_per_second"] = 22000.4
    run["engine"] = {"loads": loads, "not_run": [{"load": "70B", "reason": "no time was left"}], "failed": []}
    (tmp_path / "gpu-h200.json").write_text(json.dumps(run))
    text = performance_page.page(tmp_path)
    assert "| `rms_norm` | T=1 | 90 % of copy bandwidth | 2.5 | 93% | 1.8 |" in text
    assert "Without a figure: swiglu: T=1; sample: V=1 (RuntimeError: no)." in text
    assert "| 8B | fp8, fp8 | 1000 / 128 | 22,000 | 20,000 | 110% |" in text
    assert "| 8B | fp8, fp8 | 2 | 87% |" in text
    assert "Without a figure: 70B (no time was left)." in text
