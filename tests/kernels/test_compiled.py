"""Every kernel, compiled ahead of time for sm_90: what the compiler says stands in docs/kernels.md, and is sound."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.kernels import mode

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(2400)  # without a cache, minutes of compiling
def test_the_table_is_what_the_kernels_compile_to() -> None:
    # In a process of its own: in this one, kernels are interpreted.
    environment = {name: value for name, value in os.environ.items() if name != mode.VARIABLE}
    outcome = subprocess.run(
        [sys.executable, "-m", "tools.kernels_table", "--check"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_interpreted_kernels_are_not_compiled() -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "tools.kernels_table", "--check"],
        cwd=ROOT,
        env=os.environ | {mode.VARIABLE: "1"},
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 2
    assert "TRITON_INTERPRET is set" in outcome.stderr


LOG = """\
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    16 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...
"""
PTX = "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16\nmma.sync.aligned\ncp.async.bulk.tensor.2d.shared"
TTIR = "%1 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<128x64xbf16> * tensor<64x32xbf16> -> tensor<128x32xf32>"


def test_what_the_compiler_says_is_read_and_judged() -> None:
    from tools.kernels_table import Row, read_compiled

    found = read_compiled(LOG, PTX, TTIR, shared=232_449)
    assert (found.registers, found.spills, found.stack) == (255, 24, 16)
    assert (found.wgmma, found.mma, found.tma, found.rows, found.serialized) == (1, 1, 1, 128, True)
    row = Row("kernel", "warps=4", "op: case", ("h100",), found)
    faults = row.faults()
    assert [word in fault for word, fault in zip(("spills", "232,449", "serialised"), faults, strict=True)] == [
        True
    ] * 3
    good = replace(found, spills=0, serialized=False, shared=232_448)
    assert replace(row, compiled=good).faults() == []
    (fault,) = replace(row, compiled=replace(good, wgmma=0)).faults()
    assert "a dot of 128 rows and no wgmma" in fault
    assert replace(row, compiled=replace(good, wgmma=0, rows=16)).faults() == []


def test_a_page_without_its_marks_is_refused() -> None:
    from tools.kernels_table import replaced

    with pytest.raises(SystemExit, match="are not there"):
        replaced("# The kernels\n", "table")
