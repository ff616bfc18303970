"""A launch file that asks for GPUs, on a machine that has none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.worker.replica import launch_replica


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_a_worker_says_so_and_ends(tmp_path: Path) -> None:
    launch = launch_replica(tmp_path, str(tmp_path / "run"), layers=2).model_copy(update={"backend": "cuda"})
    file = tmp_path / "launch.json"
    file.write_text(launch.model_dump_json())
    command = [sys.executable, "-m", "arriero_worker", "--launch", str(file), "--pod-index", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert ended.returncode == 3, ended.stderr
    sentence = "rank 0 cannot run: the launch file asks for CUDA devices, and this machine shows none"
    assert ended.stderr.count(sentence) == 1, ended.stderr
    assert "Traceback" not in ended.stderr
