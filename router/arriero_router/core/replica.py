"""A replica as one router process sees it: where it is, what it says of itself, what this process has on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a replica is reached. A port of 0 means that face is not there."""

    name: str
    """Unique and stable: the group's name."""
    host: str
    http_port: int
    grpc_port: int = 0
    control_port: int = 0
    """Where its leader's pod answers `Worker.Status`."""
    terminating: bool = False
    """Its pod was asked to leave: it finishes what it has and takes nothing new."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica says of itself (`Worker.Status`), or what a probe found out."""

    ready: bool
    draining: bool = False
    running: int = 0
    waiting: int = 0
    kv_used: float = 0.0
    """Share of the KV blocks that running requests hold, 0 to 1."""
    reason: str = ""
    """Why it is not ready."""
    run: str = ""
    """Names the life of the replica; another one means it was started again and its prefix cache is empty."""


class Replica:
    """Mutable, owned by its `Pool`."""

    __slots__ = (
        "_report",
        "ejected_until",
        "endpoint",
        "failures",
        "in_flight",
        "others",
        "pending",
        "ready_since",
        "shunned_until",
        "slot",
        "trips",
    )

    def __init__(self, endpoint: Endpoint, slot: int) -> None:
        self.endpoint = endpoint
        self.slot = slot
        """A small number that no other present replica of the pool has: its bit in the prefix index."""
        self._report = Report(ready=False, reason="not heard of yet")
        self.ready_since = 0.0
        """When it became ready, by the pool's clock."""
        self.in_flight = 0
        """Requests of this process on it."""
        self.others = 0
        """Requests of other routers on it: what its last report counted beyond `in_flight`. It stands until the next
        report, so that what this process sends in between adds to it.
        """
        self.pending = 0
        """Bytes of prompt, beyond what its cache held, of requests on it whose first token has not come."""
        self.failures = 0
        """Faults in a row, none of them the client's."""
        self.trips = 0
        """Ejections in a row."""
        self.ejected_until = 0.0
        self.shunned_until = 0.0
        """It just broke off or took nothing: until then it gets nothing new, even if it is the last. By then its own
        word is heard.
        """

    @property
    def name(self) -> str:
        return self.endpoint.name

    @property
    def report(self) -> Report:
        return self._report

    @report.setter
    def report(self, report: Report) -> None:
        self._report = report
        self.others = max(0, report.running + report.waiting - self.in_flight)

    @property
    def eligible(self) -> bool:
        """Whether it takes new requests, ejection aside."""
        return self.report.ready and not self.report.draining and not self.endpoint.terminating

    def __repr__(self) -> str:
        return f"Replica({self.name}, in_flight={self.in_flight})"
