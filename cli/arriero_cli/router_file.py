"""The router's configuration for a deployment on this machine. No I/O, and nothing of the router is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from arriero_plan.launch import Launch
from arriero_plan.spec import LlamaDeployment


def router_config(
    deployment: LlamaDeployment, launches: Sequence[Launch], http_port: int, grpc_port: int, access_log: str = "off"
) -> dict[str, Any]:
    """What `arriero-router --config` is to read, as plain values.

    launches: those of the replicas, at least one; a replica is named as its group
    http_port, grpc_port: where clients reach the router, on the address that the replicas listen on
    access_log: a file, or "off"
    """
    name, *aliases = launches[0].served_names
    leaders = [(launch.group, launch.pods[0]) for launch in launches]
    return {
        "listen": {"address": launches[0].bind_address, "httpPort": http_port, "grpcPort": grpc_port},
        "models": [
            {
                "name": name,
                **({"aliases": aliases} if aliases else {}),
                "policy": deployment.spec.router.policy,
                "endpoints": {
                    "static": [
                        {
                            "name": group,
                            "host": leader.host,
                            "httpPort": leader.http_port,
                            "grpcPort": leader.grpc_port,
                            "controlPort": leader.control_port,
                        }
                        for group, leader in leaders
                    ]
                },
            }
        ],
        "leaveSeconds": 0,
        "drainSeconds": deployment.spec.rollout.drain_seconds,
        "accessLog": {"path": access_log},
    }


def as_yaml(config: dict[str, Any]) -> str:
    """The text of a configuration file."""
    return yaml.safe_dump(config, sort_keys=False)
