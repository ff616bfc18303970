"""From YAML text to a validated LlamaDeployment, with one sentence for each thing that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arriero_plan.document import DocumentError, read_document
from arriero_plan.resource import API_VERSION, KIND, PATTERN_WORDS, LlamaDeployment

__all__ = ["API_VERSION", "KIND", "LlamaDeployment", "SpecError", "parse_deployment"]


class SpecError(DocumentError):
    """Not a valid LlamaDeployment; the message has a line for each problem, and `problems` lists them."""


def parse_deployment(source: str | Mapping[str, Any], origin: str) -> LlamaDeployment:
    """Validate YAML (or JSON) text, or an already parsed mapping; `origin` names it in messages. Raises SpecError."""
    return read_document(LlamaDeployment, source, origin, KIND, PATTERN_WORDS, SpecError)
