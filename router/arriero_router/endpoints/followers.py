"""One set of followers for each endpoint that is there: its Status or a probe, and its prefix cache."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace

from arriero_router.core.replica import Endpoint, Report
from arriero_router.endpoints.cache import CacheFollower, OnMarks
from arriero_router.endpoints.channel import Security
from arriero_router.endpoints.probe import READY_PATH, Probe, ProbeLimits
from arriero_router.endpoints.status import Listener, StatusFollower, StatusLimits

log = logging.getLogger("arriero.endpoints")

_AFTER_A_FAULT = 1.0


class _Relay:
    """Passes on what is told of one replica; with its Status stream, what is known of its cache is in doubt as well."""

    def __init__(self, listener: Listener, cache: CacheFollower | None) -> None:
        self._listener = listener
        self._cache = cache

    def told(self, name: str, report: Report) -> None:
        self._listener.told(name, report)

    def lost(self, name: str, reason: str) -> None:
        self._listener.lost(name, reason)
        if self._cache is not None:
            self._cache.again()


class Followers:
    """Starts and stops followers as endpoints come, move and go.

    An endpoint with a control port is followed by `Worker.Status`, any other is probed over HTTP. With `on_marks`, an
    endpoint with a gRPC port is asked for its prefix cache as well. Nothing is told of an endpoint after the
    `set_endpoints` that took it away, so a pool that hears of the list first knows every name it is told of.
    """

    def __init__(
        self,
        listener: Listener,
        on_marks: OnMarks | None = None,
        *,
        status: StatusLimits | None = None,
        probe: ProbeLimits | None = None,
        ready_path: str = READY_PATH,
        security: Security | None = None,
    ) -> None:
        self._listener = listener
        self._on_marks = on_marks
        self._status = status
        self._probe = probe
        self._ready_path = ready_path
        self._security = security
        self._present: dict[str, tuple[Endpoint, list[asyncio.Task[None]]]] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def set_endpoints(self, endpoints: Sequence[Endpoint]) -> None:
        """The whole truth. Must be called where an event loop runs."""
        # Whether its pod is leaving changes nothing in how an endpoint is reached.
        wanted = {endpoint.name: replace(endpoint, terminating=False) for endpoint in endpoints}
        for name in [name for name, (endpoint, _) in self._present.items() if wanted.get(name) != endpoint]:
            self._stop(name)
        for name, endpoint in wanted.items():
            if name not in self._present:
                self._present[name] = (endpoint, self._start(endpoint))

    async def close(self) -> None:
        """Stop all and wait until they are gone."""
        self.set_endpoints(())
        if self._ending:
            await asyncio.wait(self._ending)

    def _start(self, endpoint: Endpoint) -> list[asyncio.Task[None]]:
        cache: CacheFollower | None = None
        if self._on_marks is not None and endpoint.grpc_port:
            cache = CacheFollower(endpoint, self._on_marks, self._security)
        listener = _Relay(self._listener, cache)
        health: StatusFollower | Probe
        if endpoint.control_port:
            health = StatusFollower(endpoint, listener, self._status)
        else:
            health = Probe(endpoint, listener, self._probe, self._ready_path, self._security)
        followers = [health] if cache is None else [health, cache]
        return [asyncio.create_task(_persist(follower.run, endpoint.name)) for follower in followers]

    def _stop(self, name: str) -> None:
        _, tasks = self._present.pop(name)
        for task in tasks:
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
            task.cancel()


async def _persist(run: Callable[[], Coroutine[None, None, None]], name: str) -> None:
    """A follower that fails for a reason nobody thought of is reported and started again: its replica would otherwise
    keep its last state for ever.
    """
    while True:
        try:
            return await run()
        except Exception:
            log.exception("replica %s: a follower failed", name)
            await asyncio.sleep(_AFTER_A_FAULT)
