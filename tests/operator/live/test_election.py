"""Two operators: one leads; when it ends, dies or is cut off, the other one does, and never both."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from tests.cluster.processes import guard, wait_until
from tests.operator.live.process import Operator
from tests.operator.live.proxy import ApiProxy
from tests.operator.live.world import World

pytestmark = pytest.mark.cluster

Start = Callable[..., Operator]
LASTS = 15.0
"""Seconds of the lease."""


@pytest.fixture
def lines(world: World) -> Iterator[tuple[ApiProxy, ApiProxy]]:
    """Each operator has a line of its own."""
    made = world.proxy(), world.proxy()
    yield made
    for line in made:
        line.close()


def pair(lines: tuple[ApiProxy, ApiProxy], start: Start) -> tuple[Operator, Operator]:
    first = start(lines[0], ARRIERO_POD_NAME="operator-a")
    wait_until(lambda: first.leads, "a leader")
    second = start(lines[1], ARRIERO_POD_NAME="operator-b")
    wait_until(lambda: second.health("ready")[0] == 200, "one that stands by")
    assert not second.leads
    return first, second


def took_over(line: ApiProxy, second: Operator, timeout: float) -> None:
    wait_until(lambda: second.leads, "another leader", timeout, interval=0.02)


def test_a_leader_that_is_told_to_end_gives_its_lease_back(
    world: World, operators: Start, lines: tuple[ApiProxy, ApiProxy], space: str
) -> None:
    first, second = pair(lines, operators)
    world.deploy(space)
    world.wait_ready(space)
    assert not lines[1].writes(), "one that stands by writes nothing"
    began = time.monotonic()
    ended = first.terminate()
    took_over(lines[1], second, 10.0)
    print(f"SIGTERM: ended after {ended:.2f} s, the other leads after {time.monotonic() - began:.2f} s")
    assert first.poll() == 0
    assert ended < 3.0
    assert time.monotonic() - began < 5.0
    assert "Traceback" not in first.words()
    world.edit(space, replicas=2)
    wait_until(lambda: world.status(space).get("ready") == "2/2", "work of the other")


def test_a_leader_that_is_killed_is_followed_within_its_lease(
    world: World, operators: Start, lines: tuple[ApiProxy, ApiProxy], space: str
) -> None:
    first, second = pair(lines, operators)
    world.deploy(space)
    world.wait_ready(space)
    began = time.monotonic()
    first.kill()
    world.edit(space, replicas=2)
    took_over(lines[1], second, LASTS + 10.0)
    taken = time.monotonic() - began
    wait_until(lambda: world.status(space).get("ready") == "2/2", "work of the other")
    print(
        f"SIGKILL: the other leads after {taken:.1f} s, has done what was left after {time.monotonic() - began:.1f} s"
    )
    assert taken < LASTS + 5.0


def test_a_leader_that_is_cut_off_stops_before_another_begins(
    world: World, operators: Start, lines: tuple[ApiProxy, ApiProxy], spaces: Callable[[], str]
) -> None:
    first, second = pair(lines, operators)
    affected = [spaces() for _ in range(4)]
    for space in affected:
        world.deploy(space)
    wait_until(lambda: len(lines[0].writes()) >= 3, "work under way", interval=0.002)
    began = time.monotonic()
    lines[0].part()
    took_over(lines[1], second, LASTS + 15.0)
    taken = time.monotonic() - began
    wait_until(lambda: lines[1].writes(), "work of the other", interval=0.01)
    assert not first.leads
    lines[0].heal()
    world.wait_ready(*affected)
    wait_until(lambda: first.health("ready")[0] == 200, "one that stands by again")
    assert not first.leads
    assert second.leads
    tried = [call.at for call in lines[0].calls if call.writes]
    begun = min(call.at for call in lines[1].calls if call.writes)
    print(
        f"cut off: its last try to write {max(tried) - began:.1f} s after, the other leads after {taken:.1f} s and "
        f"writes after {begun - began:.1f} s"
    )
    assert max(tried) < begun, "never both"
    assert first.poll() is None


def test_the_program_itself_ends_in_order(world: World, proxy: ApiProxy, space: str) -> None:
    """Not forked but started, as a pod starts it."""
    world.deploy(space)
    kubeconfig, config = world.files(proxy)
    process = subprocess.Popen(
        [
            *guard(),
            sys.executable,
            "-m",
            "arriero_operator",
            "--config",
            str(config),
            "--host",
            "127.0.0.1",
            "--port=0",
        ],
        env={"PATH": "/usr/bin:/bin", "KUBECONFIG": str(kubeconfig), "ARRIERO_POD_NAMESPACE": "arriero-system"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        world.wait_ready(space)
        began = time.monotonic()
        process.terminate()
        _, words = process.communicate(timeout=20.0)
        print(f"the program ended {time.monotonic() - began:.2f} s after SIGTERM")
        assert process.returncode == 0, words
        assert "Traceback" not in words, words
    finally:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()
