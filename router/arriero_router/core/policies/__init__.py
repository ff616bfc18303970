"""Ways to choose a replica, by name. Each is a `Policy`, fed with replicas that can all take the request: what the
request should avoid, and what is ejected, the dispatcher has left out already. None looks at `ask.avoid`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

from arriero_router.core.policies.hashing import Hashing
from arriero_router.core.policies.least_load import LeastLoad
from arriero_router.core.policies.power_of_two import PowerOfTwo
from arriero_router.core.policies.prefix import Prefix
from arriero_router.core.policies.round_robin import RoundRobin
from arriero_router.core.policy import Policy
from arriero_router.core.prefix_index import PrefixIndex

POLICIES: Mapping[str, Callable[[PrefixIndex, Random], Policy]] = {
    "prefix": Prefix,
    "least-load": lambda index, rng: LeastLoad(rng),
    "power-of-two": lambda index, rng: PowerOfTwo(rng),
    "round-robin": lambda index, rng: RoundRobin(rng),
    "hash": lambda index, rng: Hashing(rng),
}
"""Only `prefix` uses the index; only it needs `ask.marks`. The generator breaks ties: seed it differently in each
process, or they all choose alike.
"""
