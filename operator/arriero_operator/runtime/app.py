"""The running operator: kopf brings LlamaDeployments, informers bring everything else, rounds decide."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import kopf

from arriero_operator.runtime import gauges
from arriero_operator.runtime.api import Api, ApiError, server_of_pod
from arriero_operator.runtime.config import Config
from arriero_operator.runtime.informer import Informer
from arriero_operator.runtime.kinds import CHILDREN, DEPLOYMENT, NODE, POD
from arriero_operator.runtime.rounds import Rounds
from arriero_operator.runtime.store import key_of, version_of
from arriero_operator.runtime.writer import Writer

log = logging.getLogger("arriero.operator")

_STUCK_SECONDS = 90.0
_PRUNE_SECONDS = 60.0


class App:
    """One life as the leader."""

    def __init__(self, api: Api, config: Config, identity: str, take_signals: Callable[[], None]) -> None:
        self._api = api
        self._take_signals = take_signals
        self._namespaces = config.watch_namespaces
        self._rounds = Rounds(config.settings())
        self._writer = Writer(api, self._rounds.store, identity, time.time)
        spaces = self._namespaces or ("",)
        self._informers = [
            # Nodes are the cluster's, and so is the room that other namespaces' pods take on them.
            Informer(api, self._rounds.store, NODE),
            Informer(api, self._rounds.store, POD),
            *(Informer(api, self._rounds.store, kind, space) for kind in CHILDREN for space in spaces),
        ]

    @property
    def stuck(self) -> str:
        """Why it should be started again; empty: it works."""
        silent = time.monotonic() - self._rounds.last_round
        return f"no round for {silent:.0f} s" if silent > _STUCK_SECONDS else ""

    @property
    def trouble(self) -> str:
        """What it cannot see; empty: it sees everything."""
        waiting = [informer for informer in self._informers if not informer.synced.is_set()]
        return next((i.trouble for i in self._informers if i.trouble), "") or (
            f"{len(waiting)} of {len(self._informers)} kinds are not in view yet" if waiting else ""
        )

    async def run(self) -> None:
        """Until cancelled, or until something fails for good."""
        await self._served()
        async with asyncio.TaskGroup() as tasks:
            for informer in self._informers:
                tasks.create_task(informer.run())
            for informer in self._informers:
                await informer.synced.wait()
            log.info("the cluster is in view: %d nodes, %d pods", *map(self._rounds.store.count, ("Node", "Pod")))
            tasks.create_task(self._rounds.run(self._writer))
            tasks.create_task(self._rounds.held.run())
            tasks.create_task(self._prune())
            tasks.create_task(self._watch_deployments())
        # Never reached: none of these tasks ends by itself.

    async def close(self) -> None:
        await self._rounds.statuses.close()
        gauges.clear()

    async def _served(self) -> None:
        """Wait until the API server knows the resource at all: its definition may come after us."""
        said = ""
        while True:
            try:
                await self._api.get(DEPLOYMENT.path(*self._namespaces[:1]), limit="1")
                return
            except ApiError as error:
                told = (
                    f"there is no {DEPLOYMENT.plural} yet: is the CRD installed?" if error.status == 404 else str(error)
                )
                if told != said:
                    log.warning("%s", told)
                    said = told
            await asyncio.sleep(1.0)

    async def _watch_deployments(self) -> None:
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry)(_login)
        kopf.on.event(DEPLOYMENT.api_version, DEPLOYMENT.plural, registry=registry)(self._event)
        settings = kopf.OperatorSettings()
        settings.posting.enabled = False  # Events come from the decisions
        settings.scanning.disabled = True  # the resource is known; no need to read definitions and namespaces
        settings.watching.server_timeout = 300
        settings.networking.request_timeout = 30
        settings.execution.max_workers = 1
        others = asyncio.all_tasks()
        tasks = await kopf.spawn_tasks(
            registry=registry,
            settings=settings,
            standalone=True,
            clusterwide=not self._namespaces,
            namespaces=self._namespaces,
        )
        self._take_signals()  # kopf has taken them for itself, but more than kopf is to end
        await kopf.run_tasks(tasks, ignored=others)
        raise RuntimeError("the watch of LlamaDeployments ended")

    async def _event(self, event: Any, **_: Any) -> None:
        seen = dict(event["object"])
        if event["type"] == "DELETED":
            self._rounds.store.remove(DEPLOYMENT.name, key_of(seen), version_of(seen))
        else:
            self._rounds.store.put(seen)

    async def _prune(self) -> None:
        """kopf tells of what is there; what vanished while its watch was broken must be looked for."""
        while True:
            await asyncio.sleep(_PRUNE_SECONDS)
            for space in self._namespaces or ("",):
                try:
                    found = await self._api.get(DEPLOYMENT.path(space))
                except ApiError as error:
                    log.warning("LlamaDeployments could not be listed: %s", error)
                    continue
                version = int(found["metadata"]["resourceVersion"])
                items = [{**i, "apiVersion": DEPLOYMENT.api_version, "kind": DEPLOYMENT.name} for i in found["items"]]
                self._rounds.store.replace(DEPLOYMENT.name, items, version, space)


def _login(**arguments: Any) -> kopf.ConnectionInfo | None:
    """To the same API server as everything else here: kopf's own way asks DNS for it, and overlooks KUBECONFIG."""
    server = server_of_pod()
    if not server:
        return kopf.login_with_kubeconfig(**arguments)
    account = kopf.login_with_service_account(**arguments)
    return dataclasses.replace(account, server=server) if account is not None else None
