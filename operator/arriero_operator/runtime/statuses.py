"""The engines' own words: follows Worker.Status of pods, and asks leaders to drain."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import grpc
import grpc.aio

from arriero.inference.v1 import worker_pb2, worker_pb2_grpc
from arriero_operator.observe import Pod, RankReport, Report
from arriero_operator.runtime import metrics
from arriero_operator.runtime.store import Key
from arriero_operator.wanted import CONTROL

log = logging.getLogger("arriero.operator")

Heard = Callable[[Key], None]
"""Told when a pod's report has changed: namespace and pod."""

_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),
)
_PROGRESS_SECONDS = 1.0
"""Bytes loaded and requests running change all the time: they are told at most this often."""
_PHASE = len("PHASE_")


@dataclass(slots=True)
class _Follower:
    uid: str
    address: str
    task: asyncio.Task[None]


class Statuses:
    """Reports by pod. A pod whose stream is broken has none: nothing old is taken for the truth."""

    def __init__(self, heard: Heard, port: int = CONTROL) -> None:
        self._heard = heard
        self._port = port
        self._followers: dict[Key, _Follower] = {}
        self._drains: dict[tuple[Key, str], asyncio.Task[None]] = {}
        self._reports: dict[Key, Report] = {}
        self._unheard: set[Key] = set()
        """Pods that have neither said a word nor failed to, since they are followed."""
        self._all_heard = asyncio.Event()

    async def first_words(self, seconds: float) -> None:
        """Wait until every pod that is followed has said how it is or could not be asked, but not for longer than that.

        Who has just begun to look knows of no engine yet, and would tell of groups that serve as if they did not.
        """
        try:
            async with asyncio.timeout(seconds):
                while self._unheard:
                    self._all_heard.clear()
                    await self._all_heard.wait()
        except TimeoutError:
            log.info("%d of %d pods have not said how they are", len(self._unheard), len(self._followers))

    def reports(self, pods: Iterable[Pod]) -> Mapping[str, Report]:
        """Of these pods, by name."""
        return {pod.name: report for pod in pods if (report := self._reports.get((pod.namespace, pod.name)))}

    def follow(self, key: Key, pod: Pod | None) -> None:
        """Take note of how a pod is now; None: it is gone."""
        follower = self._followers.get(key)
        address = _address(pod, self._port) if pod is not None else ""
        uid = pod.uid if pod is not None else ""
        if follower is not None and (follower.uid, follower.address) != (uid, address):
            follower.task.cancel()
            del self._followers[key]
            self._asked(key)
            self._forget(key)
        if address and key not in self._followers:
            task = asyncio.create_task(self._follow(key, address), name=f"status of {key[1]}")
            self._followers[key] = _Follower(uid, address, task)
            self._unheard.add(key)
        metrics.STATUS_STREAMS.set(len(self._followers))

    def drain(self, pod: Pod, seconds: float) -> None:
        """Ask a leader to drain, unless it has been asked and is at it."""
        address, known = _address(pod, self._port), ((pod.namespace, pod.name), pod.uid)
        if address and known not in self._drains:
            task = asyncio.create_task(self._drain(pod, address, seconds), name=f"drain of {pod.name}")
            self._drains[known] = task
            task.add_done_callback(lambda _: self._drains.pop(known, None))

    async def close(self) -> None:
        tasks = [*(follower.task for follower in self._followers.values()), *self._drains.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, key: Key, address: str) -> None:
        pause = 0.2
        while True:
            try:
                async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
                    stub = worker_pb2_grpc.WorkerStub(channel)
                    async for told in stub.Status(worker_pb2.StatusRequest(), wait_for_ready=False):
                        pause = 0.2
                        self._hear(key, report_of(told))
            except grpc.aio.AioRpcError as error:
                log.debug("status of %s: %s", key[1], error.details())
            self._asked(key)
            self._forget(key)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(3.0, pause * 1.6)

    async def _drain(self, pod: Pod, address: str, seconds: float) -> None:
        log.info("%s/%s is asked to drain within %g s", pod.namespace, pod.name, seconds)
        try:
            async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
                stub = worker_pb2_grpc.WorkerStub(channel)
                async for _ in stub.Drain(worker_pb2.DrainRequest(timeout_seconds=seconds)):
                    pass
        except grpc.aio.AioRpcError as error:
            log.warning("%s/%s could not be asked to drain: %s", pod.namespace, pod.name, error.details())
            await asyncio.sleep(1.0)  # before the next pass asks again
        self._heard((pod.namespace, pod.name))

    def _hear(self, key: Key, report: Report) -> None:
        known = self._reports.get(key)
        self._reports[key] = report
        self._asked(key)
        if known is None or _turn(known) != _turn(report):
            self._heard(key)

    def _asked(self, key: Key) -> None:
        self._unheard.discard(key)
        if not self._unheard:
            self._all_heard.set()

    def _forget(self, key: Key) -> None:
        if self._reports.pop(key, None) is not None:
            self._heard(key)


def report_of(told: worker_pb2.StatusResponse) -> Report:
    """A Worker.Status as the operator's decisions read it."""
    return Report(
        phase=_phase(told.phase),
        epoch=told.epoch,
        ranks=tuple(
            RankReport(
                rank=rank.rank,
                pod=rank.pod,
                phase=_phase(rank.phase),
                epoch=rank.epoch,
                bytes_loaded=rank.bytes_loaded,
                bytes_total=rank.bytes_total,
                phase_seconds=rank.phase_seconds,
                bytes_per_second=rank.bytes_per_second,
                reason=rank.reason,
            )
            for rank in told.ranks
        ),
        running=told.running,
        waiting=told.waiting,
        tokens_per_second=told.tokens_per_second,
        reason=told.reason,
    )


def _phase(value: int) -> str:
    """As "Serving"; a phase that this operator has never heard of counts as Starting."""
    try:
        return worker_pb2.Phase.Name(value)[_PHASE:].capitalize()
    except ValueError:
        return "Starting"


def _turn(report: Report) -> object:
    """What of a report changes what is decided or told: not each request or token."""
    ranks = tuple(
        (r.rank, r.phase, r.epoch, r.reason, 20 * r.bytes_loaded // max(1, r.bytes_total)) for r in report.ranks
    )
    return report.phase, report.epoch, report.reason, report.drained, ranks


def _address(pod: Pod, port: int) -> str:
    """Where a pod's control port is; empty: it has none to speak of. A leader speaks for its whole group once it runs;
    until then, each pod speaks for itself, for it may be fetching the model.
    """
    status = pod.raw.get("status") or {}
    host = str(status.get("podIP") or "")
    if not pod.group or not host or pod.over or (pod.index and pod.ready):
        return ""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
