"""Endpoints that the configuration names."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from arriero_router.core.replica import Endpoint
from arriero_router.endpoints.model import Publish


class StaticSource:
    """Publishes its list once; nothing in it ever changes."""

    error = ""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = list(endpoints)

    async def run(self, publish: Publish) -> None:
        publish(list(self._endpoints))
        await asyncio.Event().wait()
