"""Which path does what over HTTP, and what is noted of each request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING
from urllib.parse import unquote

import msgspec

from arriero_faces.http.errors import HttpError
from arriero_faces.http.exchange import JSON, Disconnected, Exchange
from arriero_faces.prefix import NOTHING, Marked, RoutedFields
from arriero_router.front.forward import Forward
from arriero_router.observe.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from arriero_router.front.auth import Principal
    from arriero_router.router import Router
    from arriero_router.served import Served

_fields_of = msgspec.json.Decoder(RoutedFields).decode
_MODEL = "/v1/models/"
_Handler = Callable[[Exchange], Awaitable[str]]
"""Answers, and returns the model's name for the count ("" where there is none)."""


class HttpFace:
    """The handler of the router's HttpServer."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._routes: dict[str, dict[str, _Handler]] = {
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/completions": {"POST": self._completions},
            "/tokenize": {"POST": self._tokenize},
            "/v1/models": {"GET": self._models},
            "/health": {"GET": self._ready},
            "/health/live": {"GET": self._live},
            "/health/ready": {"GET": self._ready},
            "/metrics": {"GET": self._metrics},
        }

    async def __call__(self, exchange: Exchange) -> None:
        model, status = "", 499
        try:
            model = await self._route(exchange)
            status = exchange.status
        except HttpError as error:
            status = error.status
            raise
        except (asyncio.CancelledError, Disconnected):
            raise
        except Exception:
            status = 500
            raise
        finally:
            self._router.metrics.request("http", model, status)

    def refused(self, exchange: Exchange, error: HttpError) -> None:
        """A request that was refused below this: for the count."""
        self._router.metrics.request("http", "", error.status)

    def _route(self, exchange: Exchange) -> Awaitable[str]:
        """Raises HttpError where nothing answers."""
        methods = self._routes.get(exchange.path)
        if methods is None and exchange.path.startswith(_MODEL):
            methods = {"GET": self._model}
        if methods is None:
            raise HttpError(404, f"there is nothing at {exchange.path[:200]}", code="unknown_url")
        handler = methods.get("GET" if exchange.method == "HEAD" else exchange.method)
        if handler is not None:
            return handler(exchange)
        allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"])
        if exchange.method == "OPTIONS":
            return self._options(exchange, allowed)
        raise HttpError(405, f"{exchange.method} is not for {exchange.path[:200]}", headers=(("allow", allowed),))

    # -- what replicas answer

    def _chat(self, exchange: Exchange) -> Awaitable[str]:
        return self._forward(exchange, RoutedFields.chat)

    def _completions(self, exchange: Exchange) -> Awaitable[str]:
        return self._forward(exchange, RoutedFields.text)

    def _tokenize(self, exchange: Exchange) -> Awaitable[str]:
        return self._forward(exchange, lambda fields: NOTHING, generates=False)

    async def _forward(self, exchange: Exchange, mark: Callable[[RoutedFields], Marked], generates: bool = True) -> str:
        router = self._router
        principal = self._principal(exchange)
        fields = _parsed(exchange)
        served = router.resolve(fields.model, principal)
        limit = fields.max_completion_tokens or fields.max_tokens
        session = (exchange.header(served.session_header) or fields.user or "") if served.by_session else ""
        record = router.open(
            face="http",
            path=exchange.path,
            peer=exchange.peer,
            principal=principal,
            served=served,
            marked=mark(fields),
            answer_tokens=(router.answer_tokens if limit is None else limit) * (fields.n or 1) if generates else 0,
            session=session,
            priority=fields.priority or 0,
            streamed=generates and bool(fields.stream),
            trace=lambda name: exchange.header(name.encode()),
        )
        try:
            await Forward(exchange, record, fields, generates).run(router.hold)
            record.status = exchange.status
        except HttpError as error:
            record.status, record.error, record.used = error.status, error.message, 0
            raise
        except (asyncio.CancelledError, Disconnected):
            record.error = "the client went away"
            raise
        except Exception as error:
            record.status, record.error = 500, f"{type(error).__name__}: {error}"
            raise
        finally:
            router.close(record)
        return served.name

    def _principal(self, exchange: Exchange) -> Principal:
        return self._router.authorize(lambda name: exchange.header(name.encode()))

    # -- what the router answers itself

    async def _options(self, exchange: Exchange, allowed: str) -> str:
        exchange.respond(204, b"", headers=(("allow", allowed),))
        return ""

    async def _models(self, exchange: Exchange) -> str:
        principal = self._principal(exchange)
        cards = [self._card(name, served) for name, served in self._router.names(principal)]
        exchange.respond(200, msgspec.json.encode({"object": "list", "data": cards}))
        return ""

    async def _model(self, exchange: Exchange) -> str:
        principal = self._principal(exchange)
        name = unquote(exchange.path[len(_MODEL) :])
        served = self._router.resolve(name or "/", principal)
        exchange.respond(200, msgspec.json.encode(self._card(name, served)))
        return ""

    def _card(self, name: str, served: Served) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": self._router.started,
            "owned_by": "arriero",
            "root": served.name,
            "ready_replicas": served.pool.ready,
        }

    async def _live(self, exchange: Exchange) -> str:
        exchange.respond(200, b'{"status":"live"}', JSON)
        return ""

    async def _ready(self, exchange: Exchange) -> str:
        reason = self._router.unready
        if reason is not None:
            raise HttpError(503, f"not ready: {reason}", code="not_ready")
        models = {served.name: served.pool.ready for served in self._router.served}
        exchange.respond(200, msgspec.json.encode({"status": "ready", "ready_replicas": models}), JSON)
        return ""

    async def _metrics(self, exchange: Exchange) -> str:
        exchange.respond(200, await self._router.all_metrics(), CONTENT_TYPE)
        return ""


def _parsed(exchange: Exchange) -> RoutedFields:
    """Raises HttpError 400: a replica would say the same, at more cost."""
    try:
        return _fields_of(exchange.body)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        field = path.rstrip("`") or None
        raise HttpError(400, f"{field}: {message}" if field else message, param=field) from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise HttpError(400, f"the body is not valid JSON: {error}") from error
