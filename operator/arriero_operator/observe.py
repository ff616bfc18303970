"""What is seen of the cluster, as plain data. Nothing here asks for it: whoever watches the cluster fills it in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

from arriero_operator import names
from arriero_operator.quantity import Resources, add, pod_requests, resources
from arriero_operator.verdict import Verdicts

Object = Mapping[str, Any]
"""A Kubernetes object as the API gives it."""


def seconds_of(written: Any) -> float | None:
    """Seconds since 1970 of an API timestamp; None for none."""
    if not written:
        return None
    try:
        return datetime.fromisoformat(str(written).replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None


def timestamp(seconds: float) -> str:
    """As the API writes times: whole seconds, UTC."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def condition(seen: Object, kind: str) -> Object:
    """One of an object's status conditions; empty where it is not there."""
    listed = (seen.get("status") or {}).get("conditions") or []
    return next((entry for entry in listed if entry.get("type") == kind), {})


@dataclass(frozen=True, slots=True)
class Node:
    """One node, and what of it is not yet taken."""

    name: str
    labels: Mapping[str, str]
    taints: tuple[Object, ...]
    schedulable: bool
    lost_since: float | None
    """Since when its Ready condition is not True; None: it is ready."""
    free: Resources
    """Allocatable, less what pods bound or pinned to it ask for."""

    @property
    def hostname(self) -> str:
        return self.labels.get(names.HOSTNAME, self.name)


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod. `raw` is all of it; the rest is what the decisions are made of."""

    raw: Object
    name: str
    namespace: str
    uid: str
    group: str
    index: int
    node: str
    """Where it is bound; empty: nowhere yet."""
    pinned: str
    """The hostname that placement pinned it to; empty: none."""
    gated: bool
    deleting_since: float | None
    """When its grace period is over, if it is being deleted."""
    created: float
    ready: bool
    ready_changed: float
    """When it last became ready or ceased to be."""
    requests: Resources = field(hash=False)

    @classmethod
    def of(cls, raw: Object) -> Pod:
        metadata, spec = raw.get("metadata") or {}, raw.get("spec") or {}
        labels = metadata.get("labels") or {}
        readiness = condition(raw, "Ready")
        created = seconds_of(metadata.get("creationTimestamp")) or 0.0
        by_us = names.PINNED_AT in (metadata.get("annotations") or {})
        index = str(labels.get(names.POD_INDEX) or metadata["name"].rpartition("-")[2])
        return cls(
            raw=raw,
            name=metadata["name"],
            namespace=metadata.get("namespace") or "",
            uid=metadata.get("uid") or "",
            group=labels.get(names.GROUP) or "",
            index=int(index) if index.isdecimal() else 0,
            node=spec.get("nodeName") or "",
            pinned=((spec.get("nodeSelector") or {}).get(names.HOSTNAME) or "") if by_us else "",
            gated=any(gate.get("name") == names.GATE for gate in spec.get("schedulingGates") or []),
            deleting_since=seconds_of(metadata.get("deletionTimestamp")),
            created=created,
            ready=readiness.get("status") == "True",
            ready_changed=seconds_of(readiness.get("lastTransitionTime")) or created,
            requests=pod_requests(spec),
        )

    @property
    def annotations(self) -> Mapping[str, str]:
        return (self.raw.get("metadata") or {}).get("annotations") or {}

    @property
    def labels(self) -> Mapping[str, str]:
        return (self.raw.get("metadata") or {}).get("labels") or {}

    @property
    def pinned_at(self) -> float:
        """When its gate was lifted."""
        return seconds_of(self.annotations.get(names.PINNED_AT)) or self.created

    @property
    def phase(self) -> str:
        return str((self.raw.get("status") or {}).get("phase") or "Pending")

    @property
    def over(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    @property
    def started(self) -> bool:
        """Whether a container of it may be running, and so requests be on it."""
        return bool(self.node) and not self.over


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank's truth, of the Worker service's RankStatus."""

    rank: int
    pod: int
    phase: str
    """Downloading, Starting, Loading, Warming, Joining, Serving, Draining or Failed. Downloading is said by a pod that
    has no ranks yet; its bytes are those of the model's files.
    """
    epoch: int = 0
    bytes_loaded: int = 0
    bytes_total: int = 0
    phase_seconds: float = 0.0
    bytes_per_second: int = 0
    """Of late; 0: not said."""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What a pod's Worker.Status said last, if it was heard within the last seconds."""

    phase: str
    epoch: int = 0
    ranks: tuple[RankReport, ...] = ()
    running: int = 0
    waiting: int = 0
    reason: str = ""
    tokens_per_second: float = 0.0

    @property
    def requests(self) -> int:
        return self.running + self.waiting

    @property
    def drained(self) -> bool:
        """The engine takes nothing new and has nothing left: its own word that it may go."""
        return self.phase == "Draining" and not self.requests


