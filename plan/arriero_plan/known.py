"""Shapes of the public Llama 3 models by repository name, so that a plan needs no download.

Source: the config.json of each repository.
"""

from __future__ import annotations

from typing import Any

_ORGANISATION = "meta-llama/"


def _config(
    hidden: int,
    layers: int,
    heads: int,
    inner: int,
    *,
    rope_factor: float | None,
    head_dim: int = 128,
    tied: bool = False,
    instruct: bool = False,
) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3",
        "factor": rope_factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    end: int | list[int] = 128001
    if instruct:
        end = 128009 if rope_factor is None else [128001, 128008, 128009]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "intermediate_size": inner,
        "vocab_size": 128256,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": None if rope_factor is None else scaling,
        "max_position_embeddings": 8192 if rope_factor is None else 131072,
        "torch_dtype": "bfloat16",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": end,
    }


_BASE: dict[str, dict[str, Any]] = {
    "Meta-Llama-3-8B": {"hidden": 4096, "layers": 32, "heads": 32, "inner": 14336, "rope_factor": None},
    "Meta-Llama-3-70B": {"hidden": 8192, "layers": 80, "heads": 64, "inner": 28672, "rope_factor": None},
    "Llama-3.1-8B": {"hidden": 4096, "layers": 32, "heads": 32, "inner": 14336, "rope_factor": 8.0},
    "Llama-3.1-70B": {"hidden": 8192, "layers": 80, "heads": 64, "inner": 28672, "rope_factor": 8.0},
    "Llama-3.1-405B": {"hidden": 16384, "layers": 126, "heads": 128, "inner": 53248, "rope_factor": 8.0},
    "Llama-3.2-1B": {
        "hidden": 2048,
        "layers": 16,
        "heads": 32,
        "inner": 8192,
        "rope_factor": 32.0,
        "head_dim": 64,
        "tied": True,
    },
    "Llama-3.2-3B": {"hidden": 3072, "layers": 28, "heads": 24, "inner": 8192, "rope_factor": 32.0, "tied": True},
    "Llama-3.3-70B": {"hidden": 8192, "layers": 80, "heads": 64, "inner": 28672, "rope_factor": 8.0},
}

_INSTRUCT_ONLY = {"Llama-3.3-70B"}

# Names that a hub repository or its older name differ by.
_NAMES = {name: name for name in _BASE} | {
    f"Meta-{name}": name for name in ("Llama-3.1-8B", "Llama-3.1-70B", "Llama-3.1-405B")
}


def known_config(name: str) -> dict[str, Any] | None:
    """The config.json of a public Llama 3 model, as `meta-llama/Llama-3.1-8B-Instruct`; None for any other name."""
    if not name.startswith(_ORGANISATION):
        return None
    short = name.removeprefix(_ORGANISATION)
    base = _NAMES.get(short.removesuffix("-Instruct"))
    if base is None or short in _INSTRUCT_ONLY:
        return None
    return _config(**_BASE[base], instruct=short.endswith("-Instruct"))


def known_names() -> list[str]:
    """Every name that known_config knows."""
    names = [f"{name}{suffix}" for name in _NAMES for suffix in ("", "-Instruct")]
    return [_ORGANISATION + name for name in names if name not in _INSTRUCT_ONLY]
