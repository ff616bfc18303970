"""Which path does what, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import unquote

from arriero_faces.http.errors import HttpError
from arriero_faces.http.exchange import JSON, Disconnected, Exchange
from arriero_worker.front.metrics import CONTENT_TYPE
from arriero_worker.front.openai.chat import chat_completions
from arriero_worker.front.openai.completions import completions
from arriero_worker.front.openai.encode import json_bytes
from arriero_worker.front.openai.tokenize import tokenize
from arriero_worker.front.service import Service, status_report

_Handler = Callable[[Exchange], Awaitable[None]]
_MODEL = "/v1/models/"


class HttpApi:
    """The handler of a replica's HttpServer."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._routes: dict[str, dict[str, _Handler]] = {
            "/v1/chat/completions": {"POST": lambda exchange: chat_completions(service, exchange)},
            "/v1/completions": {"POST": lambda exchange: completions(service, exchange)},
            "/v1/models": {"GET": self._models},
            "/tokenize": {"POST": lambda exchange: tokenize(service, exchange)},
            "/health": {"GET": self._ready},
            "/health/live": {"GET": self._live},
            "/health/ready": {"GET": self._ready},
            "/metrics": {"GET": self._metrics},
        }

    async def __call__(self, exchange: Exchange) -> None:
        route = exchange.path if exchange.path in self._routes else "other"
        if exchange.path.startswith(_MODEL):
            route = _MODEL
        status = "499"
        try:
            await self._dispatch(exchange)
            status = str(exchange.status)
        except HttpError as error:
            status = str(error.status)
            raise
        except (asyncio.CancelledError, Disconnected):
            raise
        except Exception:
            status = "500"
            raise
        finally:
            self._service.metrics.request("http", route, status)

    def refused(self, exchange: Exchange, error: HttpError) -> None:
        """A request that was refused below the API: for the count."""
        self._service.metrics.request("http", "other", str(error.status))

    async def _dispatch(self, exchange: Exchange) -> None:
        methods = self._routes.get(exchange.path)
        if methods is None and exchange.path.startswith(_MODEL):
            methods = {"GET": self._model}
        if methods is None:
            raise HttpError(404, f"there is nothing at {exchange.path[:200]}", code="unknown_url")
        method = "GET" if exchange.method == "HEAD" else exchange.method
        handler = methods.get(method)
        if handler is not None:
            await handler(exchange)
            return
        allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"])
        if method == "OPTIONS":
            exchange.respond(204, b"", headers=(("allow", allowed),))
            return
        raise HttpError(405, f"{exchange.method} is not for {exchange.path[:200]}", headers=(("allow", allowed),))

    async def _models(self, exchange: Exchange) -> None:
        exchange.respond(200, json_bytes({"object": "list", "data": [self._card(n) for n in self._service.names]}))

    async def _model(self, exchange: Exchange) -> None:
        name = unquote(exchange.path[len(_MODEL) :])
        if name not in self._service.names:
            raise HttpError(404, f"the model {name[:200]!r} does not exist", param="model", code="model_not_found")
        exchange.respond(200, json_bytes(self._card(name)))

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._service.started,
            "owned_by": "arriero",
            "root": self._service.names[0],
            "max_model_len": self._service.max_context,
        }

    async def _live(self, exchange: Exchange) -> None:
        exchange.respond(200, b'{"live":true}')

    async def _ready(self, exchange: Exchange) -> None:
        report = status_report(self._service)
        headers = () if report["ready"] else (("retry-after", "1"),)
        exchange.respond(200 if report["ready"] else 503, json_bytes(report), JSON, headers)

    async def _metrics(self, exchange: Exchange) -> None:
        exchange.respond(200, self._service.metrics.render(), CONTENT_TYPE)
