"""Quantised weights and keys on the cuda backend, against the model that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.worker.checkpoints import make_checkpoint
from tests.worker.cuda.stages import SMALL, cpu_stage, cuda_stage, forward
from tests.worker.cuda.test_backend import mixed_work
from tests.worker.quantized_checkpoints import quantized
from tests.worker.stages import Blocks, make_batch

from arriero_worker.model.backend import StageWeights
from arriero_worker.model.cuda.linear import Dense, Int4, Scaled
from arriero_worker.model.quantized import quantize_weight

SHAPE: dict[str, Any] = {**SMALL, "intermediate_size": 64, "num_hidden_layers": 1}
BLOCKED: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_hidden_layers": 1,
    "vocab_size": 131,
}


def linears(weights: StageWeights[Any]) -> list[Any]:
    return [getattr(layer, name) for layer in weights.layers for name in ("qkv", "o", "gate_up", "down")]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def compare(ours: Any, theirs: Any, limit: float, steps: int = 3) -> None:
    caches = [stage.allocate_kv(24, 4) for stage in (ours, theirs)]
    blocks = Blocks(24, 4)
    for work in mixed_work()[:steps]:
        batch = make_batch(blocks, work)
        error = relative_error(forward(ours, batch, caches[0]), forward(theirs, batch, caches[1]))
        assert error < limit, f"logits err by {error:.3f}"


# Of the logits: weights are the very same on both sides, so what is left is the rounding of activations: to bfloat16
# (2^-9 each), to int8 (a 254th of a token's largest value), to float8 (2^-4).
CHECKPOINTS = {
    "fp8 by rows, compressed-tensors": (SHAPE, Scaled, 0.08),
    "fp8 by blocks": (BLOCKED, Scaled, 0.08),
    "int8, compressed-tensors": (SHAPE, Scaled, 0.03),
    "awq": (SHAPE, Int4, 0.015),
    "gptq": (SHAPE, Int4, 0.015),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_quantised_checkpoint_is_multiplied_as_it_is(name: str, tmp_path: Path, device: torch.device) -> None:
    shape, kind, limit = CHECKPOINTS[name]
    (tmp_path / "dense").mkdir()
    stored, meant = quantized(make_checkpoint(tmp_path / "dense", **shape), tmp_path, name)
    weights: Any = next(weights for weights in ("fp8", "int8", "int4") if weights in name or weights == "int4")
    ours = cuda_stage(stored, device, torch.bfloat16, weights=weights)
    assert all(isinstance(linear, kind) for linear in linears(ours.weights))
    compare(ours, cpu_stage(meant), limit, steps=1)


@pytest.mark.parametrize(("weights", "limit"), [("fp8", 0.08), ("int8", 0.03), ("int4", 0.015)])
def test_weights_rounded_while_loading(weights: Any, limit: float, tmp_path: Path, device: torch.device) -> None:
    """Against the cpu backend with the very weights that rounding makes."""
    path = make_checkpoint(tmp_path, dtype=torch.bfloat16, **SHAPE)
    ours, theirs = cuda_stage(path, device, torch.bfloat16, weights=weights), cpu_stage(path)

    class Rounding(type(theirs.backend)):  # type: ignore[misc]
        def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None, as_it_is: bool = False) -> Any:
            return super().pack_linear(quantize_weight(weight, weights).dequantized(), bias)

        def pack_head(self, weight: torch.Tensor) -> Any:
            return super().pack_linear(weight, None)

    from tests.worker.cuda.stages import stage_of

    assert isinstance(ours.weights.head, Dense), "the head is not quantised"
    compare(ours, stage_of(path, Rounding(torch.float32, 1)), limit, steps=1)


def test_a_quantised_checkpoint_may_be_converted(tmp_path: Path, device: torch.device) -> None:
    (tmp_path / "dense").mkdir()
    stored, meant = quantized(make_checkpoint(tmp_path / "dense", **SHAPE), tmp_path, "awq")
    ours = cuda_stage(stored, device, torch.float32, weights="float32")
    assert all(isinstance(linear, Dense) for linear in linears(ours.weights))
    compare(ours, cpu_stage(meant), 1e-4, steps=1)


def test_keys_and_values_in_float8(tmp_path: Path, device: torch.device) -> None:
    path = make_checkpoint(tmp_path, **SHAPE)
    ours = cuda_stage(path, device, torch.float32, kv="fp8")
    kv = ours.allocate_kv(4, 4)
    assert {tensor.dtype for layer in kv.layers for tensor in layer[:2]} == {torch.float8_e4m3fn}
    compare(ours, cpu_stage(path), 0.06, steps=2)
