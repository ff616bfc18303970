"""Ports on this machine: whether one is free, and free ones for a group's own traffic."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable
from pathlib import Path

LOOPBACK = "127.0.0.1"
_LOWEST = 10_000
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Whether a server could listen there now; host "": on every address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def free_ports(count: int, taken: Iterable[int] = ()) -> list[int]:
    """Different free ports, none of `taken`.

    They lie below the range from which the kernel serves outgoing connections: a pod that is started again after
    seconds finds its port still free. Raises OSError when there are not enough.
    """
    try:
        highest = int(_EPHEMERAL.read_text().split()[0])
    except OSError:
        highest = 32_768
    low = _LOWEST if highest - _LOWEST > 1000 else 1024
    candidates = range(low, max(highest, low + 1000))
    avoid, found = set(taken), list[int]()
    for port in random.sample(candidates, len(candidates)):
        if len(found) == count:
            return found
        if port not in avoid and is_free(port, ""):
            found.append(port)
    raise OSError(f"this machine has no {count} free ports")
