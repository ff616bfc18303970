"""What is free on each node, kept as pods come and go: counting all pods anew for each of them would be quadratic."""

from __future__ import annotations

from arriero_operator.observe import Node, Object, node_of, place_of, places_of
from arriero_operator.quantity import Resources, add, pod_requests


class Rooms:
    """Nodes, and the room that pods take on them."""

    def __init__(self) -> None:
        self._raw: dict[str, Object] = {}
        self._made: dict[str, Node] = {}
        self._listed: tuple[Node, ...] | None = None
        self._taken: dict[str, Resources] = {}
        self._pods: dict[tuple[str, str], tuple[Object, str, Resources]] = {}
        self._changed: set[str] = set()

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All of them, by name. Only those on which something has changed are computed."""
        if self._listed is None:
            for name, raw in self._raw.items():
                if name not in self._made or not self._changed.isdisjoint(places_of(raw)):
                    self._made[name] = node_of(raw, self._taken)
            self._changed.clear()
            self._listed = tuple(self._made[name] for name in sorted(self._raw))
        return self._listed

    def put_node(self, raw: Object) -> None:
        self._raw[raw["metadata"]["name"]] = raw
        self._made.pop(raw["metadata"]["name"], None)
        self._listed = None

    def remove_node(self, name: str) -> None:
        self._raw.pop(name, None)
        self._made.pop(name, None)
        self._listed = None

    def put_pod(self, key: tuple[str, str], raw: Object) -> None:
        """A pod as it is now."""
        place, spec = place_of(raw), raw.get("spec") or {}
        known = self._pods.get(key)
        if known is not None and known[1] == place and known[0] == spec:
            return
        self.remove_pod(key)
        if place:
            requests = pod_requests(spec)
            self._pods[key] = (spec, place, requests)
            self._take(place, requests)

    def remove_pod(self, key: tuple[str, str]) -> None:
        if known := self._pods.pop(key, None):
            _, place, requests = known
            self._take(place, {resource: -amount for resource, amount in requests.items()})

    def _take(self, place: str, requests: Resources) -> None:
        add(self._taken.setdefault(place, {}), requests)
        self._changed.add(place)
        self._listed = None
