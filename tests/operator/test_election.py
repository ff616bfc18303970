"""The lease, against an API server in memory whose answers can be late or never come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from arriero_operator.runtime.api import ApiError
from arriero_operator.runtime.election import Election, LeadershipLost

SECONDS = 3


class Leases:
    """One lease. A write counts when it is made; its answer comes `late` seconds after, or never while `silent`."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.late = 0.0
        self.silent = False
        self.written_at = 0.0

    async def get(self, path: str, **_: str) -> Any:
        if self.silent:
            await asyncio.Event().wait()
        if self.lease is None:
            raise ApiError(404, "there is no lease")
        return self.lease

    async def create(self, kind: Any, namespace: str, body: Any, **_: str) -> Any:
        return await self._write(body["spec"])

    async def patch(self, kind: Any, namespace: str, name: str, body: Any, manager: str) -> Any:
        assert self.lease is not None
        if body["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise ApiError(409, "the object has been modified", "Conflict")
        return await self._write({**self.lease["spec"], **body["spec"]})

    async def _write(self, spec: Any) -> Any:
        if self.silent:
            await asyncio.Event().wait()
        version = int(self.lease["metadata"]["resourceVersion"]) + 1 if self.lease else 1
        seen = self.lease = {"metadata": {"resourceVersion": str(version), "uid": "u"}, "spec": spec}
        self.written_at = asyncio.get_running_loop().time()
        await asyncio.sleep(self.late)
        return seen


def election(leases: Leases, identity: str = "a") -> Election:
    return Election(leases, "system", identity, SECONDS)  # type: ignore[arg-type]


async def forever() -> None:
    await asyncio.Event().wait()


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - a lease in memory tells nobody
        await asyncio.sleep(0.01)


async def until_lost(leading: Election) -> float:
    """When leadership was lost."""
    with pytest.raises(LeadershipLost):
        await leading.lead(forever)
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize("late", [0.0, 0.9 * SECONDS * 2 / 3])
async def test_a_leader_that_hears_nothing_stops_before_its_lease_is_over_however_late_the_last_answer_was(
    late: float,
) -> None:
    leases = Leases()
    leading = asyncio.create_task(until_lost(election(leases)))
    await until(lambda: leases.lease is not None)
    leases.late = late
    first = leases.written_at
    await until(lambda: leases.written_at != first)
    written = leases.written_at
    leases.silent = True
    assert await leading - written < SECONDS, "another operator may lead by then"


async def test_who_gets_no_answer_in_time_does_not_lead() -> None:
    leases = Leases()
    leases.late = SECONDS
    led = asyncio.Event()

    async def work() -> None:
        led.set()
        await forever()

    leading = asyncio.create_task(election(leases).lead(work))
    await asyncio.sleep(SECONDS * 0.9)
    assert leases.lease is not None
    assert not led.is_set()
    leading.cancel()
    await asyncio.gather(leading, return_exceptions=True)


async def test_a_lease_that_is_given_back_is_taken_at_once() -> None:
    leases = Leases()
    first = asyncio.create_task(election(leases).lead(forever))
    await until(lambda: leases.lease is not None)
    await asyncio.sleep(0.05)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert leases.lease["spec"]["holderIdentity"] == ""
    second = asyncio.create_task(election(leases, "b").lead(forever))
    await until(lambda: leases.lease["spec"]["holderIdentity"] == "b")
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)


async def test_a_lease_that_another_took_is_lost() -> None:
    leases = Leases()
    leading = asyncio.create_task(until_lost(election(leases)))
    await until(lambda: leases.lease is not None)
    leases.lease = {
        "metadata": {"resourceVersion": "99", "uid": "u"},
        "spec": {"holderIdentity": "b", "leaseDurationSeconds": SECONDS},
    }
    began = asyncio.get_running_loop().time()
    assert await leading - began < SECONDS
    assert leases.lease["spec"]["holderIdentity"] == "b"
