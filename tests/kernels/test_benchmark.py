"""benchmarks/gpu where no GPU is: its cases compute what their twins do, and its figures are what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.gpu import __main__ as program
from benchmarks.gpu.case import Case, all_cases
from benchmarks.gpu.cases import (
    all_reduce_rms_norm,
    copy_blocks,
    decode_attention,
    embedding,
    fp8_matmul,
    int4_matmul,
    int8_matmul,
    log_softmax_top,
    lora,
    paged_attention,
    quantize,
    rms_norm,
    rope_kv,
    sample,
    swiglu,
    tree_attention,
)
from benchmarks.gpu.measure import Measured, Timing, first_difference

from arriero_kernels.quantization import Scaling

ROOT = Path(__file__).resolve().parents[2]

SMALL = [
    all_reduce_rms_norm.case(1, 3, 64),
    all_reduce_rms_norm.case(1, 3, 256, Scaling.TOKEN),
    copy_blocks.case(2, 1, (1, 2, 8)),
    embedding.case(5, 20, 16),
    fp8_matmul.case(3, 32, 64),
    fp8_matmul.case(3, 256, 128, grouped=True),
    int4_matmul.case(3, 32, 256),
    int4_matmul.case(3, 32, 128, group=32, zeros=False),
    int8_matmul.case(3, 32, 64),
    lora.case(6, 32, 64, 16, 3),
    paged_attention.case([(1, 3, 3), (2, 1, 9), (1, 2, 20)], 4, 2, 16, slots=16),
    paged_attention.case([(2, 4, 4), (1, 3, 20)], 4, 2, 16, torch.float8_e4m3fn, slots=16, window=5),
    decode_attention.case(2, 20, 4, 2, 16, slots=16),
    decode_attention.case(1, 40, 4, 2, 16, torch.float8_e4m3fn, slots=16, tokens=2),
    tree_attention.case(2, 5, 4, 2, 16),
    tree_attention.case(1, 9, 4, 2, 16, bits=True),
    tree_attention.merge_case(3, 2, 16),
    *(
        quantize.case(3, 256, scaling, dtype)
        for scaling in list(Scaling)[1:]
        for dtype in (torch.float8_e4m3fn, torch.int8)
    ),
    *(rms_norm.case(3, 256, scaling) for scaling in Scaling),
    rms_norm.case(3, 64, with_delta=False),
    rope_kv.case(4, 4, 2, 16),
    rope_kv.case(4, 4, 2, 16, kv_dtype=torch.float8_e4m3fn),
    log_softmax_top.case(3, 100, 4),
    sample.case(3, 100),
    sample.case(3, 100, top_k=5, top_p=0.9, min_p=0.1),
    *(swiglu.case(3, 256, scaling) for scaling in Scaling),
]
"""Of every operation, at sizes that the interpreter can do."""


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.label)
def test_a_case_computes_what_its_twin_does(device: torch.device, case: Case) -> None:
    work = case.make(device, None)
    assert work.bytes > 0
    assert work.twin is not None
    assert first_difference(work.call(), work.twin()) < program.WRONG


def test_every_operation_is_among_them() -> None:
    assert {case.op for case in SMALL} == {case.op for case in all_cases()}


def test_a_difference_is_seen() -> None:
    x = torch.randn(100)
    assert first_difference(x, x) == 0
    assert first_difference((x, x), (1.1 * x, x)) > program.WRONG
    nothing = torch.full((100,), float("nan"))
    assert not first_difference(nothing, x) < program.WRONG


CEILINGS = {"copy_bytes_per_second": 4e12, "bfloat16_flops": 8e14, "float8_flops": None, "int8_flops": 1e15}


def measured(bytes: int, flops: int = 0, unit: str = "bfloat16") -> Measured:
    return Measured("op", "case", bytes, flops, unit, 3, True, Timing(1e-3, 0.1, 10), Timing(2e-3, 0.1, 10), 0.01)


def test_the_roofline_is_the_higher_of_both_floors() -> None:
    assert program.roofline_seconds(measured(4 * 10**9), CEILINGS) == pytest.approx(1e-3)
    assert program.roofline_seconds(measured(4 * 10**9, 16 * 10**11), CEILINGS) == pytest.approx(2e-3)
    assert program.roofline_seconds(measured(8 * 10**9, 8 * 10**11), CEILINGS) == pytest.approx(2e-3)


def test_a_ceiling_that_was_not_measured_gives_no_figure() -> None:
    entry = program.entry(measured(10**9, 10**12, "float8"), CEILINGS)
    assert entry["roofline_seconds"] is None
    assert entry["of_roofline"] is None
    assert entry["flops_per_second"] == pytest.approx(1e15)


def test_an_entry_relates_the_figures() -> None:
    entry = program.entry(measured(2 * 10**9), CEILINGS)
    assert entry["of_roofline"] == pytest.approx(0.5)
    assert entry["bytes_per_second"] == pytest.approx(2e12)
    assert entry["faster_than_twin"] == pytest.approx(2.0)
    assert entry["flops_per_second"] is None
    assert entry["agrees"] is True


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_lists_and_does_not_measure(tmp_path: Path) -> None:
    listed = run("--list", "--only", "rms_norm")
    assert listed.returncode == 0
    assert listed.stdout.splitlines() == [c.label for c in all_cases() if c.timed and "rms_norm" in c.label]
    refused = run("--json", str(tmp_path / "gpu.json"))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "no CUDA device" in refused.stderr
    assert not (tmp_path / "gpu.json").exists()
