"""One router process as an object: its models, its keys, its faces; start, reload, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator
from itertools import count
from typing import TYPE_CHECKING

from arriero_faces.http.errors import HttpError
from arriero_faces.http.server import HttpServer, bind
from arriero_faces.prefix import Marked
from arriero_router.config import Config, Model
from arriero_router.core.ask import FOREVER, Ask
from arriero_router.front.auth import ANYBODY, Keys, Principal
from arriero_router.front.forward import prompt_estimate
from arriero_router.front.grpc import GrpcFace
from arriero_router.front.http import HttpFace
from arriero_router.front.journey import HoldSettings
from arriero_router.front.record import Record
from arriero_router.observe.access_log import AccessLog
from arriero_router.observe.metrics import Metrics
from arriero_router.observe.siblings import Siblings
from arriero_router.security import Certificates, upstream_security
from arriero_router.served import Served

if TYPE_CHECKING:
    from arriero_router.observe.tracing import Tracing

_MOST_TOKENS = 1 << 20
"""That a request's estimate may come to, whatever it asks for."""

_LAST_WORDS = 0.5
"""Seconds for telling those who are still held at the end of a drain that they are refused."""

log = logging.getLogger("arriero.router")


class Router:
    """`start`, then `drain` and `stop`. What it says of itself is right at any time between."""

    def __init__(self, config: Config, siblings: Siblings | None = None, kubeconfig: str = "") -> None:
        """`siblings`: the other processes of this router, where there are any. `kubeconfig`: file for models whose
        endpoints are a cluster's and that name none. Raises ConfigError, OSError.
        """
        self.config = config
        self._kubeconfig = kubeconfig
        self.metrics = Metrics()
        self.started = int(time.time())
        self.draining = False
        self._leaving = False
        """It takes no new request."""
        self.served: list[Served] = []
        self._siblings = siblings
        self._run = secrets.token_hex(8)
        self._numbers = count()
        """With `_run`, the ids of requests that came without one."""
        self._by_name: dict[str, Served] = {}
        self._certificates = Certificates(config.tls) if config.tls is not None else None
        self._security = upstream_security(config.upstream_tls)
        self._keys: Keys | None = None
        self._log: AccessLog | None = None
        self._tracing: Tracing | None = None
        face = HttpFace(self)
        self.http = HttpServer(face, config.limits.http(), face.refused)
        self.grpc = GrpcFace(self)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def processes(self) -> int:
        return self.config.workers

    # -- life

    async def start(self) -> None:
        """Listen. Raises OSError, ConfigError."""
        self.loop = asyncio.get_running_loop()
        config = self.config
        self._configure(config)
        if config.auth is not None:
            self._keys = Keys(config.auth.keys_file, self.processes)
            self._watch(self._keys.watch())
        if config.tracing is not None:
            from arriero_router.observe.tracing import Tracing  # half a second of imports that most do without

            tracing = config.tracing
            self._tracing = Tracing(tracing.otlp_endpoint, tracing.sample_ratio, tracing.service_name)
        self._open_log(config.access_log.path)
        self.served = [self._serve(model) for model in config.models]
        self._by_name = {name: served for served in self.served for name in served.names}
        shared = self.processes > 1
        listen = config.listen
        context = self._certificates.context if self._certificates is not None else None
        await self.http.start(bind(listen.address, listen.http_port, shared=shared), context)
        if listen.grpc_port:
            await self.grpc.start(listen.address, listen.grpc_port, self._certificates, shared)
        if self._certificates is not None:
            self._watch(self._certificates.watch())
        if self._siblings is not None:
            await self._siblings.start(self.metrics.text)
        log.info("listening http_port=%d grpc_port=%d", listen.http_port, listen.grpc_port)

    def reload(self, config: Config) -> None:
        """Take over what can change while requests run; `config.changes` has kept what cannot."""
        before, self.config = self.config, config
        self._configure(config)
        if config.access_log.path != before.access_log.path:
            try:
                self._open_log(config.access_log.path)
            except OSError as error:
                log.error("the access log stays where it was: %s: %s", config.access_log.path, error.strerror)
        wanted = {model.name: model for model in config.models}
        kept = []
        for served in self.served:
            model = wanted.pop(served.name, None)
            if model is not None and served.fits(model, config):
                served.configure(model, config)
                kept.append(served)
                continue
            if model is not None:
                wanted[model.name] = model
            self._watch(served.retire(config.drain_seconds))
        made = {name: self._serve(model) for name, model in wanted.items()}
        by_name = {served.name: served for served in kept} | made
        self.served = [by_name[model.name] for model in config.models]
        self._by_name = {name: served for served in self.served for name in served.names}

    def reopen_log(self) -> None:
        if self._log is not None:
            try:
                self._log.reopen()
            except OSError as error:
                log.error("the access log cannot be opened again: %s", error.strerror)

    async def drain(self, seconds: float, leave: float = 0.0) -> bool:
        """Not ready any more; whether all requests ended within `seconds`.

        For the first `leave` of them nothing else changes but that answers end their connections: whoever deals out
        traffic learns only by and by that none should come here. Then new requests are refused, gRPC clients are told
        to go elsewhere, and what runs may end. What is still held at the end is refused, what is being answered is cut
        off.
        """
        log.info("draining, for %g s at most", seconds)
        self.draining = self.http.draining = True
        self.grpc.drain()
        deadline = time.monotonic() + seconds
        await asyncio.sleep(min(leave, seconds))
        self._leaving = True
        self.http.drain()
        self._watch(self.grpc.leave(max(0.0, deadline - time.monotonic()) + _LAST_WORDS))
        if await self._finished(deadline):
            return True
        for served in self.served:
            served.dispatcher.turn_away("the router is leaving")
        await self._finished(time.monotonic() + _LAST_WORDS, held=True)
        if left := self.http.busy + self.grpc.busy:
            log.warning("the drain's time is over; %d requests are cut off", left)
        return not left

    async def _finished(self, deadline: float, held: bool = False) -> bool:
        """Whether no request is left in time; `held`: none that waits."""
        while any(served.dispatcher.held for served in self.served) if held else self.http.busy + self.grpc.busy:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    async def stop(self) -> None:
        await self.http.stop()
        await self.grpc.stop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for served in self.served:
            await served.close()
        if self._siblings is not None:
            await self._siblings.stop()
        if self._log is not None:
            self._log.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    def _configure(self, config: Config) -> None:
        self.hold = HoldSettings(config.hold.after_seconds, config.hold.keep_alive_seconds)
        self.answer_tokens = config.answer_tokens
        self.http.limits = config.limits.http()

    def _serve(self, model: Model) -> Served:
        weights = self._keys.weights if self._keys is not None else {}
        return Served(model, self.config, self.metrics, self._security, weights, self._kubeconfig)

    def _open_log(self, path: str) -> None:
        fresh = AccessLog(path) if path != "off" else None
        if self._log is not None:
            self._log.close()
        self._log = fresh

    def _watch(self, coroutine: Coroutine[None, None, None]) -> None:
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- for the faces

    @property
    def unready(self) -> str | None:
        """Why no traffic should come here; None where it should.

        A router without ready replicas is ready: it holds requests, which nobody else would.
        """
        return "draining" if self.draining else None

    def authorize(self, header: Callable[[str], str | None]) -> Principal:
        """Whose request it is, by its headers. Raises HttpError 401."""
        if self._keys is None:
            return ANYBODY
        return self._keys.identify(header("authorization"), header("x-api-key"))

    def resolve(self, name: str | None, principal: Principal) -> Served:
        """The model asked for; the first where none was named. Raises HttpError 404, 403."""
        served = self.served[0] if not name else self._by_name.get(name)
        if served is None:
            raise HttpError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")
        principal.check_model(served.names)
        return served

    def names(self, principal: Principal) -> Iterator[tuple[str, Served]]:
        """Every name that the principal may ask for."""
        for name, served in self._by_name.items():
            if principal.may_use(served.names):
                yield name, served

    def open(
        self,
        *,
        face: str,
        path: str,
        peer: str,
        principal: Principal,
        served: Served,
        marked: Marked,
        answer_tokens: int,
        session: str,
        priority: int,
        streamed: bool,
        trace: Callable[[str], str | None],
        seconds: float = FOREVER,
    ) -> Record:
        """Begin a request, counted against its key's limits; to be closed. `trace` reads the client's trace headers,
        `seconds` is the client's own limit for all of it. Raises HttpError 429, 503.
        """
        if self._leaving:
            raise HttpError(503, "the router is leaving", code="draining", retry_after=1)
        now = time.monotonic()
        if self._keys is not None:
            # A key's priority is what its requests may not go before.
            priority = principal.priority + max(0, priority)
        ask = Ask(
            model=served.name,
            marks=marked.marks,
            size=marked.size,
            session=session,
            tenant=principal.name,
            priority=priority,
            tokens=prompt_estimate(marked.size) + min(max(0, answer_tokens), _MOST_TOKENS),
            deadline=now + min(served.hold_seconds, seconds),
        )
        record = Record(
            face=face,
            path=path,
            peer=peer,
            principal=principal,
            served=served,
            ask=ask,
            began=now,
            streamed=streamed,
            request_id=f"{self._run}{next(self._numbers):08x}",
        )
        if self._keys is not None:
            self._keys.admit(principal, ask.tokens, now)
        if self._tracing is not None:
            record.trace = self._tracing.begin(path, trace("traceparent"), trace("tracestate"))
        served.entered()
        return record

    def close(self, record: Record) -> None:
        """The request is over."""
        record.served.left()
        used = record.ask.tokens if record.used is None else record.used
        if used != record.ask.tokens:
            record.served.dispatcher.settle(record.ask, used)
        if self._keys is not None:
            self._keys.settle(record.principal, record.ask.tokens, used, time.monotonic())
        if self._log is None and record.trace is None:
            return
        fields = record.fields()
        if record.trace is not None:
            fields["trace_id"] = record.trace.trace_id
            record.trace.end(fields, record.error)
        if self._log is not None:
            self._log.write(fields)

    async def all_metrics(self) -> bytes:
        if self._siblings is None:
            return self.metrics.text()
        return await self._siblings.metrics(self.metrics.text())
