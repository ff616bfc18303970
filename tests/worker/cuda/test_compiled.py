"""What the backend launches for a Llama 3.1 8B compiles for sm_90, within its limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.kernels import mode

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.timeout(2400)  # without a cache, minutes of compiling
def test_every_launch_of_a_model_compiles_for_sm_90() -> None:
    # In a process of its own: in this one, kernels are interpreted.
    environment = {name: value for name, value in os.environ.items() if name != mode.VARIABLE}
    command = [sys.executable, "-m", "tests.worker.cuda.compile_model"]
    outcome = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
