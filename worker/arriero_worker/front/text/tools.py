"""Tool calls in Llama 3's JSON format: `{"name": ..., "parameters": {...}}`, optionally behind `<|python_tag|>`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

PYTHON_TAG = "<|python_tag|>"
_decoder = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str
    """A JSON object, as text."""


class ToolGate:
    """Decides of a growing answer whether it is text or tool calls.

    An answer that begins like a call is held back until it ends; any other passes from its first character on.
    """

    __slots__ = ("_held", "_names", "_open")

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._held = ""
        self._open = False

    def feed(self, text: str) -> str:
        """What is certainly text."""
        if self._open:
            return text
        self._held += text
        begun = self._held.lstrip()
        if not begun or begun[0] in "{[" or begun.startswith(PYTHON_TAG) or PYTHON_TAG.startswith(begun):
            return ""
        self._open = True
        text, self._held = self._held, ""
        return text

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The answer has ended: (text still owed, []) or ("", calls)."""
        held, self._held = self._held, ""
        calls = [] if self._open else parse_tool_calls(held, self._names)
        if calls:
            return "", calls
        return (held if self._open else held.replace(PYTHON_TAG, "", 1)), []


def parse_tool_calls(answer: str, names: frozenset[str]) -> list[ToolCall]:
    """The calls an answer consists of: JSON objects one after another, separated by `;` or `,`, or in one list.

    [] where the answer is anything else, or calls a function that is not among `names`: then it is text.
    """
    rest = answer.strip().removeprefix(PYTHON_TAG).strip()
    values: list[Any] = []
    while rest:
        try:
            value, end = _decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        values += value if isinstance(value, list) else [value]
        rest = rest[end:].lstrip()
        if rest[:1] in (";", ","):
            rest = rest[1:].lstrip()
    calls = []
    for value in values:
        call = _call(value, names)
        if call is None:
            return []
        calls.append(call)
    return calls


def _call(value: Any, names: frozenset[str]) -> ToolCall | None:
    if not isinstance(value, dict):
        return None
    name = value.get("name")
    arguments = value.get("parameters", value.get("arguments"))
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))
