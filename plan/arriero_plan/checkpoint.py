"""What a quantised checkpoint holds, from `quantization_config` of its config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from arriero_plan.fields import ConfigReader

QuantizedWeights = Literal["fp8", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the linear layers' weights are stored; embedding, head and norms stay unquantised."""

    method: str
    """`quant_method` as the checkpoint spells it: fp8, fbgemm_fp8, compressed-tensors, awq or gptq."""
    weights: QuantizedWeights
    group_size: int | None
    """Input elements that share one scale within a row; None: a scale per row (or per tensor)."""
    block: tuple[int, int] | None
    """(rows, columns) that share one scale, for block-scaled fp8."""
    ignore: tuple[str, ...]
    """Module names left unquantised, as the checkpoint spells them: names, parts of names, or patterns after `re:`."""

    def ignores(self, module: str) -> bool:
        """Whether the checkpoint leaves a module, such as model.layers.0.mlp.up_proj, unquantised."""
        return any(
            re.match(entry[3:], module) if entry.startswith("re:") else f".{entry}." in f".{module}."
            for entry in self.ignore
        )


def parse_quantization(read: ConfigReader) -> Quantization | None:
    """None where the checkpoint is not quantised. Raises ModelError for a kind that is not known."""
    value = read.get("quantization_config")
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise read.error(f"quantization_config is {value!r}: expected an object")
    section = read.within("quantization_config", value)
    method = section.get("quant_method")
    if method == "fp8":
        return Quantization(method, "fp8", None, _block(section), _names(section, "modules_to_not_convert"))
    if method == "fbgemm_fp8":
        return Quantization(method, "fp8", None, None, _names(section, "modules_to_not_convert"))
    if method in ("awq", "gptq"):
        return Quantization(
            method, _integer_weights(section, "bits"), _group(section), None, _names(section, "modules_to_not_convert")
        )
    if method == "compressed-tensors":
        return _compressed_tensors(section)
    raise read.error(
        f"quantization_config.quant_method is {method!r}: "
        "expected one of fp8, fbgemm_fp8, compressed-tensors, awq, gptq"
    )


def _compressed_tensors(section: ConfigReader) -> Quantization:
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise section.error("quantization_config.config_groups: expected an object with exactly one group")
    name, group = next(iter(groups.items()))
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise section.error(f"quantization_config.config_groups.{name}.weights is missing")
    read = section.within(f"config_groups.{name}.weights", weights)
    kind: QuantizedWeights
    if read.get("type") == "float":
        if read.integer("num_bits") != 8:
            raise read.error(f"quantization_config.config_groups.{name}.weights: only 8-bit floats are supported")
        kind = "fp8"
    else:
        kind = _integer_weights(read, "num_bits")
    return Quantization("compressed-tensors", kind, _group(read), None, _names(section, "ignore"))


def _integer_weights(read: ConfigReader, name: str) -> QuantizedWeights:
    bits = read.integer(name)
    if bits not in (4, 8):
        raise read.error(f"quantization_config: {name} is {bits}, only 4 and 8 are supported")
    return "int4" if bits == 4 else "int8"


def _group(read: ConfigReader) -> int | None:
    return None if read.get("group_size") in (None, -1) else read.integer("group_size")


def _block(section: ConfigReader) -> tuple[int, int] | None:
    value: Any = section.get("weight_block_size")
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)):
        raise section.error(f"quantization_config.weight_block_size is {value!r}: expected two positive whole numbers")
    return value[0], value[1]


def _names(section: ConfigReader, name: str) -> tuple[str, ...]:
    value: Any = section.get(name)
    if value is None:
        return ()
    if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise section.error(f"quantization_config.{name} is {value!r}: expected a list of names")
    for entry in value:
        if entry.startswith("re:"):
            try:
                re.compile(entry[3:])
            except re.error as error:
                raise section.error(f"quantization_config.{name} has {entry!r}, no valid pattern: {error}") from error
    return tuple(value)
