"""What every source of endpoints has in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from arriero_router.core.replica import Endpoint

Publish = Callable[[list[Endpoint]], None]
"""Takes the whole truth: every endpoint there is now, names unique."""


class Source(Protocol):
    """Where the replicas of one deployment are."""

    @property
    def error(self) -> str:
        """Why what was published last may be out of date; empty: it is not."""
        ...

    async def run(self, publish: Publish) -> None:
        """Publish at once and at every change, until cancelled. Trouble outside is logged, kept in `error` and
        outlived: what was published last stays.
        """
        ...


def address(host: str, port: int) -> str:
    """host:port as gRPC and URLs write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def summary(endpoints: Sequence[Endpoint]) -> str:
    """Endpoints in a log line."""
    if not endpoints:
        return "no endpoints"
    names = ", ".join(f"{e.name}{' (terminating)' if e.terminating else ''}" for e in endpoints[:8])
    more = f" and {len(endpoints) - 8} more" if len(endpoints) > 8 else ""
    return f"{len(endpoints)} endpoint{'s' if len(endpoints) > 1 else ''}: {names}{more}"
