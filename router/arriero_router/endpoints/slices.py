"""From EndpointSlices, as the Kubernetes API writes them, to endpoints. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from arriero_router.core.replica import Endpoint
from arriero_router.endpoints.model import address

SERVICE_LABEL = "kubernetes.io/service-name"
DEPLOYMENT_LABEL = "serving.arriero.dev/deployment"


@dataclass(frozen=True, slots=True)
class Ports:
    """Which of a slice's ports is which: by name or by number. A face whose name no port has is not there; but a
    slice's only port is that for HTTP, whatever its name.
    """

    http: str = "http"
    grpc: str = "grpc"
    control: str = "control"


class _Candidate(NamedTuple):
    endpoint: Endpoint
    order: tuple[bool, bool, str, str]
    """Of two addresses of one pod, the lower is taken."""


def endpoints_of(slices: Iterable[Mapping[str, Any]], ports: Ports, family: str = "IPv4") -> list[Endpoint]:
    """The union of some EndpointSlices, sorted by name.

    Slices with the label serving.arriero.dev/deployment hold pods of Arriero's groups, `<group>-<pod index>`: those of
    index 0 are taken, the leaders, and named by their group. Of other slices all endpoints are, named by their pod, or
    by their address if they have none. `family` (`IPv4`, `IPv6`) is preferred where a pod is listed twice.

    Conditions are read as the API defines them (discovery.k8s.io/v1 EndpointConditions: an absent `ready` means ready,
    an absent `serving` what `ready` says, an absent `terminating` no). Ready is one signal, the replica's own word the
    other, and both are needed: who is not ready here is left out. Who is terminating but still serving is kept as such.
    """
    best: dict[str, _Candidate] = {}
    for candidate in _candidates(slices, ports, family):
        name = candidate.endpoint.name
        if name not in best or candidate.order < best[name].order:
            best[name] = candidate
    return [best[name].endpoint for name in sorted(best)]


def _candidates(slices: Iterable[Mapping[str, Any]], ports: Ports, family: str) -> Iterator[_Candidate]:
    for piece in slices:
        metadata = piece.get("metadata") or {}
        ours = DEPLOYMENT_LABEL in (metadata.get("labels") or {})
        http, grpc, control = _numbers(piece.get("ports") or [], ports)
        if not http:
            continue
        for entry in piece.get("endpoints") or []:
            conditions = entry.get("conditions") or {}
            ready = conditions.get("ready") is not False
            serving = ready if conditions.get("serving") is None else conditions["serving"]
            terminating = conditions.get("terminating") is True
            if not (serving if terminating else ready):
                continue
            addresses = entry.get("addresses") or []
            if not addresses:
                continue
            host = addresses[0]  # all are the same endpoint's; the API asks to use the first
            name = _name(entry, address(host, http), ours)
            if name:
                endpoint = Endpoint(name, host, http, grpc, control, terminating)
                order = (terminating, piece.get("addressType") != family, metadata.get("name", ""), host)
                yield _Candidate(endpoint, order)


def _numbers(listed: Iterable[Mapping[str, Any]], ports: Ports) -> tuple[int, int, int]:
    """Ports for HTTP, gRPC, control; 0: not there."""
    named = {str(port.get("name") or ""): int(port.get("port") or 0) for port in listed}

    def number(port: str) -> int:
        return int(port) if port.isdecimal() else named.get(port, 0)

    only = next(iter(named.values())) if len(named) == 1 else 0
    return number(ports.http) or only, number(ports.grpc), number(ports.control)


def _name(entry: Mapping[str, Any], fallback: str, ours: bool) -> str:
    """Empty: not an endpoint that counts."""
    target = entry.get("targetRef") or {}
    pod = str(target.get("name") or "") if target.get("kind", "Pod") == "Pod" else ""
    if not ours:
        return pod or fallback
    group, _, index = pod.rpartition("-")
    return group if index == "0" else ""
