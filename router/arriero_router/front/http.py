"""Which path does what over HTTP, and what is noted of each request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import msgspec

from arriero_faces.http.errors import HttpError
from arriero_faces.http.exchange import JSON, Disconnected, Exchange
from arriero_faces.prefix import NOTHING, Marked, RoutedFields
from arriero_router.front.forward import Forward
from arriero_router.observe.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from arriero_router.front.auth import Principal
    from arriero_router.front.record import Record
    from arriero_router.router import Router
    from arriero_router.served import Served

_fields_of = msgspec.json.Decoder(RoutedFields).decode
_MODEL = "/v1/models/"


class HttpFace:
    """The handler of the router's HttpServer."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._forwarded: dict[str, tuple[Callable[[RoutedFields], Marked], bool]] = {
            "/v1/chat/completions": (RoutedFields.chat, True),
            "/v1/completions": (RoutedFields.text, True),
            "/tokenize": (lambda fields: NOTHING, False),
        }
        """What replicas answer: the marks of its prompt, and whether it generates."""
        self._pages: dict[str, Callable[[Exchange], Awaitable[None]]] = {
            "/v1/models": self._models,
            "/health": self._ready,
            "/health/live": self._live,
            "/health/ready": self._ready,
            "/metrics": self._metrics,
        }

    def __call__(self, exchange: Exchange) -> Coroutine[Any, Any, None] | None:
        forwarded = self._forwarded.get(exchange.path)
        if forwarded is None or exchange.method != "POST":
            return self._page(exchange)
        try:
            self._forward(exchange, *forwarded)
        except Exception as error:
            self._router.metrics.request("http", "", error.status if isinstance(error, HttpError) else 500)
            raise
        return None

    async def _page(self, exchange: Exchange) -> None:
        """What the router answers itself."""
        status = 499
        try:
            await self._route(exchange)
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
            self._router.metrics.request("http", "", status)

    def refused(self, exchange: Exchange, error: HttpError) -> None:
        """A request that was refused below this: for the count."""
        self._router.metrics.request("http", "", error.status)

    def _route(self, exchange: Exchange) -> Awaitable[None]:
        """Raises HttpError where nothing answers."""
        methods: list[str] = []
        if exchange.path in self._forwarded:
            methods = ["POST", "OPTIONS"]
        handler = self._pages.get(exchange.path)
        if handler is None and exchange.path.startswith(_MODEL):
            handler = self._model
        if handler is not None:
            methods = ["GET", "HEAD", "OPTIONS"]
            if exchange.method in ("GET", "HEAD"):
                return handler(exchange)
        if not methods:
            raise HttpError(404, f"there is nothing at {exchange.path[:200]}", code="unknown_url")
        allowed = ", ".join(methods)
        if exchange.method == "OPTIONS":
            return self._options(exchange, allowed)
        raise HttpError(405, f"{exchange.method} is not for {exchange.path[:200]}", headers=(("allow", allowed),))

    # -- what replicas answer

    def _forward(self, exchange: Exchange, mark: Callable[[RoutedFields], Marked], generates: bool) -> None:
        """Raises what refuses the request before it is on its way."""
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
        Forward(exchange, record, fields, generates, self._over).start(router.hold)

    def _over(self, exchange: Exchange, record: Record, error: Exception | None) -> None:
        """A request is over; `error` is what its client is to get, or why it got no more."""
        model = ""
        if error is None:
            model, record.status = record.served.name, exchange.status
        elif isinstance(error, HttpError):
            record.status, record.error, record.used = error.status, error.message, 0
        elif isinstance(error, Disconnected):
            record.error = "the client went away"
        else:
            record.status, record.error = 500, f"{type(error).__name__}: {error}"
        try:
            self._router.close(record)
            self._router.metrics.request("http", model, record.status)
        finally:
            exchange.done(error)

    def _principal(self, exchange: Exchange) -> Principal:
        return self._router.authorize(lambda name: exchange.header(name.encode()))

    # -- what the router answers itself

    async def _options(self, exchange: Exchange, allowed: str) -> None:
        exchange.respond(204, b"", headers=(("allow", allowed),))

    async def _models(self, exchange: Exchange) -> None:
        principal = self._principal(exchange)
        cards = [self._card(name, served) for name, served in self._router.names(principal)]
        exchange.respond(200, msgspec.json.encode({"object": "list", "data": cards}))

    async def _model(self, exchange: Exchange) -> None:
        principal = self._principal(exchange)
        name = unquote(exchange.path[len(_MODEL) :])
        served = self._router.resolve(name or "/", principal)
        exchange.respond(200, msgspec.json.encode(self._card(name, served)))

    def _card(self, name: str, served: Served) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": self._router.started,
            "owned_by": "arriero",
            "root": served.name,
            "ready_replicas": served.pool.ready,
        }

    async def _live(self, exchange: Exchange) -> None:
        exchange.respond(200, b'{"status":"live"}', JSON)

    async def _ready(self, exchange: Exchange) -> None:
        reason = self._router.unready
        if reason is not None:
            raise HttpError(503, f"not ready: {reason}", code="not_ready")
        models = {served.name: served.pool.ready for served in self._router.served}
        exchange.respond(200, msgspec.json.encode({"status": "ready", "ready_replicas": models}), JSON)

    async def _metrics(self, exchange: Exchange) -> None:
        exchange.respond(200, await self._router.all_metrics(), CONTENT_TYPE)


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
