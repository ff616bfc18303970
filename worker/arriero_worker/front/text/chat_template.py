"""Conversations to text with the model's own Hugging Face template, in jinja2's sandbox as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from arriero_worker.front.text.tokenizer import read_json
from arriero_worker.front.text.vocabulary import TokenizerError

_MARK = "ARRIERO_CONTINUES_HERE "
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


class TemplateRefusal(ValueError):
    """The template does not accept this conversation; the message is the template's own where it has one."""


class ChatTemplate:
    """The model's templates by name: `default`, and `tool_use` where tools have one of their own."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str], origin: str) -> None:
        environment = _environment()
        self._special_tokens = dict(special_tokens)
        self._templates = {}
        for name, source in templates.items():
            try:
                self._templates[name] = environment.from_string(source)
            except jinja2.TemplateError as error:
                raise TokenizerError(f"{origin}: chat template {name!r}: {error}") from error

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text, special tokens included. Raises TemplateRefusal.

        With `continue_final_message` the text ends with the last message's content, its turn left open. `variables` are
        further names for the template.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        template = self._templates.get(name)
        if template is None:
            raise TemplateRefusal("the model has no chat template; use completions instead")
        for reserved in _RESERVED:
            if variables and reserved in variables:
                raise TemplateRefusal(f"{reserved} cannot be a template variable of its own")
        if continue_final_message:
            messages = _marked(messages)
        try:
            text = template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self._special_tokens, **(variables or {})},
            )
        except jinja2.TemplateError as error:
            raise TemplateRefusal(f"the chat template refused the conversation: {error}") from error
        except Exception as error:  # a template runs arbitrary expressions on the client's data
            raise TemplateRefusal(f"the chat template failed on the conversation: {error}") from error
        return _cut_at_mark(text) if continue_final_message else text


def load_chat_template(
    model_path: Path, tokenizer_config: Mapping[str, Any], special: Mapping[str, str]
) -> ChatTemplate:
    """From chat_template.jinja (and chat_templates/), chat_template.json, or tokenizer_config.json, the first there is.

    A model without one can be loaded; rendering then refuses. Raises TokenizerError where one does not compile.
    """
    jinja_file, json_file = model_path / "chat_template.jinja", model_path / "chat_template.json"
    if jinja_file.is_file():
        sources = {"default": jinja_file.read_text(encoding="utf-8")}
        more = sorted((model_path / "chat_templates").glob("*.jinja"))
        sources |= {path.stem: path.read_text(encoding="utf-8") for path in more}
        return ChatTemplate(sources, special, str(jinja_file))
    if json_file.is_file():
        return ChatTemplate(_sources(read_json(json_file).get("chat_template"), json_file), special, str(json_file))
    path = model_path / "tokenizer_config.json"
    return ChatTemplate(_sources(tokenizer_config.get("chat_template"), path), special, str(path))


def _sources(value: Any, path: Path) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in value}
    except (TypeError, KeyError) as error:
        raise TokenizerError(f"{path}: chat_template is neither a string nor a list of name and template") from error


def _marked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with a mark behind the last one's content, by which its end is found in the rendered text."""
    last = messages[-1] if messages else {}
    if not isinstance(last.get("content"), str):
        raise TemplateRefusal("continue_final_message: the last message has no text to continue")
    return [*messages[:-1], {**last, "content": last["content"] + _MARK}]


def _cut_at_mark(text: str) -> str:
    at = text.rfind(_MARK.rstrip())
    if at < 0:
        raise TemplateRefusal("continue_final_message: the chat template left out the last message")
    if text[at : at + len(_MARK)] == _MARK:
        return text[:at]
    return text[:at].rstrip()  # the template trims contents, so it would have trimmed this one


class _Generation(Extension):
    """`{% generation %}` marks the assistant's own text for training; here it renders what is inside."""

    tags = {"generation"}  # noqa: RUF012  # declared so by jinja2

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which a model has not been trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment
