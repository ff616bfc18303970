"""POST /tokenize, as vLLM has it."""

from __future__ import annotations

from typing import Any

from arriero_faces.http.exchange import Exchange
from arriero_worker.front.openai.encode import json_bytes
from arriero_worker.front.openai.parse import parse_body, template_messages, template_tools
from arriero_worker.front.openai.schema import TokenizeRequest
from arriero_worker.front.sampling import refuse
from arriero_worker.front.service import Service


async def tokenize(service: Service, exchange: Exchange) -> None:
    """Answer one exchange. Raises HttpError."""
    request = parse_body(TokenizeRequest, exchange.body, exchange.header(b"content-type"))
    service.resolve_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise refuse("prompt", "exactly one of prompt and messages is needed")
    if request.messages is not None:
        going_on = bool(request.continue_final_message)
        if going_on and request.add_generation_prompt:
            raise refuse("continue_final_message", "cannot be combined with add_generation_prompt: true")
        text = service.render(
            template_messages(request.messages),
            template_tools(request.tools, None),
            add_generation_prompt=request.add_generation_prompt is not False and not going_on,
            continue_final_message=going_on,
            variables=request.chat_template_kwargs,
        )
        ids = await service.tokenize(text, special=bool(request.add_special_tokens), param="messages")
    else:
        assert request.prompt is not None
        ids = await service.tokenize(request.prompt, special=request.add_special_tokens is not False)
    body: dict[str, Any] = {"count": len(ids), "max_model_len": service.max_context, "tokens": ids}
    if request.return_token_strs:
        body["token_strs"] = [service.tokenizer.name_of(id) for id in ids]
    exchange.respond(200, json_bytes(body))
