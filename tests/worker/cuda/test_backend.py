"""The model on the cuda backend gives the logits that it gives on the cpu backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.worker.checkpoints import llama3_rope, make_checkpoint
from tests.worker.cuda.stages import SMALL, cpu_stage, cuda_stage, forward
from tests.worker.stages import Blocks, make_batch

SHAPES: dict[str, dict[str, Any]] = {
    "GQA 2": {},
    "every head its own KV, odd sizes": {"num_key_value_heads": 4, "intermediate_size": 100, "head_dim": 20},
    "one KV head, tied, biases": {
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama3 rope past the original context": {"rope_parameters": llama3_rope(original=8), "head_dim": 32},
    "window smaller than the sequences": {"sliding_window": 5},
}


def mixed_work() -> list[list[tuple[int, list[int], int]]]:
    """Steps over four sequences: chunks of 1 to 11 tokens, single tokens, and both in one batch."""
    generator = torch.Generator().manual_seed(5)

    def new(count: int) -> list[int]:
        return torch.randint(0, SMALL["vocab_size"], (count,), generator=generator).tolist()

    return [
        [(0, new(11), 0)],
        [(1, new(5), 0), (2, new(1), 0), (0, new(1), 11)],
        [(0, new(1), 12), (1, new(1), 5), (2, new(1), 1)],
        [(3, new(3), 0), (1, new(4), 6), (0, new(1), 13), (2, new(7), 2)],
    ]


def assert_rows(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5)


def assert_close(found: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    error = float((found - expected).abs().max())
    assert error <= limit, f"logits differ by {error}"


@pytest.mark.parametrize("name", SHAPES)
def test_float32_logits_are_the_cpu_backends(name: str, tmp_path: Path, device: torch.device) -> None:
    path = make_checkpoint(tmp_path, **{**SMALL, **SHAPES[name]})
    ours, theirs = cuda_stage(path, device), cpu_stage(path)
    caches = [stage.allocate_kv(24, 4) for stage in (ours, theirs)]
    blocks = Blocks(24, 4)
    for work in mixed_work():
        batch = make_batch(blocks, work)
        assert_close(forward(ours, batch, caches[0]), forward(theirs, batch, caches[1]), 2e-4)


def test_only_the_rows_asked_for_and_all_of_them_without_a_list(tmp_path: Path, device: torch.device) -> None:
    path = make_checkpoint(tmp_path, **SMALL)
    stage = cuda_stage(path, device)
    kv = stage.allocate_kv(24, 4)
    work = mixed_work()[1][:1]
    everything = forward(stage, make_batch(Blocks(24, 4), work), kv)
    for rows in ([3, 1], []):
        found = forward(stage, make_batch(Blocks(24, 4), work, rows), kv)
        assert_rows(found, everything[rows])


def test_bfloat16_errs_as_the_cpu_backend_does(tmp_path: Path, device: torch.device) -> None:
    """Weights of the checkpoint are bfloat16 on both; only here, activations are rounded as well."""
    path = make_checkpoint(tmp_path, dtype=torch.bfloat16, **SMALL)
    ours, exact = cuda_stage(path, device, torch.bfloat16), cpu_stage(path, torch.float32)
    caches = [stage.allocate_kv(24, 4) for stage in (ours, exact)]
    blocks = Blocks(24, 4)
    for work in mixed_work():
        batch = make_batch(blocks, work)
        expected = forward(exact, batch, caches[1])
        assert_close(forward(ours, batch, caches[0]), expected, 0.02 * float(expected.abs().max()))
