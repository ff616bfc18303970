"""Kubernetes quantities, as the API writes them: "8", "1500m", "64Gi", "2e3"."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

Resources = dict[str, Fraction]
"""Amounts by resource name: cores, bytes, devices."""

_SUFFIX = {
    "": Fraction(1),
    **{name: Fraction(10) ** power for name, power in {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9}.items()},
    **{name: Fraction(10) ** power for name, power in {"T": 12, "P": 15, "E": 18}.items()},
    **{f"{name}i": Fraction(1024) ** power for power, name in enumerate("KMGTPE", start=1)},
}
_QUANTITY = re.compile(r"([+-]?\d+\.?\d*|[+-]?\.\d+)(?:([eE][+-]?\d{1,3})|([numkMGTPE]|[KMGTPE]i)?)")
GIB = 1 << 30


def parse_quantity(value: Any) -> Fraction:
    """The amount. Raises ValueError for what is no quantity."""
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a quantity such as 2, 500m or 64Gi")
    return _parse(str(value))


@lru_cache(maxsize=4096)
def _parse(written: str) -> Fraction:
    match = _QUANTITY.fullmatch(written.strip())
    if match is None:
        raise ValueError(f"{written!r} is not a quantity such as 2, 500m or 64Gi")
    number, exponent, suffix = match.groups()
    return Fraction(number) * (Fraction(10) ** int(exponent[1:]) if exponent else _SUFFIX[suffix or ""])


def same_quantity(one: Any, other: Any) -> bool:
    """Whether both are quantities of the same amount: the API server rewrites 1000m as 1."""
    try:
        return parse_quantity(one) == parse_quantity(other)
    except ValueError:
        return False


def format_bytes(amount: int) -> str:
    """Bytes rounded up to whole MiB, in the spelling that the API server keeps."""
    mib = -(-amount // (1 << 20))
    return f"{mib // 1024}Gi" if mib % 1024 == 0 else f"{mib}Mi"


def resources(written: Any) -> Resources:
    """A mapping of quantities; what is no quantity is left out."""
    amounts: Resources = {}
    for name, value in (written or {}).items():
        try:
            amounts[name] = parse_quantity(value)
        except ValueError:
            continue
    return amounts


def add(total: Resources, more: Resources) -> None:
    for name, amount in more.items():
        total[name] = total.get(name, Fraction(0)) + amount


def pod_requests(spec: Any) -> Resources:
    """What a pod asks of a node, as the scheduler counts: all containers and sidecars, or the largest init container;
    overhead; and one of the node's pod slots.
    """
    total: Resources = {}
    for container in spec.get("containers") or []:
        add(total, _requests(container))
    largest: Resources = {}
    sidecars: Resources = {}
    for container in spec.get("initContainers") or []:
        asked = _requests(container)
        if container.get("restartPolicy") == "Always":
            add(total, asked)
            add(sidecars, asked)
            asked = {}
        for name in asked.keys() | sidecars.keys():
            needed = asked.get(name, Fraction(0)) + sidecars.get(name, Fraction(0))
            largest[name] = max(largest.get(name, Fraction(0)), needed)
    for name, amount in largest.items():
        total[name] = max(total.get(name, Fraction(0)), amount)
    add(total, resources(spec.get("overhead")))
    total["pods"] = Fraction(1)
    return total


def _requests(container: Any) -> Resources:
    """A limit without a request is a request."""
    asked = container.get("resources") or {}
    return {**resources(asked.get("limits")), **resources(asked.get("requests"))}


def room(free: Resources, requests: Resources) -> int:
    """How many pods with these requests a node still holds."""
    counts = [free.get(resource, Fraction(0)) // amount for resource, amount in requests.items() if amount > 0]
    return max(0, int(min(counts, default=0)))
