"""From YAML text to a validated LlamaDeployment, with one sentence for each thing that is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from arriero_plan.resource import API_VERSION, KIND, PATTERN_WORDS, LlamaDeployment

__all__ = ["API_VERSION", "KIND", "LlamaDeployment", "SpecError", "parse_deployment"]

_MAX_CHARACTERS = 1 << 20
_MAX_NODES = 100_000
_MAX_DEPTH = 64

_KIND_WORDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


class SpecError(ValueError):
    """Not a valid LlamaDeployment; the message has a line for each problem, and `problems` lists them."""

    def __init__(self, origin: str, problems: Sequence[str]) -> None:
        super().__init__("\n".join(f"{origin}: {problem}" for problem in problems))
        self.problems = tuple(problems)


def parse_deployment(source: str | Mapping[str, Any], origin: str) -> LlamaDeployment:
    """Validate YAML (or JSON) text, or an already parsed mapping; `origin` names it in messages. Raises SpecError."""
    data = _load(source, origin) if isinstance(source, str) else source
    if not isinstance(data, Mapping):
        raise SpecError(
            origin, [f"expected a mapping with apiVersion, kind, metadata and spec, found {_describe(data)}"]
        )
    problems = _tree_problems(data)
    if problems:
        raise SpecError(origin, problems)
    try:
        return LlamaDeployment.model_validate(dict(data))
    except ValidationError as error:
        raise SpecError(origin, [_sentence(detail) for detail in error.errors()]) from error


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; YAML forbids it, and PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} appears twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _load(text: str, origin: str) -> Any:
    if len(text) > _MAX_CHARACTERS:
        raise SpecError(origin, [f"{len(text)} characters, more than the {_MAX_CHARACTERS} of a Kubernetes resource"])
    try:
        documents = [document for document in yaml.load_all(text, Loader=_UniqueKeys) if document is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise SpecError(origin, [f"{where}{error.problem or 'not valid YAML'}"]) from error
    except yaml.YAMLError as error:
        raise SpecError(origin, [" ".join(f"not valid YAML: {error}".split())]) from error
    except ValueError as error:
        raise SpecError(origin, [f"not valid YAML: {error}"]) from error
    except RecursionError as error:
        raise SpecError(origin, ["nested too deeply"]) from error
    if not documents:
        raise SpecError(origin, ["empty: expected a LlamaDeployment"])
    if len(documents) > 1:
        raise SpecError(origin, [f"{len(documents)} documents: expected one LlamaDeployment"])
    return documents[0]


def _tree_problems(data: Mapping[Any, Any]) -> list[str]:
    """Keys that are not strings, and trees too large or deep to be a resource (YAML anchors can build endless ones)."""
    problems: list[str] = []
    nodes = 0
    queue: list[tuple[str, Any, int]] = [("", data, 0)]
    while queue:
        path, value, depth = queue.pop()
        nodes += 1
        if depth > _MAX_DEPTH or nodes > _MAX_NODES:
            return ["nested too deeply" if depth > _MAX_DEPTH else f"more than {_MAX_NODES} values"]
        if isinstance(value, Mapping):
            for key, child in value.items():
                if isinstance(key, str):
                    queue.append((f"{path}.{key}" if path else key, child, depth + 1))
                else:
                    problems.append(f"{path or 'the document'}: the key {key!r} is not a string; put it in quotes")
        elif isinstance(value, list):
            queue.extend((f"{path}[{i}]", child, depth + 1) for i, child in enumerate(value))
    return problems


def _sentence(detail: ErrorDetails) -> str:
    """One problem as `path: what is wrong`."""
    location, kind = detail["loc"], detail["type"]
    context: Mapping[str, Any] = detail.get("ctx") or {}
    path = ".".join(str(part) for part in location)
    found = _describe(detail["input"])
    if kind == "extra_forbidden":
        return f"{path}: unknown field; {_nearest(location)}"
    if kind == "missing":
        return f"{path}: missing"
    if kind == "value_error":
        return f"{path}: {context['error']}"
    if kind == "literal_error":
        return f"{path}: {found} is not {_choice(str(context['expected']))}"
    if kind in _KIND_WORDS:
        return f"{path}: expected {_KIND_WORDS[kind]}, found {found}"
    if kind == "string_pattern_mismatch":
        words = PATTERN_WORDS.get(str(context["pattern"]), "no white space")
        return f"{path}: {found} is not valid; expected {words}"
    if kind in ("string_too_short", "string_too_long"):
        bound = "at least {min_length}" if kind == "string_too_short" else "at most {max_length}"
        return f"{path}: {len(detail['input'])} characters; expected {bound.format(**context)}"
    bounds = {
        "greater_than_equal": "at least {ge}",
        "greater_than": "above {gt}",
        "less_than_equal": "at most {le}",
    }
    if kind in bounds:
        return f"{path}: {found} is out of bounds; expected {bounds[kind].format(**context)}"
    return f"{path}: {detail['msg']}"


def _choice(expected: str) -> str:
    """Pydantic's "'a', 'b' or 'c'" without the quotes."""
    plain = expected.replace("'", "")
    return f"one of {plain}" if " or " in plain else plain


def _describe(value: Any) -> str:
    """A value as a person would recognise it from their file."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"{value[:60]!r}..." if len(value) > 60 else repr(value)
    if isinstance(value, int | float):
        return "a huge number" if isinstance(value, int) and abs(value) >= 10**20 else str(value)
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"


def _nearest(location: tuple[int | str, ...]) -> str:
    known = _fields_at(location[:-1])
    close = difflib.get_close_matches(str(location[-1]).lower(), [name.lower() for name in known], n=1, cutoff=0.6)
    if close:
        return f"did you mean {next(name for name in known if name.lower() == close[0])}?"
    return f"known here: {', '.join(known)}"


def _fields_at(location: Sequence[int | str]) -> list[str]:
    """Names of the fields that the schema has at a path, as YAML spells them."""
    model: type[BaseModel] = LlamaDeployment
    for part in location:
        field = next(field for field in model.model_fields.values() if field.alias == part)
        candidates = [field.annotation, *get_args(field.annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    # What the API server writes into metadata is accepted but nobody means it.
    return [str(field.alias) for field in model.model_fields.values() if field.annotation is not Any]
