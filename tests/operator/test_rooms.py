"""What is free on nodes, kept step by step, is what counting all pods anew gives."""

from __future__ import annotations

import random
from typing import Any

from arriero_operator import names
from arriero_operator.observe import nodes_of
from arriero_operator.runtime.rooms import Rooms


def node(name: str, chance: random.Random) -> dict[str, Any]:
    labels = {names.HOSTNAME: f"host-{name}"} if chance.random() < 0.7 else {}
    allocatable = {"cpu": str(chance.randrange(8, 64)), "nvidia.com/gpu": "8", "pods": "110"}
    return {"metadata": {"name": name, "labels": labels}, "status": {"allocatable": allocatable}}


def pod(chance: random.Random) -> dict[str, Any]:
    spec: dict[str, Any] = {"containers": [{"resources": {"requests": {"cpu": f"{chance.randrange(1, 4000)}m"}}}]}
    where = f"n{chance.randrange(4)}"
    match chance.randrange(4):
        case 0:
            spec["nodeName"] = where
        case 1:
            spec["nodeSelector"] = {names.HOSTNAME: f"host-{where}"}
        case 2:
            spec["nodeSelector"] = {names.HOSTNAME: where}
            spec["schedulingGates"] = [{"name": "a/b"}]
    return {"spec": spec, "status": {"phase": chance.choice(("Pending", "Running", "Succeeded"))}}


def test_any_course_of_changes_leads_to_the_same_as_a_fresh_count(seed: int, campaign: int) -> None:
    chance = random.Random(seed)
    for _ in range(20 * campaign):
        rooms, nodes, pods = Rooms(), dict[str, Any](), dict[tuple[str, str], Any]()
        for _ in range(60):
            name, key = f"n{chance.randrange(5)}", ("space", f"p{chance.randrange(12)}")
            match chance.randrange(5):
                case 0:
                    nodes[name] = node(name, chance)
                    rooms.put_node(nodes[name])
                case 1 if chance.random() < 0.3:
                    nodes.pop(name, None)
                    rooms.remove_node(name)
                case 2:
                    pods.pop(key, None)
                    rooms.remove_pod(key)
                case _:
                    pods[key] = pod(chance)
                    rooms.put_pod(key, pods[key])
            if chance.random() < 0.4:
                assert rooms.nodes == nodes_of(nodes.values(), list(pods.values()))
        assert rooms.nodes == nodes_of(nodes.values(), list(pods.values()))
        assert rooms.nodes is rooms.nodes, "nothing has changed"
