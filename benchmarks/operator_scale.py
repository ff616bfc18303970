"""What operators take, and what they cost, at scale: 1,000 worker pods on 100 simulated nodes and a real API server.

    python benchmarks/operator_scale.py [--json FILE] [--groups 500] [--peer] [--only NAME ...]

Each measurement has a fresh control plane on this machine (etcd, API server, controller manager, scheduler), nodes and
pods that KWOK simulates, and one operator, as a process outside. What runs in the pods is one server that says
"serving" for each of them, so Arriero's readiness is by the engines' word. Groups have two pods. Measured:

- from the first resource made until all worker pods are there, have nodes, are ready, and every resource says so;
- one worker pod deleted, until there is another one and the resource is ready again;
- the operator started again: it looks at everything once and must write nothing;
- half of the groups, then all;
- everything deleted, until no pod is left.

Beside it: CPU seconds and peak memory of the operator, and writes to the API, all and its own. `--peer` measures
LeaderWorkerSet v0.9.0 (built from its module) in the same way. It makes a StatefulSet for the leaders and one for each
group's other pods, a headless Service, and revisions; Arriero makes for each group a StatefulSet, a Service, a
NetworkPolicy and a launch file, places it as a gang, and adds the router with what that needs for each deployment.

Needs root (a route to the simulated pods), the test cluster's programs (tools/cluster/build.py), and about five
minutes. The machine should be otherwise idle: its load is noted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from operator_cluster import NAMESPACE, Census, Server, difference, simulated_cluster
from operator_peers import PODS_PER_GROUP, Arriero, LeaderWorkerSet, Peer, Running, installed
from router_machine import machine

NODES, GPUS = 100, 16
log = logging.getLogger("operator_scale")
_LONG = 600.0


class Measurement:
    """One operator on one fresh cluster."""

    def __init__(self, peer: Peer, server: Server, folder: Path) -> None:
        self.peer, self.server, self.folder = peer, server, folder
        self.api = server.cluster.api
        tests = {"placed": lambda s: bool(s.spec.nodeName), "ready": lambda s: s.holds("Ready")}
        self.pods = Census(server, f"/api/v1/namespaces/{NAMESPACE}/pods", peer.selector, tests)
        self.resources = Census(server, peer.path, "", {"ready": peer.ready})
        self.running = Running(peer, server, folder / "operator.log")

    def close(self) -> None:
        self.running.stop()
        self.pods.close()
        self.resources.close()

    def create(self, resources: int, groups: int) -> dict[str, Any]:
        """Make so many resources of so many groups each; seconds to each state, and what it took."""
        pods = resources * groups * PODS_PER_GROUP
        waits = {
            "created": self.pods.reach(lambda c: len(c.seen) >= pods),
            "placed": self.pods.reach(lambda c: c.counts["placed"] >= pods),
            "ready": self.pods.reach(lambda c: c.counts["ready"] >= pods),
            "told": self.resources.reach(lambda c: c.counts["ready"] >= resources),
        }
        names = [f"llama-{number}" for number in range(resources)]
        return self._timed(
            waits, lambda: _each(lambda n: self.api.create(self.peer.path, self.peer.resource(n, groups)), names)
        )

    def scale(self, groups: int) -> dict[str, Any]:
        """Change the one resource's replicas."""
        pods = groups * PODS_PER_GROUP
        before = self.resources.seen["llama-0"].metadata.resourceVersion
        waits = {
            "created": self.pods.reach(lambda c: len(c.seen) >= pods),
            "placed": self.pods.reach(lambda c: c.counts["placed"] >= pods),
            "ready": self.pods.reach(lambda c: c.counts["ready"] >= pods),
            "told": self.resources.reach(lambda c: self._all_ready(c, before, groups)),
        }
        return self._timed(waits, lambda: self.api.patch(f"{self.peer.path}/llama-0", {"spec": {"replicas": groups}}))

    def _all_ready(self, census: Census, before: str, groups: int) -> bool:
        seen = census.seen.get("llama-0")
        if seen is None or seen.metadata.resourceVersion == before or not self.peer.ready(seen):
            return False
        return seen.status.readyReplicas == groups

    def lose_a_pod(self) -> dict[str, Any]:
        """Delete the last pod of some group."""
        victim = sorted(name for name in self.pods.seen if name.endswith("-1"))[len(self.pods.seen) // 4]
        uid, count = self.pods.seen[victim].metadata.uid, len(self.pods.seen)

        def back(census: Census) -> bool:
            seen = census.seen.get(victim)
            return seen is not None and seen.metadata.uid != uid and census.counts["ready"] >= count

        waits = {"ready": self.pods.reach(back)}
        return self._timed(waits, lambda: self.api.delete(f"/api/v1/namespaces/{NAMESPACE}/pods/{victim}"))

    def delete_all(self) -> dict[str, Any]:
        waits = {"no worker pod": self.pods.reach(lambda c: not c.seen)}
        names = sorted(self.resources.seen)
        found = self._timed(
            waits, lambda: _each(lambda n: self.api.delete(f"{self.peer.path}/{n}"), names), quiet=False
        )
        begun = time.monotonic()
        left = lambda: sum(self.server.count(f"{root}/namespaces/{NAMESPACE}/{kind}") for root, kind in _LEFT)  # noqa: E731
        while left():
            if time.monotonic() - begun > _LONG:
                raise TimeoutError(f"{left()} objects stay")
            time.sleep(0.25)
        found["seconds"]["nothing left"] = round(found["seconds"]["no worker pod"] + time.monotonic() - begun, 2)
        return found

    def start_again(self) -> dict[str, Any]:
        """A new operator looks at everything once: seconds until it has, and its writes, which must be none."""
        self.running.stop()
        before = self.server.writes()
        begun = time.monotonic()
        self.running = Running(self.peer, self.server, self.folder / "operator.log")
        wanted = len(self.resources.seen)
        while sum(v for n, _, v in self.running.metrics() if n == "arriero_operator_passes_total") < wanted:
            if time.monotonic() - begun > 120:
                raise TimeoutError("the second pass did not come to its end")
            time.sleep(0.2)
        seconds = time.monotonic() - begun
        self.quiet()
        written = difference(self.server.writes(), before)
        own = {what: count for what, count in self.running.calls().items() if what != "reads"}
        assert not own, f"the operator wrote to an unchanged cluster: {own}"
        return {
            "seconds": {"looked": round(seconds, 2)},
            "operator_cpu_seconds": round(self.running.cpu, 2),
            "own_writes": 0,
            "writes": written,
        }

    def quiet(self, seconds: float = 3.0) -> None:
        """Wait until nobody has written anything for a while."""
        last, since, limit = self.server.writes(), time.monotonic(), time.monotonic() + _LONG
        while time.monotonic() - since < seconds:
            if time.monotonic() > limit:
                raise TimeoutError("somebody never stops to write")
            time.sleep(0.5)
            now = self.server.writes()
            if now != last:
                last, since = now, time.monotonic()

    def _timed(
        self, waits: dict[str, Callable[[float], float]], act: Callable[[], object], quiet: bool = True
    ) -> dict[str, Any]:
        writes, calls, cpu, others = self.server.writes(), self.running.calls(), self.running.cpu, self.server.cpu()
        begun = time.monotonic()
        act()
        seconds = {"acted": time.monotonic() - begun}
        for state, wait in waits.items():
            seconds[state] = wait(_LONG) - begun
            log.info("%s after %.1f s", state, seconds[state])
        if quiet:
            self.quiet()
        own = difference(self.running.calls(), calls)
        reads = own.pop("reads", 0)
        written = difference(self.server.writes(), writes)
        return {
            "seconds": {state: round(value, 2) for state, value in seconds.items()},
            "operator_cpu_seconds": round(self.running.cpu - cpu, 2),
            "operator_peak_bytes": self.running.peak,
            "own_writes": sum(own.values()),
            "own_reads": reads,
            "all_writes": sum(written.values()),
            "own_writes_by_kind": dict(sorted(own.items())),
            "all_writes_by_kind": dict(sorted(written.items())),
            "cpu_seconds": {name: round(value, 1) for name, value in difference(self.server.cpu(), others).items()},
        }


_LEFT = (
    ("/api/v1", "pods"),
    ("/apis/apps/v1", "statefulsets"),
    ("/apis/apps/v1", "deployments"),
    ("/api/v1", "services"),
)


def _each(act: Callable[[str], object], names: list[str]) -> None:
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(act, names))


