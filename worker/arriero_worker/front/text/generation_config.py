"""What the checkpoint says of sampling from it: defaults where a client is silent, and the tokens that end a text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero_worker.front.text.tokenizer import Tokenizer, read_json


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """generation_config.json, reduced to what sampling uses."""

    eos: tuple[int, ...]
    """Tokens that end an answer."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def load_generation_defaults(model_path: Path, tokenizer: Tokenizer) -> GenerationDefaults:
    """Read generation_config.json; the ends of text fall back to config.json, and the tokenizer's own is always one.

    Raises TokenizerError for a file that is not JSON; a value that makes no sense counts as absent.
    """
    generation = read_json(model_path / "generation_config.json")
    eos = _ids(generation.get("eos_token_id")) or _ids(read_json(model_path / "config.json").get("eos_token_id"))
    own = tokenizer.id_of(tokenizer.special_tokens.get("eos_token", ""))
    if own is not None and own not in eos:
        eos = (*eos, own)
    return GenerationDefaults(
        eos=eos,
        temperature=_number(generation, "temperature", 1.0, 0.0, 100.0),
        top_p=_number(generation, "top_p", 1.0, 1e-9, 1.0),
        top_k=int(_number(generation, "top_k", 0.0, 0.0, 2**31 - 1)),
        min_p=_number(generation, "min_p", 0.0, 0.0, 1.0),
        repetition_penalty=_number(generation, "repetition_penalty", 1.0, 1e-3, 100.0),
    )


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if type(item) is int and item >= 0)


def _number(config: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return default
    return float(value) if low <= value <= high else default
