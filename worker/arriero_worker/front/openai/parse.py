"""JSON bodies to schemas, and schemas to what the request core takes; every refusal names the field."""

from __future__ import annotations

import difflib
import json
import re
from typing import Any, TypeVar

import msgspec

from arriero_faces.http.errors import HttpError
from arriero_worker.front.openai.schema import (
    NEUTRAL,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    GenerationFields,
    TokenizeRequest,
    Tool,
)
from arriero_worker.front.sampling import SamplingFields, bounded, refuse

_Schema = TypeVar("_Schema", CompletionRequest, ChatRequest, TokenizeRequest)
_PATH = re.compile(r"^(.*) - at `(?:key in )?\$\.?(.*)`$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(.*)`$", re.DOTALL)
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_TOOLS = 128
MAX_MESSAGES = 4096


def parse_body(schema: type[_Schema], body: bytes, content_type: str | None) -> _Schema:
    """Raises HttpError: 415 for a declared type that is not JSON, 400 for anything the schema does not hold."""
    if content_type is not None and content_type.split(";")[0].strip().lower() not in ("application/json", ""):
        raise HttpError(415, f"the body must be application/json, not {content_type[:100]!r}")
    try:
        return msgspec.json.decode(body, type=schema)
    except msgspec.ValidationError as error:
        raise _invalid(schema, str(error)) from None
    except RecursionError:
        raise HttpError(400, "the body is nested too deeply") from None
    except ValueError as error:  # DecodeError and UnicodeDecodeError
        raise HttpError(400, f"the body is not JSON: {error}") from None


def _invalid(schema: type[Any], message: str) -> HttpError:
    path = ""
    if match := _PATH.match(message):
        message, path = match[1], match[2]
    if match := _UNKNOWN.match(message):
        param = f"{path}.{match[1]}" if path else match[1]
        near = [] if path else difflib.get_close_matches(match[1], schema.__struct_fields__, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return HttpError(400, f"{param[:200]}: unknown field{hint}", param=param[:200], code="unknown_field")
    if match := _MISSING.match(message):
        param = f"{path}.{match[1]}" if path else match[1]
        return HttpError(400, f"{param}: this field is required", param=param, code="missing_field")
    if not path:
        return HttpError(400, f"the body: {message[0].lower()}{message[1:]}")
    return HttpError(400, f"{path}: {message[0].lower()}{message[1:]}", param=path)


def check_neutral(request: GenerationFields) -> None:
    """Raises HttpError for a known field that is not served, unless its value asks for nothing."""
    for name in request.__struct_fields__:
        if name in NEUTRAL:
            value = getattr(request, name)
            if value is not None and not any(type(value) is type(v) and value == v for v in NEUTRAL[name]):
                raise refuse(name, "not supported", "unsupported_field")
    if request.response_format is not None and request.response_format.type != "text":
        raise refuse("response_format", "only the type text is supported", "unsupported_field")
    if request.stream_options is not None and not request.stream:
        raise refuse("stream_options", "only allowed with stream")
    if request.priority is not None:
        bounded("priority", request.priority, -(2**31), 2**31 - 1)
    if request.cache_salt is not None and len(request.cache_salt) > 256:
        raise refuse("cache_salt", "at most 256 characters")
    if request.prompt_logprobs is not None and request.stream:
        raise refuse("prompt_logprobs", "not available with stream")


def sampling_fields(request: GenerationFields) -> SamplingFields:
    """The shared fields; the caller adds max_tokens, n and logprobs where its schema differs."""
    stop = request.stop
    return SamplingFields(
        max_tokens=request.max_tokens,
        min_tokens=request.min_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=_biases(request.logit_bias),
        seed=request.seed,
        stop=[] if stop is None else [stop] if isinstance(stop, str) else stop,
        stop_token_ids=request.stop_token_ids or [],
        ignore_eos=bool(request.ignore_eos),
        n=request.n,
        prompt_logprobs=request.prompt_logprobs,
    )


def _biases(biases: dict[str, float] | None) -> dict[int, float]:
    result = {}
    for key, bias in (biases or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise refuse("logit_bias", f"{key[:40]!r} is not a token id")
        result[int(key)] = bias
    return result


def prompts_of(prompt: str | list[Any]) -> list[str | list[int]]:
    """A completion's prompts: one string, several, one list of ids, or several. Raises HttpError."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise refuse("prompt", "must not be empty")
    kinds = {type(item) for item in prompt}
    if kinds == {int}:
        return [prompt]
    if kinds in ({str}, {list}):
        return prompt
    raise refuse("prompt", "must be a string, a list of strings, a list of token ids, or a list of lists of token ids")


def template_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """As chat templates expect them: contents as text, a call's arguments as an object. Raises HttpError."""
    if not messages:
        raise refuse("messages", "must not be empty")
    if len(messages) > MAX_MESSAGES:
        raise refuse("messages", f"at most {MAX_MESSAGES} messages")
    result = []
    for i, message in enumerate(messages):
        for name in ("audio", "function_call"):
            if getattr(message, name) is not None:
                raise refuse(f"messages[{i}].{name}", "not supported", "unsupported_field")
        plain: dict[str, Any] = {"role": message.role, "content": _content(message.content, f"messages[{i}].content")}
        if message.content is None and not message.tool_calls:
            if message.role != "assistant":
                raise refuse(f"messages[{i}].content", "this field is required")
            plain["content"] = ""
        if message.name is not None:
            plain["name"] = message.name
        if message.tool_call_id is not None:
            plain["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            if message.role != "assistant":
                raise refuse(f"messages[{i}].tool_calls", "only an assistant calls tools")
            plain["tool_calls"] = [_tool_call(call, i, k) for k, call in enumerate(message.tool_calls)]
        result.append(plain)
    return result


def _content(content: Any, param: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    texts = []
    for k, part in enumerate(content):
        if part.type != "text":
            raise refuse(f"{param}[{k}].type", f"{part.type[:40]!r} parts are not supported, only text")
        if part.text is None:
            raise refuse(f"{param}[{k}].text", "this field is required")
        texts.append(part.text)
    return "\n".join(texts)


def _tool_call(call: Any, i: int, k: int) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise refuse(f"messages[{i}].tool_calls[{k}].function.arguments", "must be a JSON object, as text")
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


def template_tools(tools: list[Tool] | None, tool_choice: Any) -> list[dict[str, Any]] | None:
    """The tools the model may call, for the template; None where there are none to call. Raises HttpError."""
    if tool_choice not in (None, "none", "auto"):
        raise refuse("tool_choice", "only none and auto are supported", "unsupported_field")
    if not tools:
        if tool_choice == "auto":
            raise refuse("tool_choice", "only allowed with tools")
        return None
    if len(tools) > MAX_TOOLS:
        raise refuse("tools", f"at most {MAX_TOOLS} tools")
    for i, tool in enumerate(tools):
        if not _TOOL_NAME.fullmatch(tool.function.name):
            raise refuse(f"tools[{i}].function.name", "must be 1 to 64 letters, digits, underscores, dots or dashes")
        if tool.function.strict:
            raise refuse(f"tools[{i}].function.strict", "not supported", "unsupported_field")
    if tool_choice == "none":
        return None
    return [{"type": "function", "function": msgspec.to_builtins(tool.function)} for tool in tools]