@dataclass(frozen=True, slots=True)
class Observed:
    """Everything that one pass over one LlamaDeployment decides from."""

    resource: Object
    objects: tuple[Object, ...]
    """What is there with the deployment's label, or under a name that it wants; pods excepted."""
    pods: tuple[Pod, ...]
    """Its worker pods, and its inspector."""
    others: tuple[Pod, ...]
    """Worker pods of all other deployments in the cluster."""
    nodes: tuple[Node, ...]
    reports: Mapping[str, Report]
    """By pod name."""
    config: Object | None
    """The checkpoint's config.json, where it is known by other means than the inspector."""
    now: float
    """Seconds since 1970."""
    verdicts: Verdicts | None = None
    """What `placement.place` says of all waiting groups of the cluster, where one placement is shared by many passes;
    None: the pass decides by itself, from `others` and `nodes`.
    """
    held: int = 0
    """Requests that routers hold because no replica takes them."""
    told: bool = True
    """Whether every router and every leader that serves has been heard: the load is not less than it looks."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """What the API server would not take when it was written last, by "Kind name", and why."""
    _by_kind: Mapping[str, Mapping[str, Object]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found: dict[str, dict[str, Object]] = {}
        for seen in self.objects:
            found.setdefault(seen["kind"], {}).setdefault(seen["metadata"]["name"], seen)
        object.__setattr__(self, "_by_kind", found)

    @property
    def name(self) -> str:
        return str(self.resource["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.resource["metadata"].get("namespace") or "default")

    @property
    def uid(self) -> str:
        return str(self.resource["metadata"].get("uid") or "")

    def find(self, kind: str, name: str) -> Object | None:
        return self._by_kind.get(kind, {}).get(name)

    def of_kind(self, kind: str) -> list[Object]:
        """Ours of one kind, by name."""
        return [seen for _, seen in sorted(self._by_kind.get(kind, {}).items()) if self.owns(seen)]

    def owns(self, seen: Object) -> bool:
        return any(owner.get("uid") == self.uid for owner in seen["metadata"].get("ownerReferences") or [])


def nodes_of(nodes: Iterable[Object], pods: Sequence[Object]) -> tuple[Node, ...]:
    """Nodes with what is free on them, by name.

    pods: every pod of the cluster. One that is pinned but not yet bound takes its room too: a group whose gates were
    lifted has its nodes from then on.
    """
    taken: dict[str, Resources] = {}
    for raw in pods:
        if place := place_of(raw):
            add(taken.setdefault(place, {}), pod_requests(raw["spec"]))
    return tuple(node_of(raw, taken) for raw in sorted(nodes, key=lambda node: str(node["metadata"]["name"])))


def place_of(pod: Object) -> str:
    """Where a pod takes room: a node's name, "=" and the hostname that it is pinned to, or nowhere (empty)."""
    spec = pod.get("spec") or {}
    if (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
        return ""
    if place := spec.get("nodeName"):
        return str(place)
    pinned = (spec.get("nodeSelector") or {}).get(names.HOSTNAME)
    return f"={pinned}" if pinned and not spec.get("schedulingGates") else ""


def places_of(node: Object) -> tuple[str, str]:
    """What a node is called where pods take room on it."""
    metadata = node["metadata"]
    return metadata["name"], f"={(metadata.get('labels') or {}).get(names.HOSTNAME, metadata['name'])}"


def node_of(raw: Object, taken: Mapping[str, Resources]) -> Node:
    """taken: what pods ask for, by where they take room."""
    name = raw["metadata"]["name"]
    labels = raw["metadata"].get("labels") or {}
    spec = raw.get("spec") or {}
    readiness = condition(raw, "Ready")
    lost = None
    if readiness.get("status") != "True":
        lost = seconds_of(readiness.get("lastTransitionTime")) or 0.0
    free = resources((raw.get("status") or {}).get("allocatable"))
    for place in places_of(raw):
        for resource, amount in taken.get(place, {}).items():
            free[resource] = free.get(resource, Fraction(0)) - amount
    return Node(
        name=name,
        labels=labels,
        taints=tuple(spec.get("taints") or ()),
        schedulable=not spec.get("unschedulable"),
        lost_since=lost,
        free=free,
    )
