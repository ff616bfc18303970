"""What is free on nodes while a placement is being made. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from arriero_operator.observe import Node
from arriero_operator.quantity import Resources, add, room


class Free:
    """Begins with what nodes have free. Pods of one size are asked about over and over, so answers are kept."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._free = {node.name: dict(node.free) for node in nodes}
        self._sizes: dict[frozenset[tuple[str, object]], int] = {}
        self._requests: list[Resources] = []
        self._rooms: dict[str, dict[int, int]] = {name: {} for name in self._free}

    def size(self, requests: Resources) -> int:
        """A number for pods with these requests."""
        number = self._sizes.setdefault(frozenset(requests.items()), len(self._requests))
        if number == len(self._requests):
            self._requests.append(requests)
        return number

    def room(self, node: Node, size: int) -> int:
        """How many pods of this size the node still holds."""
        rooms = self._rooms[node.name]
        if size not in rooms:
            rooms[size] = room(self._free[node.name], self._requests[size])
        return rooms[size]

    def take(self, node: Node, size: int) -> None:
        """A pod goes there."""
        add(self._free[node.name], {resource: -amount for resource, amount in self._requests[size].items()})
        self._rooms[node.name].clear()
