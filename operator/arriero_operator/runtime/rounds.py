"""Rounds of passes: what has changed is decided anew, all from one snapshot; then the writes go out side by side.

One placement serves all passes of a round, so no two of them take the same room; and what a pass writes on a pod counts
as written from the moment of the decision, so the next round does not give it away again.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from arriero_operator import names
from arriero_operator.desired import Desired, desired
from arriero_operator.observe import Object, Observed, Pod
from arriero_operator.placement import gangs, place
from arriero_operator.runtime import gauges, metrics
from arriero_operator.runtime.api import ApiError
from arriero_operator.runtime.held import Held
from arriero_operator.runtime.kinds import DEPLOYMENT
from arriero_operator.runtime.statuses import Statuses
from arriero_operator.runtime.store import Key, Store, key_of, matters, owner_of
from arriero_operator.runtime.writer import Outcome, Writer
from arriero_operator.settings import Settings
from arriero_operator.verdict import Verdict
from arriero_operator.writes import Patch

log = logging.getLogger("arriero.operator")

_GATHER_SECONDS = 0.02
"""Changes come in swarms: a StatefulSet's pods, a node's. Rounds are at least so far apart."""
_ROUND_SECONDS = 0.1
"""How long a round decides once it has placed; then the writes, and whatever else the loop has to do, come first."""
_RESYNC_SECONDS = 60.0
"""Each deployment is looked at so often, whatever has been heard."""
_RETRY = (0.2, 30.0)
_FIRST_WORDS_SECONDS = 3.0
"""How long the first round waits for engines to say how they are: those of a lost node never will."""
_ANOTHERS_SECONDS = 15.0
"""How long a name counts as taken by somebody else before that is looked at again."""


class Rounds:
    """Decides which deployments need a pass, and makes them."""

    def __init__(self, settings: Settings, now: Callable[[], float] = time.time, writers: int = 12) -> None:
        """now: seconds since 1970. writers: how many deployments are written to at a time."""
        self.store = Store(self._changed)
        self.statuses = Statuses(self._heard)
        self.held = Held(self._routers, self.wake)
        self.last_round = time.monotonic()
        self._settings = settings
        self._now = now
        self._writers = writers
        self._wake = asyncio.Event()
        self._dirty: dict[Key, None] = {}
        self._place = False
        self._busy: dict[Key, asyncio.Task[None]] = {}
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._pauses: dict[Key, float] = {}
        self._outcomes: dict[Key, Outcome] = {}
        self._look_at: dict[Key, float] = {}
        """When what is in the way is looked at again, by time.monotonic()."""
        self._missing: dict[tuple[str, str], str] = {}

    def wake(self, key: Key) -> None:
        """A pass over this deployment is due."""
        self._dirty[key] = None
        self._wake.set()

    async def run(self, writer: Writer) -> None:
        """Until cancelled. What is being written is finished first, so far as the loop lives."""
        spent = 0.0
        await self.statuses.first_words(_FIRST_WORDS_SECONDS)
        try:
            while True:
                self.last_round = time.monotonic()
                metrics.QUEUE.set(len(self._dirty))
                try:
                    async with asyncio.timeout(_RESYNC_SECONDS / 4):
                        await self._wake.wait()
                except TimeoutError:
                    continue
                # What takes long to decide, say of hundreds of groups, is decided less often.
                await asyncio.sleep(min(max(_GATHER_SECONDS, 2 * spent), 1.0))
                self._wake.clear()
                begun = time.monotonic()
                self._round(writer)
                spent = time.monotonic() - begun
        finally:
            for timer in self._timers.values():
                timer.cancel()
            for task in self._busy.values():
                task.cancel()
            await asyncio.gather(*self._busy.values(), return_exceptions=True)

    @property
    def idle(self) -> bool:
        """Nothing is due and nothing is being written."""
        return not self._dirty and not self._busy and not self._place

    def _round(self, writer: Writer) -> None:
        """One snapshot, one placement, and a pass for each deployment that is due and not being written to.

        As many are decided as can be written to: what a later one is decided from is then as fresh as can be. Those
        that get nodes come first, then the one that has been due for longest.
        """
        if len(self._busy) >= self._writers:
            return  # the end of any of them wakes
        verdicts, placed = self._verdicts()
        begun = time.monotonic()
        due = [key for key in {**placed, **self._dirty} if key not in self._busy]
        for count, key in enumerate(due):
            if len(self._busy) >= self._writers:
                return
            # At least one: a round that decided nothing, for want of time, would be followed by others like it.
            if count and time.monotonic() - begun > _ROUND_SECONDS:
                self._wake.set()
                return
            self._dirty.pop(key, None)
            resource = self.store.get(DEPLOYMENT.name, key)
            if resource is None:
                self._end(key)
                continue
            if time.monotonic() >= self._look_at.get(key, float("inf")):
                self._busy[key] = asyncio.create_task(self._look_again(key, resource, writer))
                continue
            try:
                self._decide(key, resource, verdicts, writer)
            except Exception:
                # A defect of ours must not take the other deployments down with it.
                log.exception("%s/%s: the pass failed", *key)
                metrics.PASSES.labels("defect").inc()
                self._later(key, self._pause(key))

    def _verdicts(self) -> tuple[Mapping[tuple[str, str], Verdict], dict[Key, None]]:
        """One placement of everything that waits, and the deployments that get nodes by it. Those that it concerns
        otherwise become due.
        """
        self._place = False
        waiting = self.store.gated()
        if not waiting:
            self._missing.clear()
            return {}, {}
        begun = time.perf_counter()
        verdicts = place(self.store.nodes, gangs(waiting), self._now(), self._settings.patience_seconds)
        metrics.PLACE_SECONDS.observe(time.perf_counter() - begun)
        owners = {(pod.namespace, pod.group): (pod.namespace, pod.labels[names.DEPLOYMENT]) for pod in waiting}
        placed: dict[Key, None] = {}
        for group, verdict in verdicts.items():
            if verdict.pins:
                placed[owners[group]] = None
            if verdict.pins or verdict.give_back or self._missing.get(group) != verdict.missing:
                self._dirty.setdefault(owners[group])
        self._missing = {group: verdict.missing for group, verdict in verdicts.items()}
        return verdicts, placed

    def _decide(self, key: Key, resource: Object, verdicts: Mapping[tuple[str, str], Verdict], writer: Writer) -> None:
        begun = time.perf_counter()
        pods = self.store.pods_of(key)
        outcome = self._outcomes.get(key, Outcome())
        reports = self.statuses.reports(pods)
        held, told = self.held.of(pods)
        observed = Observed(
            resource=resource,
            objects=(*self.store.members(key), *outcome.taken),
            pods=tuple(pods),
            others=(),
            nodes=self.store.nodes,
            reports=reports,
            config=None,
            now=self._now(),
            verdicts=verdicts,
            held=held,
            told=told and all(pod.name in reports for pod in pods if pod.ready and pod.group and not pod.index),
            refused=outcome.refused,
        )
        decision = desired(observed, self._settings)
        metrics.DECIDE_SECONDS.observe(time.perf_counter() - begun)
        for write in decision.writes:
            if isinstance(write, Patch) and write.kind == "Pod":
                self.store.assume((observed.namespace, write.name), write.uid, write.body)
        self._cancel_timer(key)
        if decision.writes or decision.calls:
            self._busy[key] = asyncio.create_task(self._carry_out(key, observed, decision, writer))
        else:
            self._done(key, observed, decision)

    async def _carry_out(self, key: Key, observed: Observed, decision: Desired, writer: Writer) -> None:
        begun = time.perf_counter()
        try:
            outcome = await writer.carry_out(observed, decision.writes)
            for call in decision.calls:
                pod = self.store.pod((observed.namespace, call.pod))
                if pod is not None:
                    self.statuses.drain(pod, call.seconds)
        except ApiError as error:
            log.warning("%s/%s: %s; tried again", *key, error)
            metrics.PASSES.labels("failed").inc()
            self._later(key, self._pause(key))
        except Exception:
            log.exception("%s/%s: the pass failed", *key)
            metrics.PASSES.labels("defect").inc()
            self._later(key, self._pause(key))
        else:
            self._take(key, outcome)
            if outcome.again and not outcome.gone:
                self._later(key, self._pause(key))
            else:
                self._done(key, observed, decision)
        finally:
            metrics.PASS_SECONDS.observe(time.perf_counter() - begun)
            self.store.settle(key)
            del self._busy[key]
            self._wake.set()

    def _take(self, key: Key, outcome: Outcome) -> None:
        """Remember what is in the way: it is shown in the status, and looked at again after a while."""
        known = self._outcomes.pop(key, Outcome())
        if outcome.gone:
            self.store.remove(DEPLOYMENT.name, key)
            return
        # Nothing was written to names that were known to be taken, so nothing was found out about them either.
        found = {(o["kind"], key_of(o)): o for o in (*known.taken, *outcome.taken)}
        outcome.taken = [*found.values()]
        if outcome.taken or outcome.refused:
            self._outcomes[key] = outcome
            self._look_at.setdefault(key, time.monotonic() + _ANOTHERS_SECONDS)
        else:
            self._look_at.pop(key, None)
        if _names(known) != _names(outcome):
            self.wake(key)

    async def _look_again(self, key: Key, resource: Object, writer: Writer) -> None:
        """Names that were taken may be free by now. The pass comes after."""
        outcome = self._outcomes[key]
        try:
            outcome.taken = await writer.still_taken(str(resource["metadata"]["uid"]), outcome.taken)
        except ApiError as error:
            log.warning("%s/%s: %s", *key, error)
        finally:
            self._look_at[key] = time.monotonic() + _ANOTHERS_SECONDS
            del self._busy[key]
            self.wake(key)

    def _done(self, key: Key, observed: Observed, decision: Desired) -> None:
        metrics.PASSES.labels("written" if decision.writes else "unchanged").inc()
        self._pauses.pop(key, None)
        gauges.show(observed, self.store.get(DEPLOYMENT.name, key))
        limits = [_RESYNC_SECONDS * random.uniform(0.9, 1.1)]
        if decision.again_after is not None:
            limits.append(decision.again_after + 0.05)
        if key in self._look_at:
            limits.append(max(0.0, self._look_at[key] - time.monotonic()))
        self._later(key, min(limits))

    def _later(self, key: Key, seconds: float) -> None:
        self._cancel_timer(key)
        self._timers[key] = asyncio.get_running_loop().call_later(seconds, self._due, key)

    def _due(self, key: Key) -> None:
        self._timers.pop(key, None)
        self.wake(key)

    def _cancel_timer(self, key: Key) -> None:
        if timer := self._timers.pop(key, None):
            timer.cancel()

    def _pause(self, key: Key) -> float:
        shortest, longest = _RETRY
        pause = self._pauses[key] = min(longest, max(shortest, self._pauses.get(key, 0.0) * 2))
        return pause * random.uniform(0.8, 1.0)

    def _end(self, key: Key) -> None:
        """The deployment is gone."""
        self._cancel_timer(key)
        self._pauses.pop(key, None)
        self._outcomes.pop(key, None)
        self._look_at.pop(key, None)
        gauges.forget(key)

    def _changed(self, kind: str, old: Object | None, new: Object | None) -> None:
        seen: Any = new or old
        if kind == "Node":
            if matters(kind, old, new):
                self._place = True
                for hit in self.store.on_node(str(seen["metadata"]["name"])):
                    self.wake(hit)
                self._wake.set()
            return
        if kind == "Pod":
            owner = owner_of(seen)
            if owner is None:
                # Somebody else's: only the room that it takes matters.
                self._place = True
                if self.store.waiting:
                    self._wake.set()
                return
            self.statuses.follow(key_of(seen), self.store.pod(key_of(seen)) if new is not None else None)
        concerned = key_of(seen) if kind == DEPLOYMENT.name else owner_of(seen)
        if concerned is not None and matters(kind, old, new):
            self.wake(concerned)

    def _routers(self) -> Iterator[Pod]:
        """Router pods of deployments that follow their load."""
        for resource in self.store.all(DEPLOYMENT.name):
            if (resource.get("spec") or {}).get("autoscaling"):
                yield from (
                    p for p in self.store.pods_of(key_of(resource)) if p.labels.get(names.COMPONENT) == names.ROUTER
                )

    def _heard(self, pod: Key) -> None:
        known = self.store.pod(pod)
        if known is not None:
            self.wake((known.namespace, known.labels[names.DEPLOYMENT]))


def _names(outcome: Outcome) -> object:
    return [(o["kind"], key_of(o)) for o in outcome.taken], outcome.refused
