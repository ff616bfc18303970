"""Quantised checkpoints: what is read of each format is the weight that it stands for, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.worker.checkpoints import make_checkpoint
from tests.worker.quantized_checkpoints import FORMATS, quantized
from tests.worker.stages import even_layout

from arriero_worker.model.cpu.backend import CpuBackend
from arriero_worker.model.loader import CheckpointError, load_weights, read_shape
from arriero_worker.model.quantized import QuantizedWeight, quantize_weight
from arriero_worker.model.shard import Shard

SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_hidden_layers": 2,
    "attention_bias": True,
}


class Keeping:
    """A backend that keeps what it is given."""

    dtype = torch.float32
    hidden_dtype = torch.float32

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None, as_it_is: bool = False) -> Any:
        assert as_it_is, "a quantised checkpoint's dense layers stay dense"
        return weight, bias

    def pack_quantized(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> Any:
        return weight.dequantized(), bias

    def pack_table(self, weight: torch.Tensor) -> Any:
        return weight, None

    pack_head = pack_table

    def pack_vector(self, vector: torch.Tensor) -> torch.Tensor:
        return vector


def load(path: Path, rank: int = 0, tensor: int = 1, progress: Any = None) -> Any:
    shape = read_shape(path)
    shard = Shard.of(even_layout(shape.num_layers, tensor, 1), rank)
    return load_weights(path, shape, shard, Keeping(), progress)  # type: ignore[arg-type]


def load_dense(path: Path, rank: int = 0, tensor: int = 1) -> Any:
    class Dense(Keeping):
        def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None, as_it_is: bool = False) -> Any:
            return weight, bias

    shape = read_shape(path)
    shard = Shard.of(even_layout(shape.num_layers, tensor, 1), rank)
    return load_weights(path, shape, shard, Dense())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("dense"), **SHAPE)


@pytest.mark.parametrize("name", FORMATS)
def test_each_rank_reads_its_part_of_the_weight_that_is_meant(dense: Path, tmp_path: Path, name: str) -> None:
    stored, meant = quantized(dense, tmp_path, name)
    for tensor in (1, 2):
        for rank in range(tensor):
            told: list[tuple[int, int]] = []
            found = load(stored, rank, tensor, lambda done, total, told=told: told.append((done, total)))
            expected = load_dense(meant, rank, tensor)
            assert told[0][0] == 0
            assert told[-1][0] == told[-1][1] > 0
            for ours, theirs in zip(found.layers, expected.layers, strict=True):
                for linear in ("qkv", "o", "gate_up", "down"):
                    weight, bias = getattr(ours, linear)
                    wanted, wanted_bias = getattr(theirs, linear)
                    assert torch.allclose(weight, wanted, rtol=1e-6, atol=1e-7), f"{linear} of rank {rank}"
                    assert (bias is None) == (wanted_bias is None)
                    assert bias is None or torch.equal(bias, wanted_bias)


def test_the_cpu_backend_converts(dense: Path, tmp_path: Path) -> None:
    stored, meant = quantized(dense, tmp_path, "awq")
    backend = CpuBackend(torch.float32, 1)
    try:
        shape = read_shape(stored)
        shard = Shard.of(even_layout(2, 1, 1), 0)
        found = load_weights(stored, shape, shard, backend)
        expected = load_weights(meant, read_shape(meant), shard, backend)
        for ours, theirs in zip(found.layers, expected.layers, strict=True):
            assert torch.allclose(ours.down.panels, theirs.down.panels, rtol=1e-6, atol=1e-7)  # type: ignore[union-attr]
    finally:
        backend.close()


def test_modules_that_are_ignored_stay_as_they_are(dense: Path, tmp_path: Path) -> None:
    stored, _ = quantized(dense, tmp_path, "int8, compressed-tensors")
    tensors = load_file(stored / "model.safetensors")
    original = load_file(dense / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = original[name]
    save_file(tensors, stored / "model.safetensors")
    config = stored / "config.json"
    config.write_text(config.read_text().replace('"ignore": ["lm_head"]', '"ignore": ["lm_head", "re:.*1.mlp.down.*"]'))
    weights = load(stored)
    assert torch.equal(weights.layers[1].down[0], original[name])
    config.write_text(config.read_text().replace("1.mlp.down", "no such layer"))
    with pytest.raises(CheckpointError, match=r"down_proj\.weight has dtype F32, expected I8"):
        load(stored)


def test_what_is_fused_is_quantised_alike(dense: Path, tmp_path: Path) -> None:
    stored, _ = quantized(dense, tmp_path, "int8, compressed-tensors")
    tensors, original = load_file(stored / "model.safetensors"), load_file(dense / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    save_file({**tensors, name: original[name]}, stored / "model.safetensors")
    config = stored / "config.json"
    config.write_text(config.read_text().replace('"lm_head"', '"model.layers.0.self_attn.k_proj"'))
    with pytest.raises(CheckpointError, match="some are quantised and some are not"):
        load(stored)


def rewritten(path: Path, name: str, change: Any) -> Path:
    tensors = load_file(path / "model.safetensors")
    for key in tensors:
        if key.endswith(name):
            tensors[key] = change(tensors[key])
    save_file(tensors, path / "model.safetensors")
    return path


def test_columns_in_another_order_are_refused(dense: Path, tmp_path: Path) -> None:
    stored, _ = quantized(dense, tmp_path, "gptq")
    with pytest.raises(CheckpointError, match=r"self_attn\.q_proj: desc_act: columns are quantised in another order"):
        load(rewritten(stored, "g_idx", lambda groups: groups.flip(0)))


def test_a_scale_of_another_shape_is_refused(dense: Path, tmp_path: Path) -> None:
    stored, _ = quantized(dense, tmp_path, "fp8 by rows, fbgemm")
    with pytest.raises(CheckpointError, match=r"weight_scale has shape \[3\], expected one scale or 512"):
        load(rewritten(stored, "q_proj.weight_scale", lambda _: torch.ones(3)))


def test_a_cut_through_a_group_is_refused(tmp_path: Path) -> None:
    shape = {**SHAPE, "intermediate_size": 96}
    (tmp_path / "dense").mkdir()
    path = make_checkpoint(tmp_path / "dense", **shape)
    stored, _ = quantized(path, tmp_path, "awq")
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj: inputs 0 to 48 of qzeros cut through .* 32"):
        load(stored, 0, 2)


@pytest.mark.parametrize(("kind", "limit"), [("fp8", 0.05), ("int8", 0.01), ("int4", 0.12)])
@pytest.mark.parametrize("columns", [256, 200])
def test_rounding_while_loading(kind: Any, limit: float, columns: int) -> None:
    weight = torch.randn(48, columns, generator=torch.Generator().manual_seed(3))
    weight[5] = 0.0
    error = (quantize_weight(weight, kind).dequantized() - weight).norm() / weight.norm()
    assert 0 < error < limit
    assert torch.equal(quantize_weight(weight, kind).dequantized()[5], weight[5])
