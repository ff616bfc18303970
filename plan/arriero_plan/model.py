"""The shape of a Llama model, read from a Hugging Face config.json.

Both spellings are read: transformers 4 (`rope_scaling`, `rope_theta`, `torch_dtype`) and transformers 5
(`rope_parameters`, `dtype`). A field that is absent means what it means to transformers' LlamaConfig. What the engine
cannot run is refused here, before a byte of weights is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from arriero_plan.checkpoint import Quantization, parse_quantization
from arriero_plan.fields import ConfigReader, ModelError

__all__ = ["CheckpointDtype", "Llama3RopeScaling", "ModelError", "ModelShape", "Quantization"]

CheckpointDtype = Literal["float32", "float16", "bfloat16"]

_ARCHITECTURE = "LlamaForCausalLM"
_DTYPES: tuple[CheckpointDtype, ...] = ("float32", "float16", "bfloat16")
_MAX_LAYERS = 1000


@dataclass(frozen=True, slots=True)
class Llama3RopeScaling:
    """Llama 3.1's scaling of the rotary frequencies.

    Wavelengths above original_max_position_embeddings / low_freq_factor are stretched by `factor`, those below
    original_max_position_embeddings / high_freq_factor are kept, and what lies between is interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the numbers of a Llama are; sizes count elements, not bytes."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    max_position_embeddings: int
    sliding_window: int | None
    """Keys a token sees, itself included; None: all before it."""
    dtype: CheckpointDtype
    """What the checkpoint says it holds; the planner decides what it is computed in."""
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    quantization: Quantization | None

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together; the values' is the same."""
        return self.num_kv_heads * self.head_dim

    @classmethod
    def from_config(cls, config: Mapping[str, Any], origin: str) -> ModelShape:
        """Read a parsed config.json; `origin` names the file in messages.

        Raises ModelError: one sentence naming the file and the field.
        """
        if not isinstance(config, Mapping):
            raise ModelError(f"{origin}: expected a JSON object, found {type(config).__name__}")
        read = ConfigReader(config, origin)
        _check_architecture(read)
        hidden = read.integer("hidden_size")
        layers = read.integer("num_hidden_layers", maximum=_MAX_LAYERS)
        heads = read.integer("num_attention_heads")
        kv_heads = read.integer("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise read.error(f"num_attention_heads is {heads}, which num_key_value_heads ({kv_heads}) does not divide")
        vocab = read.integer("vocab_size")
        max_positions = read.integer("max_position_embeddings", default=2048)
        theta, scaling = _rope(read)
        return cls(
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=_head_dim(read, hidden, heads),
            intermediate_size=read.integer("intermediate_size"),
            vocab_size=vocab,
            tie_word_embeddings=read.boolean("tie_word_embeddings", default=False),
            rms_norm_eps=read.number("rms_norm_eps", default=1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=max_positions,
            sliding_window=_sliding_window(read),
            dtype=_dtype(read),
            attention_bias=read.boolean("attention_bias", default=False),
            mlp_bias=read.boolean("mlp_bias", default=False),
            eos_token_ids=_token_ids(read, "eos_token_id", vocab, default=2),
            bos_token_id=next(iter(_token_ids(read, "bos_token_id", vocab, default=1)), None),
            quantization=parse_quantization(read),
        )


def _check_architecture(read: ConfigReader) -> None:
    architectures = read.get("architectures")
    if architectures is None:
        model_type = read.get("model_type")
        if model_type is None:
            raise read.error(f"neither architectures nor model_type is set: expected architectures ['{_ARCHITECTURE}']")
        if model_type != "llama":
            raise read.error(f"model_type is {model_type!r}: only llama is supported")
    elif architectures != [_ARCHITECTURE]:
        raise read.error(f"architectures is {architectures!r}: only {_ARCHITECTURE} is supported")
    activation = read.get("hidden_act")
    if activation not in (None, "silu"):
        raise read.error(f"hidden_act is {activation!r}: only silu is supported")


def _head_dim(read: ConfigReader, hidden: int, heads: int) -> int:
    if read.get("head_dim") is None:
        if hidden % heads:
            raise read.error(
                f"hidden_size is {hidden}, which num_attention_heads ({heads}) does not divide, and head_dim is not set"
            )
        head_dim = hidden // heads
    else:
        head_dim = read.integer("head_dim")
    if head_dim % 2:
        raise read.error(f"head_dim is {head_dim}: rotary embeddings need an even one")
    return head_dim


def _sliding_window(read: ConfigReader) -> int | None:
    if read.get("sliding_window") is None or not read.boolean("use_sliding_window", default=True):
        return None
    return read.integer("sliding_window")


def _dtype(read: ConfigReader) -> CheckpointDtype:
    name = "dtype" if read.get("dtype") is not None else "torch_dtype"
    value = read.get(name)
    if value is None:
        return "float32"
    plain = value.removeprefix("torch.") if isinstance(value, str) else value
    if plain not in _DTYPES:
        raise read.error(f"{name} is {value!r}: expected one of {', '.join(_DTYPES)}")
    return cast(CheckpointDtype, plain)


def _token_ids(read: ConfigReader, name: str, vocab: int, default: int) -> tuple[int, ...]:
    if name not in read.config:
        return (default,) if default < vocab else ()
    value = read.get(name)
    if value is None:
        return ()
    ids: Sequence[Any] = value if isinstance(value, list) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise read.error(f"{name} is {value!r}: expected a token id or a list of them")
        if not 0 <= token < vocab:
            raise read.error(f"{name} is {value!r}, outside the vocabulary of {vocab} tokens")
    return tuple(ids)


def _rope(read: ConfigReader) -> tuple[float, Llama3RopeScaling | None]:
    """The base and the scaling, from `rope_parameters`, or `rope_theta` and `rope_scaling` of transformers 4."""
    section = "rope_parameters" if read.get("rope_parameters") is not None else "rope_scaling"
    value = read.get(section)
    if value is None:
        return read.number("rope_theta", default=10_000.0), None
    if not isinstance(value, Mapping):
        raise read.error(f"{section} is {value!r}: expected an object")
    rope = read.within(section, value)
    theta = rope.number("rope_theta", default=read.number("rope_theta", default=10_000.0))
    if rope.number("partial_rotary_factor", default=1.0) != 1.0:
        raise rope.error(
            f"{section}.partial_rotary_factor is {value['partial_rotary_factor']!r}: only 1.0 is supported"
        )
    kind = value.get("rope_type", value.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise read.error(f"{section}.rope_type is {kind!r}: only llama3 and default are supported")
    scaling = Llama3RopeScaling(
        factor=rope.number("factor", minimum=1.0),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise read.error(
            f"{section}.high_freq_factor is {scaling.high_freq_factor:g}, "
            f"not above low_freq_factor ({scaling.low_freq_factor:g})"
        )
    return theta, scaling
