"""One operator at a time: a Lease, renewed while it leads and given back when it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from arriero_operator.runtime import metrics
from arriero_operator.runtime.api import Api, ApiError
from arriero_operator.runtime.kinds import Kind

log = logging.getLogger("arriero.operator")

LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")
NAME = "arriero-operator"


class LeadershipLost(Exception):
    """The lease could not be renewed in time: another operator may lead."""


class Election:
    """Holds, or waits for, the lease (client-go's protocol: a holder that does not renew for `seconds`, by the
    watcher's own clock, is over).
    """

    def __init__(self, api: Api, namespace: str, identity: str, seconds: int = 15) -> None:
        self.trouble = "the lease has not been asked for yet"
        """Why this operator neither leads nor stands by; empty: it does."""
        self._api = api
        self._namespace = namespace
        self._identity = identity
        self._seconds = seconds
        self._renew = seconds / 7.5
        self._deadline = seconds * 2 / 3
        self._seen: Any = None
        self._seen_at = 0.0

    async def lead(self, work: Callable[[], Awaitable[None]]) -> None:
        """Wait for the lease, then work until it is lost (LeadershipLost) or the work ends; then give it back."""
        loop = asyncio.get_running_loop()
        while True:
            asked = loop.time()
            if await self._held_by(asked + self._deadline):
                break
            await asyncio.sleep(self._renew)  # nobody tells when a lease runs out
        log.info("%s leads", self._identity)
        metrics.LEADER.set(1)
        renewing = asyncio.create_task(self._keep(asked))
        working = asyncio.ensure_future(work())
        try:
            await asyncio.wait((renewing, working), return_when=asyncio.FIRST_COMPLETED)
        finally:
            metrics.LEADER.set(0)
            lost = renewing.done()
            for task in (renewing, working):
                task.cancel()
            results = await asyncio.gather(renewing, working, return_exceptions=True)
            if not lost:
                await self._give_back()
        for result in reversed(results):
            if isinstance(result, Exception):
                raise result

    async def _keep(self, renewed: float) -> None:
        """renewed: when the lease was last asked for with success. Others count from when they see the answer to that,
        which is later: a slow answer must not make this one believe in its lease for longer.
        """
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(self._renew, max(0.0, renewed + self._deadline - loop.time())))
            asked = loop.time()
            if await self._held_by(renewed + self._deadline):
                renewed = asked
            elif self._seen is not None and self._holder(self._seen) != self._identity:
                raise LeadershipLost(f"the lease was taken by {self._holder(self._seen) or 'nobody'}")
            elif loop.time() >= renewed + self._deadline:
                raise LeadershipLost(
                    f"the lease could not be renewed for {self._deadline:g} s: {self.trouble or 'no answer'}"
                )

    async def _held_by(self, deadline: float) -> bool:
        """Whether the lease is ours, by an answer that came before the deadline."""
        try:
            async with asyncio.timeout_at(deadline):
                return await self._try()
        except TimeoutError:
            self.trouble = "the API server does not answer"
            return False

    async def _try(self) -> bool:
        """Take or renew the lease, if it is ours or nobody's. Whether it is ours now."""
        try:
            taken = await self._take()
        except ApiError as error:
            if error.status != 409:
                self.trouble = str(error)
                log.warning("lease %s: %s", NAME, error)
            return False
        self.trouble = ""
        return taken

    async def _take(self) -> bool:
        loop = asyncio.get_running_loop()
        path = LEASE.path(self._namespace, NAME)
        try:
            seen = await self._api.get(path)
        except ApiError as error:
            if error.status != 404:
                raise
            body = {"metadata": {"name": NAME}, "spec": self._spec({})}
            self._seen = await self._api.create(LEASE, self._namespace, body)
            return True
        spec = seen.get("spec") or {}
        if self._seen is None or (self._seen.get("spec") or {}) != spec:
            self._seen, self._seen_at = seen, loop.time()
        holder = self._holder(seen)
        if holder and holder != self._identity:
            lasts = float(spec.get("leaseDurationSeconds") or self._seconds)
            if loop.time() - self._seen_at < lasts:
                return False
        # The version makes it a compare-and-swap: of two that try, one is refused (409).
        body = {
            "metadata": {"resourceVersion": seen["metadata"]["resourceVersion"], "uid": seen["metadata"]["uid"]},
            "spec": self._spec(spec),
        }
        self._seen = await self._api.patch(LEASE, self._namespace, NAME, body, "arriero-operator")
        self._seen_at = loop.time()
        return True

    async def _give_back(self) -> None:
        """So that the next one need not wait for the lease to run out."""
        version = self._seen["metadata"]["resourceVersion"]
        body = {"metadata": {"resourceVersion": version}, "spec": {"holderIdentity": "", "leaseDurationSeconds": 1}}
        try:
            async with asyncio.timeout(3.0):
                await self._api.patch(LEASE, self._namespace, NAME, body, "arriero-operator")
        except (ApiError, TimeoutError) as error:
            log.info("the lease was not given back: %s", error)

    def _spec(self, old: Any) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        mine = old.get("holderIdentity") == self._identity
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._seconds,
            "renewTime": now,
            "acquireTime": old.get("acquireTime") if mine and old.get("acquireTime") else now,
            "leaseTransitions": int(old.get("leaseTransitions") or 0) + (not mine),
        }

    @staticmethod
    def _holder(seen: Any) -> str:
        return str((seen.get("spec") or {}).get("holderIdentity") or "")
