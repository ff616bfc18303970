"""Gang placement: all pods of a group get nodes at once, or none does. Pure.

Groups are placed in one total order, oldest deployment first, each against what those before it left. What a group
holds is written on its pods (bound, or pinned with the gate lifted), so every pass starts from the cluster alone. Who
cannot be completed gives back what it holds, so no two groups keep half of what the other needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from arriero_operator import names
from arriero_operator.observe import Node, Pod
from arriero_operator.placement_words import shortage
from arriero_operator.quantity import Resources
from arriero_operator.room import Free
from arriero_operator.scheduling import admits, demands
from arriero_operator.verdict import Verdict, Verdicts


@dataclass(frozen=True, slots=True)
class Gang:
    """A group whose pods are not all placed; all that its placement depends on."""

    namespace: str
    name: str
    order: tuple[str, str, str, int]
    """When its deployment was created, namespace, deployment, replica: the total order."""
    size: int
    gated: tuple[Pod, ...]
    """Pods without a place, by index."""
    held: tuple[Pod, ...]
    """Pods that have one."""
    requests: Resources
    """What one pod asks for: the most that any of them does."""
    topology_key: str
    required: bool
    waiting_since: float

    @property
    def key(self) -> tuple[str, str]:
        return self.namespace, self.name

    def is_of(self, namespace: str, deployment: str) -> bool:
        return self.order[1:3] == (namespace, deployment)


def gangs(pods: Iterable[Pod]) -> list[Gang]:
    """The groups that wait for a place, in the total order. A group counts once all its pods exist; one of which a pod
    is being deleted waits for the successor.
    """
    groups: dict[tuple[str, str], list[Pod]] = {}
    for pod in pods:
        if pod.group and not pod.over:
            groups.setdefault((pod.namespace, pod.group), []).append(pod)
    found = [_gang(members) for members in groups.values() if any(pod.gated for pod in members)]
    return sorted((gang for gang in found if gang is not None), key=lambda gang: gang.order)


def _gang(members: list[Pod]) -> Gang | None:
    members.sort(key=lambda pod: pod.index)
    first = members[0]
    size = first.annotations.get(names.GROUP_SIZE, "")
    complete = len(members) == (int(size) if size.isdecimal() else 0)
    if not complete or any(pod.deleting_since is not None for pod in members):
        return None
    mode, _, topology_key = first.annotations.get(names.TOPOLOGY, "").partition("=")
    replica = first.labels.get(names.REPLICA, "")
    order = first.annotations.get(names.ORDER, "")
    deployment = first.labels.get(names.DEPLOYMENT, "")
    requests: Resources = {}
    for pod in members:
        for resource, amount in pod.requests.items():
            requests[resource] = max(amount, requests.get(resource, Fraction(0)))
    return Gang(
        namespace=first.namespace,
        name=first.group,
        order=(order, first.namespace, deployment, int(replica) if replica.isdecimal() else 0),
        size=len(members),
        gated=tuple(pod for pod in members if pod.gated),
        held=tuple(pod for pod in members if not pod.gated),
        requests=requests,
        topology_key=topology_key,
        required=mode == "Required",
        waiting_since=max(pod.created for pod in members),
    )


def place(nodes: Sequence[Node], waiting: Sequence[Gang], now: float, patience: float) -> Verdicts:
    """A verdict for each gang, taken in order.

    Later gangs may use what an earlier one cannot; but once that has waited for `patience` seconds, they leave it the
    domain in which it comes closest to fitting, so a large group is not starved by small ones.
    """
    free = Free(nodes)
    kept: dict[str, str] = {}
    verdicts: dict[tuple[str, str], Verdict] = {}
    admitted: dict[bytes, list[Node]] = {}
    failed: dict[tuple[object, ...], tuple[Verdict, list[Node]]] = {}
    for gang in waiting:
        # Groups of one deployment, and often those of many, may go to the same nodes.
        terms = demands(gang.gated[0])
        if terms not in admitted:
            admitted[terms] = [node for node in nodes if admits(node, gang.gated[0])]
        size = free.size(gang.requests)
        twin = (terms, size, gang.topology_key, gang.required, len(gang.gated))
        if not gang.held and twin in failed:
            verdict, closest = failed[twin]
        else:
            usable = [node for node in admitted[terms] if node.name not in kept] if kept else admitted[terms]
            verdict, closest = _place_one(gang, size, usable, free, nodes, kept)
        verdicts[gang.key] = verdict
        for node in verdict.pins.values():
            free.take(node, size)
        leave = not verdict.pins and now - gang.waiting_since >= patience
        if leave:
            kept.update(dict.fromkeys((node.name for node in closest if node.name not in kept), gang.name))
        if verdict.pins or (leave and closest):
            failed.clear()
        elif not gang.held:
            failed[twin] = verdict, closest
    return verdicts


def _place_one(
    gang: Gang, size: int, usable: list[Node], free: Free, nodes: Sequence[Node], kept: Mapping[str, str]
) -> tuple[Verdict, list[Node]]:
    """The verdict, and the nodes that come closest to holding the group where it does not fit."""
    needed = len(gang.gated)
    domains = _domains(gang, usable, nodes)
    counted = [(sum(free.room(node, size) for node in domain), domain) for domain in domains]
    fitting = [(count, domain) for count, domain in counted if count >= needed]
    if fitting:
        # Where a part of the group is; else the tightest domain: large ones stay for large groups. Ties go by name.
        _, domain = min(fitting, key=lambda entry: (not any(_holds(n, gang.held) for n in entry[1]), entry[0]))
        return Verdict(_pack(gang, size, domain, free)), []
    if not gang.required and sum(count for count, _ in counted) >= needed:
        widest = [domain for _, domain in sorted(counted, key=lambda entry: -entry[0])]
        return Verdict(_pack_over(gang, size, widest, free)), []
    best, closest = max(counted, key=lambda entry: entry[0], default=(0, []))
    if not gang.required:
        best, closest = sum(count for count, _ in counted), list(usable)
    return Verdict({}, shortage(gang, best, usable, nodes, free, kept), gang.held), closest


def _domains(gang: Gang, usable: list[Node], nodes: Sequence[Node]) -> list[list[Node]]:
    """Nodes by domain, domains by name: without a topology key all are one. Where a part of the group is already placed
    and must stay together, only its own domain counts.
    """
    if not gang.topology_key:
        return [usable]
    domains: dict[str, list[Node]] = {}
    for node in usable:
        if (value := node.labels.get(gang.topology_key)) is not None:
            domains.setdefault(value, []).append(node)
    if gang.held and gang.required:
        homes = {node.labels.get(gang.topology_key) for node in nodes if _holds(node, gang.held)}
        domains = {value: domain for value, domain in domains.items() if homes == {value}}
    apart = [] if gang.required else [node for node in usable if gang.topology_key not in node.labels]
    return [*(domains[value] for value in sorted(domains)), *([apart] if apart else [])]


def _holds(node: Node, pods: Sequence[Pod]) -> bool:
    return any(pod.node == node.name or (not pod.node and pod.pinned == node.hostname) for pod in pods)


def _pack(gang: Gang, size: int, domain: Sequence[Node], free: Free) -> dict[str, Node]:
    """Pods in order over as few nodes as can be, so that neighbouring stages share them. All fit.

    Widest nodes first, and for what is left at the end the tightest that holds it.
    """
    rooms = sorted(
        ((count, node) for node in domain if (count := free.room(node, size))),
        key=lambda entry: (-entry[0], entry[1].name),
    )
    pins: dict[str, Node] = {}
    rest = [pod.name for pod in gang.gated]
    while rest:
        whole = [entry for entry in rooms if entry[0] >= len(rest)]
        count, node = min(whole, key=lambda entry: (entry[0], entry[1].name)) if whole else rooms[0]
        rooms.remove((count, node))
        pins.update(dict.fromkeys(rest[:count], node))
        rest = rest[count:]
    return pins


def _pack_over(gang: Gang, size: int, domains: Sequence[Sequence[Node]], free: Free) -> dict[str, Node]:
    """Domain after domain, the one with most room first; each takes as many of the next pods as it holds."""
    pins: dict[str, Node] = {}
    for domain in domains:
        rooms = {node.name: free.room(node, size) for node in domain}
        for node in sorted(domain, key=lambda node: (-rooms[node.name], node.name)):
            rest = [pod.name for pod in gang.gated if pod.name not in pins]
            pins.update(dict.fromkeys(rest[: rooms[node.name]], node))
    return pins
