"""The objects that a deployment wants: named first, rendered only where somebody has to look inside.

A pass over hundreds of groups that are as they should be would otherwise spend nearly all its time on rendering what it
then compares with what is there. What was once compared need not be again while neither has changed. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from arriero_operator.observe import Object
from arriero_operator.wanted import Wanted
from arriero_operator.writes import Apply, up_to_date


@dataclass(frozen=True, slots=True)
class Child:
    """One object: its name, and how it is rendered from the deployment and hashable arguments."""

    kind: str
    name: str
    make: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...] = ()

    def render(self, wanted: Wanted) -> dict[str, Any]:
        return self.make(wanted, *self.arguments)

    def write(self, wanted: Wanted, seen: Object | None) -> Apply | None:
        """What brings it up to date; None: it is."""
        version = _version(seen)
        told = (self, version)
        if version and wanted.known.get((self.kind, self.name)) == told:
            return None
        rendered = self.render(wanted)
        if not up_to_date(seen, rendered):
            return Apply(rendered, new=seen is None)
        if version:
            wanted.known[self.kind, self.name] = told
        return None


def _version(seen: Object | None) -> tuple[str, str] | None:
    """Names a state of an object; None: the API has not said."""
    metadata = seen["metadata"] if seen else {}
    version = metadata.get("resourceVersion")
    return (str(metadata.get("uid")), str(version)) if version else None
