"""What measures the engine on a GPU counts and times what was really served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.gpu import engine as measured
from benchmarks.gpu.serving import serve
from tests.worker.checkpoints import make_checkpoint
from tests.worker.cuda.device_group import device_runner
from tests.worker.cuda.stages import SMALL, cuda_stage
from tests.worker.cuda.test_engine import settings_of


def test_a_load_is_served_to_its_last_token(tmp_path: Path, device: torch.device) -> None:
    stage = cuda_stage(make_checkpoint(tmp_path, **SMALL), device)
    settings = settings_of()
    found = serve(device_runner(stage, settings), settings, requests=3, prompt_tokens=5, output_tokens=3, limit=120)
    assert (found.requests, found.output_tokens) == (3, 9)
    assert 0 < found.first_token_seconds < found.seconds
    assert 0 < found.decode_seconds < found.seconds


def test_a_load_that_fails_says_why(tmp_path: Path, device: torch.device) -> None:
    stage = cuda_stage(make_checkpoint(tmp_path, **SMALL), device)
    settings = settings_of()
    with pytest.raises(ValueError, match="3 requests were refused"):
        serve(device_runner(stage, settings), settings, requests=3, prompt_tokens=500, output_tokens=3, limit=120)
    with pytest.raises(TimeoutError, match="0 of 2 requests had ended after 0 s"):
        serve(device_runner(stage, settings), settings, requests=2, prompt_tokens=5, output_tokens=3, limit=0)
    stage.weights.layers.clear()
    with pytest.raises(AssertionError, match="a stage has a layer"):
        serve(device_runner(stage, settings), settings, requests=1, prompt_tokens=5, output_tokens=3, limit=120)


def test_published_figures_stand_beside_equal_loads_only() -> None:
    by_label = {load.label: load for load in measured.LOADS}
    assert len(by_label) == len(measured.LOADS)
    fp8 = by_label["engine: 8B fp8, fp8 KV, 1000/1000, throughput"]
    bfloat16 = by_label["engine: 8B bfloat16, bfloat16 KV, 1000/1000, throughput"]
    assert measured._published("NVIDIA H200 141GB HBM3e", fp8) == 17744
    assert measured._published("NVIDIA H200", bfloat16) is None
    assert measured._published("NVIDIA B200", fp8) is None
