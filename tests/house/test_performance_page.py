"""docs/performance.md holds what benchmarks/results holds, and no figure without a run."""

from __future__ import annotations

import json

from tools import performance_page


def test_the_page_is_that_of_the_results():
    assert performance_page.PAGE.read_text() == performance_page.page(), "run: python tools/performance_page.py"


def test_without_results_the_page_holds_no_figure(tmp_path):
    text = performance_page.page(tmp_path)
    assert text.count("no run yet") == 7
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows
    assert all(line.endswith("|  |  |  |") for line in rows)


def test_a_gpu_run_fills_its_rows_and_names_what_is_missing(tmp_path):
    case = {"op": "rms_norm", "name": "T=1", "ours": {"seconds": 2.5e-6}, "of_roofline": 0.93, "faster_than_twin": 1.8}
    machine = {"device": "H200", "torch": "2.11", "triton": "3.6"}
    failed = [{"case": "sample: V=1", "reason": "RuntimeError: no"}]
    run = {"machine": machine, "cases": [case], "not_run": ["swiglu: T=1"], "failed": failed}
    (tmp_path / "gpu-h200.json").write_text(json.dumps(run))
    text = performance_page.page(tmp_path)
    assert "| `rms_norm` | T=1 | 90 % of copy bandwidth | 2.5 | 93% | 1.8 |" in text
    assert "Without a figure: swiglu: T=1; sample: V=1 (RuntimeError: no)." in text