def many(measured: Measurement, groups: int) -> dict[str, Any]:
    """As many resources as groups."""
    found = {"create": measured.create(groups, 1), "lose a pod": measured.lose_a_pod()}
    if isinstance(measured.peer, Arriero):
        found["second pass"] = measured.start_again()
    return {**found, "delete": measured.delete_all()}


def one(measured: Measurement, groups: int) -> dict[str, Any]:
    """One resource of all groups; then half of them, and the other half."""
    found = {"create": measured.create(1, groups), "lose a pod": measured.lose_a_pod()}
    if isinstance(measured.peer, Arriero):
        found["second pass"] = measured.start_again()
    found["delete"] = measured.delete_all()
    measured.create(1, groups // 2)
    return {**found, "double": measured.scale(groups)}


MEASUREMENTS: dict[str, tuple[Callable[[], Peer], Callable[[Measurement, int], dict[str, Any]]]] = {
    "arriero, many": (Arriero, many),
    "arriero, many, no routers": (lambda: Arriero(router=0), many),
    "arriero, one": (Arriero, one),
    "leaderworkerset, many": (LeaderWorkerSet, many),
    "leaderworkerset, one": (LeaderWorkerSet, one),
}


def measure(name: str, groups: int, keep: bool) -> dict[str, Any]:
    make, scenario = MEASUREMENTS[name]
    peer = make()
    before = os.getloadavg()[0]
    with simulated_cluster(NODES, GPUS) as server, installed(peer, server) as folder:
        measured = Measurement(peer, server, folder)
        try:
            return {"load_before": round(before, 2), **scenario(measured, groups)}
        finally:
            measured.close()
            if keep:
                print((folder / "operator.log").read_text()[-4000:], file=sys.stderr)


def show(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name} (load before: {found['load_before']})")
    for step, told in found.items():
        if isinstance(told, dict):
            times = ", ".join(f"{state} {seconds:g} s" for state, seconds in told["seconds"].items())
            cost = f"{told['operator_cpu_seconds']:g} CPU s"
            if "all_writes" in told:
                cost += f", peak {told['operator_peak_bytes'] / 2**20:.0f} MiB"
                cost += f", writes {told['own_writes']} of {told['all_writes']}, reads {told['own_reads']}"
            print(f"  {step:12} {times}; {cost}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--groups", type=int, default=500)
    parser.add_argument("--peer", action="store_true", help="also LeaderWorkerSet")
    parser.add_argument("--only", nargs="*", choices=MEASUREMENTS, help="these measurements alone")
    parser.add_argument("--log", action="store_true", help="print the end of each operator's log")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    wanted = arguments.only or [name for name in MEASUREMENTS if arguments.peer or name.startswith("arriero")]
    told = {"machine": machine(), "groups": arguments.groups, "pods_per_group": PODS_PER_GROUP, "nodes": NODES}
    found: dict[str, Any] = {}
    for name in wanted:
        found[name] = measure(name, arguments.groups, arguments.log)
        show(name, found[name])
        if arguments.json:  # each time, so that what has been measured is not lost with what goes wrong later
            arguments.json.write_text(json.dumps({**told, "measurements": found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
