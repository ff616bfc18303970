"""What routers hold: asked of each router pod, for deployments that follow their load."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from arriero_operator import names
from arriero_operator.observe import Pod
from arriero_operator.runtime.store import Key
from arriero_operator.wanted import HTTP

log = logging.getLogger("arriero.operator")

_HELD = "arriero_router_held"
_SECONDS = 2.0
"""Between two questions: what is held must not wait long for its replica to be begun."""


class Held:
    """The last answers of router pods. `due` is told of deployments whose routers were asked."""

    def __init__(self, routers: Callable[[], Iterable[Pod]], due: Callable[[Key], None], port: int = HTTP) -> None:
        self._routers = routers
        self._due = due
        self._port = port
        self._counts: dict[Key, int] = {}
        self._silent: set[Key] = set()

    def of(self, pods: Iterable[Pod]) -> tuple[int, bool]:
        """(requests held by the routers among these pods, whether all of them told)."""
        keys = [(pod.namespace, pod.name) for pod in pods if _asked(pod)]
        return sum(self._counts.get(key, 0) for key in keys), all(key in self._counts for key in keys)

    async def run(self) -> None:
        """Until cancelled."""
        timeout = aiohttp.ClientTimeout(total=_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            while True:
                pods = [pod for pod in self._routers() if _asked(pod)]
                counts = await asyncio.gather(*(self._ask(session, pod) for pod in pods))
                known = self._counts
                self._counts = {
                    (pod.namespace, pod.name): count
                    for pod, count in zip(pods, counts, strict=True)
                    if count is not None
                }
                for owner in {(pod.namespace, pod.labels[names.DEPLOYMENT]) for pod in pods}:
                    self._due(owner)
                if self._counts.keys() != known.keys():
                    log.debug("%d of %d routers tell what they hold", len(self._counts), len(pods))
                await asyncio.sleep(_SECONDS)

    async def _ask(self, session: aiohttp.ClientSession, pod: Pod) -> int | None:
        host = str((pod.raw.get("status") or {}).get("podIP"))
        place = f"[{host}]" if ":" in host else host
        try:
            async with session.get(f"http://{place}:{self._port}/metrics") as response:
                if response.status != 200:
                    return None
                return held_in(await response.text())
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            log.debug("%s/%s does not tell what it holds: %s", pod.namespace, pod.name, error)
            return None


def held_in(text: str) -> int:
    """The requests held, of a router's /metrics. Raises ValueError for what is no such text."""
    return int(
        sum(
            sample.value
            for family in text_string_to_metric_families(text)
            if family.name == _HELD
            for sample in family.samples
        )
    )


def _asked(pod: Pod) -> bool:
    """Whether it is a router that runs."""
    router = pod.labels.get(names.COMPONENT) == names.ROUTER
    return router and bool((pod.raw.get("status") or {}).get("podIP")) and not pod.over and pod.deleting_since is None
