"""Typed reading of a config.json's fields, with one sentence per thing that is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class ModelError(ValueError):
    """A config.json that cannot be served; the message names the file and the field."""


_MAX_SIZE = 2**31 - 1


class ConfigReader:
    """Reads fields of one JSON object; `section` is the path of a nested object, for messages."""

    def __init__(self, config: Mapping[str, Any], origin: str, section: str = "") -> None:
        self.config = config
        self._origin = origin
        self._section = section

    def error(self, sentence: str) -> ModelError:
        return ModelError(f"{self._origin}: {sentence}")

    def within(self, section: str, config: Mapping[str, Any]) -> ConfigReader:
        return ConfigReader(config, self._origin, f"{self._section}{section}.")

    def get(self, name: str) -> Any:
        """The raw value; None when absent or null."""
        return self.config.get(name)

    def integer(self, name: str, *, default: int | None = None, maximum: int = _MAX_SIZE) -> int:
        """A whole number from 1 to `maximum`; a missing field without a default is an error."""
        value = self._present(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"{self._section}{name} is {value!r}: expected a whole number")
        if not 1 <= value <= maximum:
            raise self.error(f"{self._section}{name} is {value}: expected a number from 1 to {maximum}")
        return value

    def number(self, name: str, *, default: float | None = None, minimum: float = 0.0) -> float:
        """A finite number above 0 and at least `minimum`."""
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{self._section}{name} is {value!r}: expected a number")
        if not math.isfinite(value) or value <= 0 or value < minimum:
            bound = f"of at least {minimum:g}" if minimum else "above 0"
            raise self.error(f"{self._section}{name} is {value!r}: expected a number {bound}")
        return float(value)

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self._present(name, default)
        if not isinstance(value, bool):
            raise self.error(f"{self._section}{name} is {value!r}: expected true or false")
        return value

    def _present(self, name: str, default: Any) -> Any:
        value = self.config.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"{self._section}{name} is missing")
        return value
