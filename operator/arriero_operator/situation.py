"""What one pass has found out about a deployment, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from arriero_operator import names
from arriero_operator.accept import Accepted
from arriero_operator.groups import Group
from arriero_operator.observe import Observed


@dataclass(frozen=True, slots=True)
class Situation:
    """What the status is made of."""

    observed: Observed
    accepted: Accepted
    groups: tuple[Group, ...]
    revision: str
    """What new groups are made with; empty: there is no plan."""
    missing: Mapping[str, str]
    """What groups without a place lack, by group."""
    taken: tuple[str, ...]
    """Objects that cannot be made, because somebody else's have their names."""

    @property
    def refused(self) -> str:
        """What the API server will not take, in one sentence; empty: nothing."""
        return "; ".join(f"{what} is refused by the API server: {why}" for what, why in self.observed.refused.items())

    @property
    def replicas(self) -> int:
        """Groups wanted."""
        return self.accepted.wanted.replicas if self.accepted.wanted else 0

    @property
    def router_down(self) -> str:
        """Why clients cannot reach the replicas; empty: they can, or no router is wanted."""
        wanted = self.accepted.wanted
        if wanted is None or wanted.deployment.spec.router.replicas == 0:
            return ""
        seen = self.observed.find("Deployment", names.router_name(self.observed.name))
        if seen is not None and (seen.get("status") or {}).get("availableReplicas"):
            return ""
        return "no router pod is available"

    @property
    def stable(self) -> bool:
        """There is what is wanted, and nothing else."""
        live = [group for group in self.groups if group.live]
        return (
            len(live) == len(self.groups) == self.replicas
            and all(group.revision == self.revision for group in live)
            and not self.taken
            and not self.observed.refused
        )
