"""Builders: a valid deployment and a valid config.json, of which a test changes what it is about."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from arriero_plan.model import ModelShape
from arriero_plan.spec import LlamaDeployment, parse_deployment

Config = Callable[..., dict[str, Any]]

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_SIZES = {
    "8B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
    "70B": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672},
    "405B": {"hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128, "intermediate_size": 53248},
}


def _config(size: str = "8B", **changes: Any) -> dict[str, Any]:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_SIZES[size],
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA3_ROPE,
        "max_position_embeddings": 131072,
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
    }
    config.update(changes)
    return copy.deepcopy(config)


def _resource(**spec: Any) -> dict[str, Any]:
    """A valid resource; dotted paths with `__` set one field: model__maxContext=8192."""
    resource: dict[str, Any] = {
        "apiVersion": "serving.arriero.dev/v1alpha1",
        "kind": "LlamaDeployment",
        "metadata": {"name": "llama"},
        "spec": {
            "model": {"name": "meta-llama/Llama", "source": {"hostPath": {"path": "/models/llama"}}},
            "accelerator": {"type": "H100-80GB"},
        },
    }
    for path, value in spec.items():
        *parents, last = path.split("__")
        target = resource["spec"]
        for parent in parents:
            target = target.setdefault(parent, {})
        if value is not None:
            target[last] = value
    return resource


def _deploy(**spec: Any) -> LlamaDeployment:
    return parse_deployment(_resource(**spec), "test")


@pytest.fixture(scope="session")
def config() -> Config:
    """config(size, **changes): the config.json of Llama 3.1 8B, 70B or 405B."""
    return _config


@pytest.fixture(scope="session")
def shape() -> Callable[..., ModelShape]:
    """shape(size, **changes): the ModelShape of that config."""
    return lambda size="8B", **changes: ModelShape.from_config(_config(size, **changes), "config.json")


@pytest.fixture(scope="session")
def resource() -> Config:
    """resource(path__to=value): a valid resource as a mapping."""
    return _resource


@pytest.fixture(scope="session")
def deploy() -> Callable[..., LlamaDeployment]:
    """deploy(path__to=value): a valid resource, parsed."""
    return _deploy
