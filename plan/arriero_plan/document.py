"""From YAML text to a validated pydantic model, with one sentence for each thing that is wrong.

A model read here is strict, forbids extra fields and names its fields by aliases (camelCase); lists are tuples.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

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
    "tuple_type": "a list",
    "list_type": "a list",
}

M = TypeVar("M", bound=BaseModel)


class DocumentError(ValueError):
    """Not a valid document; the message has a line for each problem, and `problems` lists them."""

    def __init__(self, origin: str, problems: Sequence[str]) -> None:
        super().__init__("\n".join(f"{origin}: {problem}" for problem in problems))
        self.problems = tuple(problems)


def read_document(
    model: type[M],
    source: str | Mapping[str, Any],
    origin: str,
    name: str,
    patterns: Mapping[str, str],
    error: type[DocumentError] = DocumentError,
    context: Mapping[str, Any] | None = None,
) -> M:
    """Validate YAML (or JSON) text, or an already parsed mapping, as a `model`.

    origin: names the source in messages
    name: names what is expected, as "LlamaDeployment"
    patterns: what each regular expression of the model means, in words
    error: what is raised
    context: what the model's validators get to know (pydantic's `info.context`)
    """
    data = load_yaml(source, origin, name, error) if isinstance(source, str) else source
    if not isinstance(data, Mapping):
        required = [str(field.alias) for field in model.model_fields.values() if field.is_required()]
        raise error(origin, [f"expected a mapping with {_and(required)}, found {describe(data)}"])
    problems = _tree_problems(data)
    if problems:
        raise error(origin, problems)
    try:
        return model.model_validate(dict(data), context=context)
    except ValidationError as caught:
        details = caught.errors()
        raise error(
            origin, [_sentence(model, patterns, each) for each in details if not _follows(each, details)]
        ) from caught


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


def load_yaml(text: str, origin: str, name: str, error: type[DocumentError] = DocumentError) -> Any:
    """The one document of a YAML (or JSON) text, as plain values. Raises `error`."""
    if len(text) > _MAX_CHARACTERS:
        raise error(origin, [f"{len(text)} characters, more than the {_MAX_CHARACTERS} of a Kubernetes resource"])
    try:
        documents = [document for document in yaml.load_all(text, Loader=_UniqueKeys) if document is not None]
    except yaml.MarkedYAMLError as caught:
        mark = caught.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise error(origin, [f"{where}{caught.problem or 'not valid YAML'}"]) from caught
    except yaml.YAMLError as caught:
        raise error(origin, [" ".join(f"not valid YAML: {caught}".split())]) from caught
    except ValueError as caught:
        raise error(origin, [f"not valid YAML: {caught}"]) from caught
    except RecursionError as caught:
        raise error(origin, ["nested too deeply"]) from caught
    if not documents:
        raise error(origin, [f"empty: expected a {name}"])
    if len(documents) > 1:
        raise error(origin, [f"{len(documents)} documents: expected one {name}"])
    return documents[0]


def _tree_problems(data: Mapping[Any, Any]) -> list[str]:
    """Keys that are not strings, and trees too large or deep to be meant (YAML anchors can build endless ones)."""
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


def _follows(detail: ErrorDetails, details: Sequence[ErrorDetails]) -> bool:
    """Whether a list only counts as too short because entries of it were refused."""
    here = detail["loc"]
    return detail["type"] == "too_short" and any(
        len(other["loc"]) > len(here) and other["loc"][: len(here)] == here for other in details
    )


def _sentence(model: type[BaseModel], patterns: Mapping[str, str], detail: ErrorDetails) -> str:
    """One problem as `path: what is wrong`."""
    location, kind = detail["loc"], detail["type"]
    context: Mapping[str, Any] = detail.get("ctx") or {}
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
    if not path:
        return str(context.get("error", detail["msg"]))
    return f"{path}: {_what(model, patterns, detail, location, kind, context)}"


def _what(
    model: type[BaseModel],
    patterns: Mapping[str, str],
    detail: ErrorDetails,
    location: tuple[int | str, ...],
    kind: str,
    context: Mapping[str, Any],
) -> str:
    found = describe(detail["input"])
    if kind == "extra_forbidden":
        return f"unknown field; {_nearest(model, location)}"
    if kind == "missing":
        return "missing"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return f"{found} is not {_choice(str(context['expected']))}"
    if kind in _KIND_WORDS:
        return f"expected {_KIND_WORDS[kind]}, found {found}"
    if kind == "string_pattern_mismatch":
        return f"{found} is not valid; expected {patterns.get(str(context['pattern']), 'no white space')}"
    if kind in ("string_too_short", "string_too_long"):
        bound = "at least {min_length}" if kind == "string_too_short" else "at most {max_length}"
        return f"{len(detail['input'])} characters; expected {bound.format(**context)}"
    if kind in ("too_short", "too_long"):
        bound = "at least {min_length}" if kind == "too_short" else "at most {max_length}"
        return f"{len(detail['input'])} entries; expected {bound.format(**context)}"
    bounds = {
        "greater_than_equal": "at least {ge}",
        "greater_than": "above {gt}",
        "less_than_equal": "at most {le}",
    }
    if kind in bounds:
        return f"{found} is out of bounds; expected {bounds[kind].format(**context)}"
    return detail["msg"]


def _choice(expected: str) -> str:
    """Pydantic's "'a', 'b' or 'c'" without the quotes."""
    plain = expected.replace("'", "")
    return f"one of {plain}" if " or " in plain else plain


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def describe(value: Any) -> str:
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
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


def _nearest(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    known = _fields_at(model, location[:-1])
    close = difflib.get_close_matches(str(location[-1]).lower(), [name.lower() for name in known], n=1, cutoff=0.6)
    if close:
        return f"did you mean {next(name for name in known if name.lower() == close[0])}?"
    return f"known here: {', '.join(known)}"


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Names of the fields that the schema has at a path, as YAML spells them."""
    for part in location:
        if isinstance(part, str):
            field = next(field for field in model.model_fields.values() if field.alias == part)
            model = next(models_in(field.annotation))
    # What the API server writes into metadata is accepted but nobody means it.
    return [str(field.alias) for field in model.model_fields.values() if field.annotation is not Any]


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a field's annotation names: itself, or inside a union or a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)
