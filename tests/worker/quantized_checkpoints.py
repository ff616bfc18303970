"""Quantised checkpoints in every format that is read, made from a dense one, and the dense one that each stands for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Made = tuple[Tensors, torch.Tensor]
"""A layer's tensors by their names' last part, and the weight that they stand for, float32 [N, K]."""

GROUP = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def packed(codes: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
    """Eight columns of codes a word; nibble i holds column order[i]."""
    rows, columns = codes.shape
    words = torch.zeros(rows, columns // 8, dtype=torch.int64)
    for i, column in enumerate(order or range(8)):
        words |= codes[:, column::8].to(torch.int64) << (4 * i)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def fp8_rows(weight: torch.Tensor) -> Made:
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def fp8_tensor(weight: torch.Tensor) -> Made:
    scale = weight.abs().amax() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.5)}, codes.float() * scale


def fp8_blocks(weight: torch.Tensor) -> Made:
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    whole = torch.empty_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scales[i, j] = weight[part].abs().amax() / 448
            whole[part] = scales[i, j]
    codes = (weight / whole).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * whole


def int8_rows(weight: torch.Tensor) -> Made:
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def _int4(
    weight: torch.Tensor, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes [N, K], scales [N, G] as float16 has them, zeros [N, G], the weight."""
    n, k = weight.shape
    groups = weight.view(n, k // GROUP, GROUP)
    if symmetric:
        scales = (groups.abs().amax(2) / 7).half()
        zeros = torch.full(scales.shape, 8)
    else:
        low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().to(torch.int64).clamp(0, 15)
    codes = ((groups / scales.float()[:, :, None]).round() + zeros[:, :, None]).clamp(0, 15)
    whole = (codes - zeros[:, :, None]) * scales.float()[:, :, None]
    return codes.view(n, k).to(torch.int64), scales, zeros, whole.view(n, k)


def awq(weight: torch.Tensor) -> Made:
    codes, scales, zeros, whole = _int4(weight)
    tensors = {
        "qweight": packed(codes.t(), AWQ_ORDER),
        "qzeros": packed(zeros.t(), AWQ_ORDER),
        "scales": scales.t().contiguous(),
    }
    return tensors, whole


def _gptq(weight: torch.Tensor, less: int) -> Made:
    codes, scales, zeros, whole = _int4(weight)
    tensors = {
        "qweight": packed(codes).t().contiguous(),
        "qzeros": packed((zeros.t() - less) % 16),
        "scales": scales.t().contiguous(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).to(torch.int32),
    }
    return tensors, whole


def pack_quantized(weight: torch.Tensor, symmetric: bool = True) -> Made:
    codes, scales, zeros, whole = _int4(weight, symmetric)
    tensors = {"weight_packed": packed(codes), "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}
    if not symmetric:
        tensors["weight_zero_point"] = packed(zeros.t()).t().contiguous()
    return tensors, whole


def _compressed(**weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


FORMATS: dict[str, tuple[Callable[[torch.Tensor], Made], dict[str, Any]]] = {
    "fp8 by rows, compressed-tensors": (fp8_rows, _compressed(type="float", num_bits=8, strategy="channel")),
    "fp8 by tensors, compressed-tensors": (fp8_tensor, _compressed(type="float", num_bits=8, strategy="tensor")),
    "fp8 by rows, fbgemm": (fp8_rows, {"quant_method": "fbgemm_fp8"}),
    "fp8 by blocks": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "int8, compressed-tensors": (int8_rows, _compressed(type="int", num_bits=8, strategy="channel")),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP}),
    "gptq": (lambda weight: _gptq(weight, 1), {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "gptq v2": (
        lambda weight: _gptq(weight, 0),
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
    ),
    "int4, compressed-tensors": (pack_quantized, _compressed(type="int", num_bits=4, group_size=GROUP)),
    "int4 with zero points, compressed-tensors": (
        lambda weight: pack_quantized(weight, False),
        _compressed(type="int", num_bits=4, group_size=GROUP),
    ),
}


def quantized(dense: Path, directory: Path, name: str) -> tuple[Path, Path]:
    """Write a quantised checkpoint and the float32 one that it stands for; returns (quantised, float32)."""
    make, quantization = FORMATS[name]
    stored: Tensors = {}
    meant: Tensors = {}
    for tensor, value in load_file(dense / "model.safetensors").items():
        if not tensor.endswith("_proj.weight"):
            stored[tensor] = meant[tensor] = value
            continue
        parts, meant[tensor] = make(value.float())
        stored |= {tensor.removesuffix("weight") + part: part_value for part, part_value in parts.items()}
    config = json.loads((dense / "config.json").read_text())
    paths = directory / "quantised", directory / "meant"
    for path, tensors, extra in zip(paths, (stored, meant), ({"quantization_config": quantization}, {}), strict=True):
        path.mkdir()
        (path / "config.json").write_text(json.dumps({**config, **extra}))
        save_file({key: value.contiguous() for key, value in tensors.items()}, path / "model.safetensors")
    return paths
