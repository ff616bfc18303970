"""Which metadata of a call goes on, either way: text and binary (`-bin`) alike, as often and in the order it came."""

from __future__ import annotations

from collections.abc import Iterable

Pairs = list[tuple[str, str | bytes]]

_OURS = "x-arriero-"
_PROTOCOL = "grpc-"
DETAILS = "grpc-status-details-bin"
"""What a status means in full (google.rpc.Status): the application's, in spite of its name."""
_ENDS_AT_ROUTER = frozenset(
    ("authorization", "proxy-authorization", "x-api-key", "user-agent", "traceparent", "x-request-id")
)
"""Of a client; some are written anew for each attempt."""
_ENDS_AT_CLIENT = frozenset(("content-type", "user-agent", "date", "server", "via"))
"""Of a replica: what its HTTP/2 server or a proxy says of itself."""
_HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade")
)


def to_replica(given: Iterable[tuple[str, str | bytes]]) -> Pairs:
    """A client's metadata, as far as it is for replicas; the resume contract's is not among it."""
    return [(name, value) for name, value in given if _passes(name) and name not in _ENDS_AT_ROUTER]


def to_client(given: Iterable[tuple[str, str | bytes]] | None) -> Pairs:
    """A replica's metadata, initial or trailing, as far as it is for clients."""
    found = given or ()
    return [(name, value) for name, value in found if name == DETAILS or _is_clients(name)]


def _is_clients(name: str) -> bool:
    return _passes(name) and name not in _ENDS_AT_CLIENT


def _passes(name: str) -> bool:
    return not name.startswith((_OURS, _PROTOCOL)) and name not in _HOP_BY_HOP
