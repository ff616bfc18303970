"""Small random-weight Llama checkpoints, written by transformers itself: the format is the field's, not ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TINY: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What `make_checkpoint` starts from: Llama's config.json fields."""


def llama3_rope(*, factor: float = 8.0, original: int = 64, theta: float = 500000.0) -> dict[str, Any]:
    """`rope_parameters` of a Llama 3.1 style config whose original context is `original` positions."""
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


def random_model(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> LlamaForCausalLM:
    """transformers' Llama with random weights: the same arguments give the same bits. Unlike transformers' own
    initialisation, norms and biases are random too, so a forgotten one shows, and logits are of the order of 1."""
    config = LlamaConfig(**{**TINY, **overrides}, attn_implementation="sdpa")
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            values = 1.0 + 0.2 * values
        elif name.endswith(".bias"):
            values = 0.2 * values
        elif "embed_tokens" not in name:
            values = values * parameter.shape[-1] ** -0.5
        elif config.tie_word_embeddings:
            values = values * 2.0 * parameter.shape[-1] ** -0.5
        parameter.copy_(values)
    return model.to(dtype)


def make_checkpoint(
    path: Path, *, seed: int = 0, sharded: bool = False, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """Write config.json and safetensors (one file, or several with an index if `sharded`) into `path`; no tokenizer.

    `overrides` replace fields of `TINY`, e.g. `num_key_value_heads=8`. Returns `path`.
    """
    model = random_model(seed, dtype, **overrides)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(path, max_shard_size=max(size // 3, 1) if sharded else size * 2)
    return path
