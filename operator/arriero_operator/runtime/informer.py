"""Keeps one kind of object in view: lists it, then watches from there; lists anew where the watch cannot go on.

Written here, because a lost watch must also tell what vanished meanwhile: a framework that only passes events on shows
objects for ever whose deletion fell into the gap.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec

from arriero_operator.runtime import metrics
from arriero_operator.runtime.api import Api, ApiError
from arriero_operator.runtime.kinds import Kind
from arriero_operator.runtime.store import Store, key_of, version_of

log = logging.getLogger("arriero.operator")

_PAGE = 500
_WATCH_SECONDS = 300
_SILENCE_SECONDS = 90.0
"""Bookmarks come every minute: a watch that is silent for longer is dead, whatever TCP says."""
_SHORTEST, _LONGEST = 0.1, 5.0


class Gone(Exception):
    """The API server has forgotten the version to go on from."""


class Informer:
    """One kind, in one namespace or in all of them."""

    def __init__(self, api: Api, store: Store, kind: Kind, namespace: str = "") -> None:
        self.synced = asyncio.Event()
        """Set once the first list is in."""
        self.trouble = ""
        """Why the view is not fresh; empty: it is."""
        self._api = api
        self._store = store
        self._kind = kind
        self._path = kind.path(namespace)
        self._namespace = namespace
        self._version = ""

    async def run(self) -> None:
        """Until cancelled; trouble is waited out."""
        pause = _SHORTEST
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._watch()
                pause = _SHORTEST
            except Gone:
                metrics.RELISTS.labels(self._kind.name).inc()
                self._version = ""
            except ApiError as error:
                if error.status:
                    self._version = ""
                if str(error) != self.trouble:
                    self.trouble = str(error)
                    log.warning("%s are not in view: %s", self._kind.plural, error)
                pause = min(_LONGEST, pause * 2)
            # Spread out: all watches break at the same moment, when an API server goes.
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))

    async def _list(self) -> None:
        found: list[Any] = []
        query = {"limit": str(_PAGE), **self._selected()}
        while True:
            page = await self._api.get(self._path, **query)
            found += page.get("items") or []
            more = page["metadata"].get("continue")
            if not more:
                break
            query["continue"] = more
        # Items of a list do not say what they are.
        whole = [{**item, "apiVersion": self._kind.api_version, "kind": self._kind.name} for item in found]
        self._version = page["metadata"]["resourceVersion"]
        self._store.replace(self._kind.name, whole, int(self._version), self._namespace)
        self._seen()

    async def _watch(self) -> None:
        """Follow until the connection ends. Raises Gone or ApiError."""
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(_WATCH_SECONDS),
            **self._selected(),
        }
        async with self._api.stream(self._path, _WATCH_SECONDS + _SILENCE_SECONDS, **query) as stream:
            self._seen()
            async for line in _lines(stream):
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            event = msgspec.json.decode(line)
            kind, seen = event["type"], event["object"]
        except (msgspec.DecodeError, KeyError, TypeError) as error:
            raise ApiError(0, f"a line of the watch is no event ({error!r})") from error
        if kind == "ERROR":
            if seen.get("code") in (410, 504):
                raise Gone
            raise ApiError(int(seen.get("code") or 0), str(seen.get("message") or seen))
        self._version = seen["metadata"]["resourceVersion"]
        if kind == "DELETED":
            self._store.remove(self._kind.name, key_of(seen), version_of(seen))
        elif kind != "BOOKMARK":
            self._store.put(seen)
        metrics.WATCHED.labels(self._kind.name).set(self._store.count(self._kind.name))

    def _selected(self) -> dict[str, str]:
        return {"labelSelector": self._kind.selector} if self._kind.selector else {}

    def _seen(self) -> None:
        if self.trouble:
            log.info("%s are in view again", self._kind.plural)
        self.trouble = ""
        self.synced.set()
        metrics.WATCHED.labels(self._kind.name).set(self._store.count(self._kind.name))


async def _lines(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length: an object may have more than a megabyte, and a reader's own limit is far below that."""
    rest = b""
    while True:
        async with asyncio.timeout(_SILENCE_SECONDS):
            data = await stream.readany()
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line
