"""What a group lacks, in one sentence. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from arriero_operator import names
from arriero_operator.observe import Node
from arriero_operator.quantity import GIB
from arriero_operator.room import Free
from arriero_operator.scheduling import refusal

if TYPE_CHECKING:
    from arriero_operator.placement import Gang

_COMMON = ("cpu", "memory", "pods", "ephemeral-storage")


def shortage(
    gang: Gang,
    has: int,
    usable: Sequence[Node],
    nodes: Sequence[Node],
    free: Free,
    kept: Mapping[str, str],
) -> str:
    """As "needs 2 nodes with 8 free nvidia.com/gpu in one rack, has 1; not counted: 3 tainted nvidia.com/gpu".

    has: pods that the best domain holds now. usable: nodes that admit the pods. kept: nodes left to
    a group that has waited long, and its name.
    """
    resource = _scarcest(gang, usable, free)
    amount = _amount(resource, gang.requests[resource])
    where = _domain_words(gang) if gang.required else ""
    count = len(gang.gated)
    # Where one node may hold several of the pods, counting nodes would mislead.
    widest = max((free.room(node, free.size(gang.requests)) for node in usable), default=0)
    apart = widest <= 1 and resource not in _COMMON and gang.requests[resource] > 1
    if count == 1 or (apart and gang.topology_key != names.HOSTNAME):
        needs = f"needs {_count(count, 'node')} with {amount}{where}, has {has}"
    else:
        needs = f"needs room for {count} pods with {amount} each{where}, has room for {has}"
    reasons = ((refusal(node, gang.gated[0]), kept.get(node.name)) for node in nodes)
    refused = Counter(reason or f"kept for {group}" for reason, group in reasons if reason or group)
    if gang.required and (bare := sum(gang.topology_key not in node.labels for node in usable)):
        refused[f"without the label {gang.topology_key}"] += bare
    if refused:
        needs += "; not counted: " + ", ".join(f"{count} {reason}" for reason, count in sorted(refused.items()))
    return needs


def _scarcest(gang: Gang, usable: Sequence[Node], free: Free) -> str:
    """The resource that fewest pods could get if it were the only one they ask for; devices before cores and memory."""

    def pods(resource: str) -> int:
        alone = free.size({resource: gang.requests[resource]})
        return sum(free.room(node, alone) for node in usable)

    asked = sorted(
        (resource for resource, amount in gang.requests.items() if amount > 0),
        key=lambda resource: (_COMMON.index(resource) if resource in _COMMON else -1, resource),
    )
    return min(asked, key=pods)


def _domain_words(gang: Gang) -> str:
    """As ` in one rack` for topology.kubernetes.io/rack."""
    if gang.topology_key == names.HOSTNAME:
        return " on one node"
    return f" in one {gang.topology_key.rpartition('/')[2]}"


def _amount(resource: str, amount: Fraction) -> str:
    if resource == "pods":
        return "a free pod slot"
    if resource == "cpu":
        return f"{float(amount):g} free cores"
    if resource in ("memory", "ephemeral-storage") or resource.startswith("hugepages-"):
        return f"{float(amount / GIB):.1f} GiB of free {resource}"
    return f"{float(amount):g} free {resource}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
