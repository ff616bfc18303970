"""What placement decides for one group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arriero_operator.observe import Node, Pod


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of one gang."""

    pins: Mapping[str, Node]
    """Pod name to node, for every gated pod; empty where the group does not fit."""
    missing: str = ""
    """Why it waits, in one sentence."""
    give_back: tuple[Pod, ...] = ()
    """Pods that hold room which the rest of the group can't complete."""


Verdicts = Mapping[tuple[str, str], Verdict]
"""By namespace and group."""
