"""What deciding needs to know of a request, and nothing of how it came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

FOREVER = float("inf")


@dataclass(slots=True, kw_only=True)
class Ask:
    """One request that wants a replica. Times are by the dispatcher's clock, in seconds."""

    model: str
    """The served name."""
    marks: Sequence[int] = ()
    """Marks of the prompt's whole chunks, the first chunk's first: see `arriero_faces.prefix`."""
    size: int = 0
    """Bytes of the prompt's text: the measure of the work before the first token."""
    session: str = ""
    """What the `hash` policy keeps together; empty: nothing."""
    tenant: str = ""
    """Whose request it is: the name of its API key; empty: nobody's in particular."""
    priority: int = 0
    """Lower goes first."""
    tokens: int = 0
    """Tokens it may cost, prompt and answer together, as estimated when it came: the weight in fair queueing."""
    deadline: float = FOREVER
    """When waiting for a replica ends."""
    begun: bool = False
    """Its answer was begun by a replica that broke: it goes before others of its tenant and is never turned away for
    want of room.
    """
    counted: bool = False
    """Its tokens were counted against its tenant's share when it left the queue."""
    avoid: set[str] = field(default_factory=set)
    """Names of replicas that broke under this request: taken only where there is no other."""
