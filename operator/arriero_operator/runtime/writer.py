"""Carries out what a pass has decided, many writes at a time; what the API answers is seen at once.

Order is kept where it matters: what pods refer to is there before they are, and the status comes last.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from arriero_operator import names
from arriero_operator.observe import Object, Observed, timestamp
from arriero_operator.runtime import metrics
from arriero_operator.runtime.api import Api, ApiError
from arriero_operator.runtime.kinds import DEPLOYMENT, EVENT, KINDS
from arriero_operator.runtime.store import Store
from arriero_operator.writes import FIELD_MANAGER, Apply, Delete, Emit, Patch, SetStatus, Write

log = logging.getLogger("arriero.operator")

_AT_ONCE, _OF_ONE = 24, 8
"""Writes on their way at a time: of all deployments, and of one."""


@dataclass(slots=True)
class Outcome:
    """How the writes of one pass went."""

    taken: list[Object] = field(default_factory=list)
    """Objects of others found under names that the deployment wants."""
    refused: dict[str, str] = field(default_factory=dict)
    """What the API server will not take as it is, by "Kind name", and why."""
    gone: bool = False
    """The deployment itself is not there any more."""
    again: bool = False
    """Something had changed just then: another pass must look at it, even if nothing more is heard."""


class Writer:
    """Writes for one deployment at a time; one instance serves all."""

    def __init__(self, api: Api, store: Store, identity: str, now: Callable[[], float]) -> None:
        self._api = api
        self._store = store
        self._identity = identity
        self._now = now
        self._room = asyncio.Semaphore(_AT_ONCE)

    async def carry_out(self, observed: Observed, writes: tuple[Write, ...]) -> Outcome:
        """All of them. What is refused for good is noted, and the rest goes on; raises ApiError for what may pass."""
        outcome = Outcome()
        for lanes in stages(writes):
            await self._side_by_side(observed, deque(lanes), outcome)
        return outcome

    async def _side_by_side(self, observed: Observed, lanes: deque[Sequence[Write]], outcome: Outcome) -> None:
        trouble: list[ApiError] = []

        async def work() -> None:
            while lanes:
                for write in lanes.popleft():
                    if trouble or outcome.gone:
                        return
                    try:
                        async with self._room:
                            await self._one(observed, write, outcome)
                    except ApiError as error:
                        if error.may_pass:
                            trouble.append(error)
                        else:
                            self._refused(observed, write, error, outcome)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(_OF_ONE, len(lanes))):
                tasks.create_task(work())
        if trouble:
            raise trouble[0]

    async def still_taken(self, uid: str, taken: list[Object]) -> list[Object]:
        """Those of the objects in the way that still are. Raises ApiError."""
        found = []
        for seen in taken:
            kind = KINDS[seen["kind"]]
            there = await self._there(kind.path(seen["metadata"]["namespace"], seen["metadata"]["name"]))
            if there is not None and not _owned(there, uid):
                found.append(there)
        return found

    async def _one(self, observed: Observed, write: Write, outcome: Outcome) -> None:
        space = observed.namespace
        match write:
            case Apply():
                await self._apply(space, observed.uid, write, outcome)
            case Patch():
                metrics.WRITES.labels("patch", write.kind).inc()
                self._store.put(await self._api.patch(KINDS[write.kind], space, write.name, write.body, FIELD_MANAGER))
            case Delete():
                await self._delete(space, write)
            case Emit():
                metrics.WRITES.labels("create", "Event").inc()
                await self._api.create(EVENT, space, self._event(observed, write), fieldManager=FIELD_MANAGER)
            case SetStatus():
                metrics.WRITES.labels("status", DEPLOYMENT.name).inc()
                body = {
                    "apiVersion": DEPLOYMENT.api_version,
                    "kind": DEPLOYMENT.name,
                    "metadata": {"name": observed.name, "namespace": space, "uid": observed.uid},
                    "status": write.status,
                }
                self._store.put(await self._api.apply(DEPLOYMENT, space, observed.name, body, FIELD_MANAGER, "status"))

    async def _apply(self, space: str, uid: str, write: Apply, outcome: Outcome) -> None:
        rendered = write.object
        kind, name = KINDS[rendered["kind"]], rendered["metadata"]["name"]
        if write.new and (there := await self._there(kind.path(space, name))) is not None and not _owned(there, uid):
            outcome.taken.append(there)
            return
        metrics.WRITES.labels("apply", kind.name).inc()
        self._store.put(await self._api.apply(kind, space, name, rendered, FIELD_MANAGER))

    async def _there(self, path: str) -> Any:
        try:
            return await self._api.get(path, resourceVersion="0")  # of the API server's cache: most are not there
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def _delete(self, space: str, write: Delete) -> None:
        options: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {"uid": write.uid},
        }
        if write.grace_seconds is not None:
            options["gracePeriodSeconds"] = write.grace_seconds
        log.info("%s/%s %s is deleted: %s", space, write.kind, write.name, write.why)
        metrics.WRITES.labels("delete", write.kind).inc()
        answer = await self._api.delete(KINDS[write.kind], space, write.name, options)
        if answer.get("kind") == write.kind and answer["metadata"].get("deletionTimestamp"):
            self._store.put(answer)
        else:
            self._store.remove(write.kind, (space, write.name), uid=write.uid)

    def _refused(self, observed: Observed, write: Write, error: ApiError, outcome: Outcome) -> None:
        space = observed.namespace
        match write:
            case Emit() if error.status == 409:
                pass  # it was emitted before
            case SetStatus() if error.status == 404:
                outcome.gone = True
            case Patch() | Delete() if error.status == 404:
                self._store.remove(write.kind, (space, write.name), uid=write.uid)
            case _ if error.status == 409:
                # It is no longer the one that was seen, or somebody wrote at the same moment.
                outcome.again = True
            case Apply():
                what = f"{write.object['kind']} {write.object['metadata']['name']}"
                if error.reason != "NamespaceTerminating" and "being terminated" not in str(error):
                    log.warning("%s/%s is refused: %s", space, what, error)
                    outcome.refused[what] = str(error)
            case _:
                log.warning("%s/%s: a write is refused: %s", space, observed.name, error)

    def _event(self, observed: Observed, write: Emit) -> Mapping[str, Any]:
        when = timestamp(self._now())
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": write.name, "namespace": observed.namespace},
            "involvedObject": {
                "apiVersion": DEPLOYMENT.api_version,
                "kind": DEPLOYMENT.name,
                "name": observed.name,
                "namespace": observed.namespace,
                "uid": observed.uid,
                "resourceVersion": observed.resource["metadata"].get("resourceVersion", ""),
            },
            "type": write.type,
            "reason": write.reason,
            "message": write.message,
            "firstTimestamp": when,
            "lastTimestamp": when,
            "count": 1,
            "source": {"component": "arriero-operator"},
            "reportingComponent": "serving.arriero.dev/operator",
            "reportingInstance": self._identity,
        }


def _owned(there: Object, uid: str) -> bool:
    return any(owner.get("uid") == uid for owner in there["metadata"].get("ownerReferences") or [])


_CHAIN = ("ServiceAccount", "Role", "RoleBinding", "ConfigMap", "Deployment")
"""Kinds of a deployment's own objects of which each may refer to those before it, and is refused or fails without."""


def stages(writes: Iterable[Write]) -> list[list[Sequence[Write]]]:
    """Stages come one after the other; in a stage, lanes go side by side, each in its order. What is applied for one
    group is a lane.
    """
    chain: list[Write] = []
    single: list[Sequence[Write]] = []
    groups: dict[str, list[Write]] = {}
    changes: list[Sequence[Write]] = []
    told: list[Sequence[Write]] = []
    status: list[Sequence[Write]] = []
    for write in writes:
        match write:
            case Apply():
                group = write.object["metadata"]["labels"].get(names.GROUP)
                if group:
                    groups.setdefault(group, []).append(write)
                elif write.object["kind"] in _CHAIN:
                    chain.append(write)
                else:
                    single.append([write])
            case Emit():
                told.append([write])
            case SetStatus():
                status.append([write])
            case _:
                changes.append([write])
    return [[chain, *single], [*groups.values()], changes, told, status]
