"""One served model in one router process: its replicas, how they are picked, and the connections to them."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import grpc.aio

from arriero_router.core.dispatch import Dispatcher, Grant, Waiter
from arriero_router.core.hold import HoldQueue
from arriero_router.core.policies import POLICIES
from arriero_router.core.pool import Pool, PoolSettings
from arriero_router.core.prefix_index import PrefixIndex
from arriero_router.core.replay import ReplaySettings
from arriero_router.core.replica import Endpoint, Replica
from arriero_router.endpoints.channel import Security, open_channel
from arriero_router.endpoints.file import FileSource
from arriero_router.endpoints.followers import Followers
from arriero_router.endpoints.kubernetes import Access, KubernetesSource, Selection
from arriero_router.endpoints.model import Source, address
from arriero_router.endpoints.probe import ProbeLimits
from arriero_router.endpoints.slices import Ports
from arriero_router.endpoints.static import StaticSource
from arriero_router.endpoints.status import StatusLimits
from arriero_router.front.upstream import UpstreamPool
from arriero_router.observe.metrics import Metrics, ModelMetrics

if TYPE_CHECKING:
    from arriero_router.config import Config, Model
    from arriero_router.front.journey import Journey, Outcome

log = logging.getLogger("arriero.router")

_TICK = 0.1
"""Seconds: how late a deadline, the end of an ejection or a silence may be noticed."""
_UNHURRIED = (("grpc.http2.lookahead_bytes", 64), ("grpc.http2.bdp_probe", 0))
"""A replica may not write further ahead than this router reads: what it has to say then gathers there, and comes in
fewer messages, which is what a busy router needs. A message costs it the same whatever its size.
"""
_LOST_SILENCE = 5.0
"""Seconds without a byte after which an answer of a replica that is not heard of any more is given up."""


class Served:
    """Everything of one model. Owned by the router's loop."""

    def __init__(
        self,
        model: Model,
        config: Config,
        metrics: Metrics,
        security: Security,
        weights: Mapping[str, float],
        kubeconfig: str = "",
    ) -> None:
        """`weights`: shares of tenants while requests are held. `kubeconfig`: where the configuration names none."""
        self.loop = asyncio.get_running_loop()
        self.name = model.name
        self.security = security
        self.open = 0
        """Requests that are not over, held ones among them."""
        self._last_left: asyncio.Event | None = None
        """Set when it is retired and nothing is open any more."""
        clock = time.monotonic
        tuning = model.prefix
        self.index = PrefixIndex(tuning.max_marks, tuning.max_expected, tuning.expected_seconds)
        self._pools: dict[str, UpstreamPool] = {}
        self._leaving: list[UpstreamPool] = []
        """Of replicas that are gone, while something runs on them."""
        self._upstreams: dict[Replica, UpstreamPool] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self.pool = Pool(self._pool_settings(model, config), clock, self._room, self._gone)
        self.policy = POLICIES[model.policy](self.index, random.Random())
        queue: HoldQueue[Waiter] = HoldQueue(config.hold.max_queue, weights)
        self.dispatcher = Dispatcher(self.pool, self.policy, queue, clock, self._picked)
        self.metrics: ModelMetrics = metrics.model(model.name, self.dispatcher)
        self.metrics.index_size = self.index.__len__
        self._all_metrics = metrics
        self.source = _source(model, kubeconfig)
        health = self.health = config.health
        self._followers = Followers(
            self.pool,
            self._on_marks if model.policy == "prefix" else None,
            status=StatusLimits(silence=health.timeout_seconds),
            probe=ProbeLimits(
                interval=health.interval_seconds,
                hurried=min(ProbeLimits().hurried, health.interval_seconds),
                answer=health.timeout_seconds,
            ),
            ready_path=model.endpoints.health_path,
            security=security,
        )
        self._source_task = self.loop.create_task(self.source.run(self._publish))
        self._ticker = self.loop.call_later(_TICK, self._tick)
        self.configure(model, config)

    def configure(self, model: Model, config: Config) -> None:
        """Take over what may change while running: everything but names, policy and endpoints."""
        self.model = model
        self.names = (model.name, *model.aliases)
        self.by_session = model.policy == "hash"
        self.session_header = model.session_header.encode()
        self.pool.settings = self._pool_settings(model, config)
        self.dispatcher.queue.limit = config.hold.max_queue
        self.hold_seconds = config.hold.timeout_seconds
        self.stall_seconds = config.replay.stall_seconds
        self.replay = ReplaySettings(again=config.replay.attempts)
        self.connect_seconds = config.limits.connect_seconds
        self.idle_seconds = config.limits.upstream_idle_seconds
        self.answer_seconds = config.limits.answer_seconds

    @staticmethod
    def _pool_settings(model: Model, config: Config) -> PoolSettings:
        return PoolSettings(
            max_in_flight=-(-model.max_in_flight_per_replica // config.workers),
            slow_start=config.slow_start_seconds,
            eject_after=config.ejection.failures,
            eject_base=config.ejection.base_seconds,
            eject_max=config.ejection.max_seconds,
        )

    def fits(self, model: Model, config: Config) -> bool:
        """Whether `configure` can bring it to this: its replicas come from the same place, and are watched and picked
        alike.
        """
        return (
            config.health == self.health
            and model.endpoints == self.model.endpoints
            and model.policy == self.model.policy
            and model.prefix == self.model.prefix
        )

    async def retire(self, seconds: float) -> None:
        """It takes no new request; close it when those it has are over, or after so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                self._last_left = asyncio.Event()
                if self.open:
                    await self._last_left.wait()
        except TimeoutError:
            log.warning("model %s: %d requests are cut off", self.name, self.open)
        finally:
            await self.close()

    def entered(self) -> None:
        """A request came for it."""
        self.open += 1

    def left(self) -> None:
        """The request is over."""
        self.open -= 1
        if not self.open and self._last_left is not None:
            self._last_left.set()

    async def close(self) -> None:
        """Let go of replicas; requests under way are cut off."""
        self.dispatcher.close("the model is not served any more")
        self._ticker.cancel()
        self._source_task.cancel()
        await asyncio.gather(self._source_task, return_exceptions=True)
        await self._followers.close()
        for pool in [*self._pools.values(), *self._leaving]:
            pool.close(busy=True)
        for channel in self._channels.values():
            await channel.close()
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        self._all_metrics.forget(self.metrics)

    # -- connections

    def upstreams(self, replica: Replica) -> UpstreamPool:
        """The HTTP connections to a replica."""
        known = self._upstreams.get(replica)
        if known is not None:
            return known
        endpoint = replica.endpoint
        key = address(endpoint.host, endpoint.http_port)
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = UpstreamPool(
                endpoint.host,
                endpoint.http_port,
                connect_seconds=self.connect_seconds,
                tls=self.security.http,
                server_name=self.security.server_name or None,
            )
        if self.pool.get(replica.name) is replica:
            self._upstreams[replica] = pool
        return pool

    def channel(self, replica: Replica) -> grpc.aio.Channel:
        """The gRPC channel to a replica's public face."""
        endpoint = replica.endpoint
        key = address(endpoint.host, endpoint.grpc_port)
        channel = self._channels.get(key)
        if channel is None:
            channel = self._channels[key] = open_channel(endpoint.host, endpoint.grpc_port, self.security, _UNHURRIED)
        return channel

    def silence_of(self, replica: Replica, begun: bool) -> float:
        """Seconds without a word after which an answer of the replica is given up; 0: never. `begun`: some of it has
        come.
        """
        report = replica.report
        if not report.ready and not report.draining:
            return _LOST_SILENCE
        return self.stall_seconds if begun else self.answer_seconds

    # -- what happened

    def replaying(self, journey: Journey, outcome: Outcome) -> None:
        """A broken attempt is followed by another."""
        assert journey.grant is not None
        assert outcome.kind is not None
        if outcome.kind.is_fault:
            self.metrics.replays += 1
        log.info(
            "replica %s: %s (%s): the request goes on elsewhere",
            journey.grant.replica.name,
            outcome.kind.value,
            outcome.error,
        )

    def _picked(self, grant: Grant) -> None:
        self.metrics.picked(grant)

    def _publish(self, endpoints: list[Endpoint]) -> None:
        self.pool.set_endpoints(endpoints)
        self._followers.set_endpoints(endpoints)

    def _room(self) -> None:
        self.dispatcher.pump()

    def _gone(self, replica: Replica) -> None:
        self.policy.gone(replica)
        self.index.forget(replica.slot)
        endpoint = replica.endpoint
        self._upstreams.pop(replica, None)
        pool = self._pools.pop(address(endpoint.host, endpoint.http_port), None)
        if pool is not None:
            pool.close()
            self._leaving.append(pool)
        channel = self._channels.pop(address(endpoint.host, endpoint.grpc_port), None)
        if channel is not None:
            # What runs on it may end; a channel without calls closes at once.
            task = self.loop.create_task(channel.close(grace=None if not replica.in_flight else 3600.0))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _on_marks(self, name: str, reset: bool, added: Sequence[int], removed: Sequence[int]) -> None:
        replica = self.pool.get(name)
        if replica is None:
            return
        if reset:
            self.index.reset(replica.slot, added)
        else:
            self.index.remove(replica.slot, removed)
            self.index.add(replica.slot, added)

    def _tick(self) -> None:
        self._ticker = self.loop.call_later(_TICK, self._tick)
        self.dispatcher.pump()
        now = self.loop.time()
        for replica in self.pool.replicas:
            pool = self._pools.get(address(replica.endpoint.host, replica.endpoint.http_port))
            if pool is not None:
                head, silence = self.silence_of(replica, begun=False), self.silence_of(replica, begun=True)
                pool.sweep(now, idle=self.idle_seconds, head=head, silence=silence)
        if self._leaving:
            for pool in self._leaving:
                pool.sweep(now, idle=0, head=self.answer_seconds, silence=self.stall_seconds)
            self._leaving = [pool for pool in self._leaving if pool.connections]


def _source(model: Model, kubeconfig: str) -> Source:
    endpoints = model.endpoints
    if endpoints.static is not None:
        return StaticSource([entry.endpoint() for entry in endpoints.static])
    if endpoints.file is not None:
        return FileSource(endpoints.file)
    place = endpoints.kubernetes
    assert place is not None
    return KubernetesSource(
        Selection(
            service=place.service,
            selector=place.label_selector,
            namespace=place.namespace,
            ports=Ports(place.ports.http, place.ports.grpc, place.ports.control),
            family=place.address_family,
        ),
        Access(place.kubeconfig or kubeconfig, place.context),
    )
