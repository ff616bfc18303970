"""One run of `arriero up`, from the first process to the last."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console

from arriero.inference.v1 import worker_pb2 as pb
from arriero_cli.board import Board
from arriero_cli.errors import EXIT_INTERRUPTED, CommandError
from arriero_cli.local import Commands, Keeper, process_environment
from arriero_cli.ports import LOOPBACK
from arriero_cli.process import KeptProcess, Program, Unusable
from arriero_cli.usage import ready_text, usage_text
from arriero_cli.view import DeploymentView, GroupView
from arriero_cli.watch import follow_status, http_ready, ready_replicas
from arriero_plan.launch import Launch

_GLANCE = 0.1  # seconds between looks at what changed
_ONE_WISH = 0.3  # seconds within which two signals are one wish: some starters signal a process and its group
_AFTER_DRAIN = 8.0  # seconds a process has beyond drainSeconds to end by itself


@dataclass(frozen=True, slots=True)
class Started:
    """What the processes are started with."""

    launches: tuple[Launch, ...]
    """One for each replica."""
    launch_paths: tuple[Path, ...]
    """Where they are written; the logs of a replica's pods go beside its launch."""
    router_path: Path
    """The router's configuration; its log goes beside it."""
    http_port: int
    grpc_port: int
    """The router's."""


class Running:
    """`run` once."""

    def __init__(self, started: Started, console: Console, commands: Commands, *, verbose: bool, began: float) -> None:
        """began: time.monotonic() when the command was given"""
        self._started, self._began = started, began
        self._view = DeploymentView(started.launches)
        self._board = Board(self._view, console, verbose=verbose)
        self._keeper = Keeper()
        self._router = self._add_router(commands)
        self._pods: list[KeptProcess] = []
        self._replica_of: dict[str, int] = {}
        """By the name of a pod's process."""
        for replica in range(len(started.launches)):
            self._add_pods(replica, commands)
        self._leaving, self._stopping = asyncio.Event(), asyncio.Event()
        self._may_route = asyncio.Event()
        self._has_served = False
        """Whether a request can have come to a replica."""
        self._asked = 0.0

    async def run(self) -> int:
        """Returns the exit status; nothing runs any more then. Raises CommandError."""
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(signum, self._on_signal)
        self._board.open()
        keeping = asyncio.gather(self._keeper.keep(self._pods), self._keep_router())
        watching = asyncio.gather(
            self._show(),
            self._announce(),
            *(
                follow_status(pod, partial(self._told, view, index))
                for view in self._view.replicas
                for index, pod in enumerate(view.launch.pods)
            ),
        )
        asked = asyncio.ensure_future(self._leaving.wait())
        try:
            done, _ = await asyncio.wait((keeping, watching, asked), return_when=asyncio.FIRST_COMPLETED)
            for task in done - {asked}:
                task.result()  # neither ends by itself: this raises
            return await self._drain(keeping)
        except Unusable as error:
            replica = self._replica_of.get(error.name)
            told = "" if replica is None else self._view.replicas[replica].reason
            reason = told or error.last_words or f"exit code {error.code}"
            raise CommandError(f"{error.name} cannot run: {reason}") from error
        finally:
            self._board.close()
            self._keeper.kill()
            for task in (keeping, watching, asked):
                task.cancel()
            await asyncio.gather(keeping, watching, asked, return_exceptions=True)

    # -- the processes

    def _add_router(self, commands: Commands) -> KeptProcess:
        path = self._started.router_path
        environment = process_environment(os.environ)
        program = Program("the router", commands.router(path), environment, path.with_name("router.log"))
        return self._keeper.add(program, self._board.row("router", self._view.router))

    def _add_pods(self, replica: int, commands: Commands) -> None:
        launch, path = self._started.launches[replica], self._started.launch_paths[replica]
        environment = process_environment(os.environ, launch.engine.threads)
        for pod, view in enumerate(self._view.replicas[replica].pods):
            name = self._view.name(replica, "pod", pod)
            program = Program(name, commands.pod(path, pod), environment, path.with_name(f"pod-{pod}.log"))
            self._pods.append(self._keeper.add(program, self._board.row(name, view)))
            self._replica_of[name] = replica

    async def _keep_router(self) -> None:
        """It begins when every replica can be asked how it is: before, it could only warn that they are not there."""
        await self._may_route.wait()
        if not self._leaving.is_set():
            await self._keeper.keep([self._router])

    def _told(self, view: GroupView, pod: int, status: pb.StatusResponse) -> None:
        view.told(pod, status)
        if all(replica.leader for replica in self._view.replicas):
            self._may_route.set()

    # -- the end

    def _on_signal(self) -> None:
        now = time.monotonic()
        if not self._leaving.is_set():
            self._asked = now
            self._leaving.set()
            self._may_route.set()
        elif now - self._asked > _ONE_WISH:
            self._stopping.set()

    async def _drain(self, keeping: asyncio.Future[tuple[None, None]]) -> int:
        """The router finishes what its clients wait for, while every replica is there; then the replicas leave."""
        self._board.close()
        if not self._has_served:
            return 0  # nothing can be running
        limit = self._started.launches[0].drain_seconds
        self._board.say(f"draining, for at most {limit:g} s; Ctrl-C again stops at once")
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            if not await self._leave([self._router], limit + _AFTER_DRAIN, keeping, stopping):
                return EXIT_INTERRUPTED
            self._kill_idle()
            if not await self._leave(self._pods, limit + _AFTER_DRAIN, keeping, stopping):
                return EXIT_INTERRUPTED
        finally:
            stopping.cancel()
        self._board.say("drained")
        return 0

    def _kill_idle(self) -> None:
        """A replica that does not serve has nothing to finish, once the router has nothing left for it."""
        for pod in self._pods:
            if not self._view.replicas[self._replica_of[pod.name]].serving:
                pod.kill()

    async def _leave(
        self,
        processes: Sequence[KeptProcess],
        limit: float,
        keeping: asyncio.Future[tuple[None, None]],
        stopping: asyncio.Future[Literal[True]],
    ) -> bool:
        """Whether they left, rather than somebody asked to stop at once. Raises CommandError, Unusable."""
        leaving = asyncio.ensure_future(self._keeper.leave(processes))
        try:
            await asyncio.wait((leaving, keeping, stopping), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if keeping.done():
                keeping.result()
                return True
            if leaving.done() or stopping.done():
                return leaving.done()
            late = ", ".join(process.name for process in processes if process.pid)
            raise CommandError(f"still there {limit:g} s after being asked to drain, and killed: {late}")
        finally:
            leaving.cancel()

    # -- what is said

    async def _show(self) -> None:
        requests = 0
        while True:
            self._has_served = self._has_served or self._view.serving > 0
            if not self._leaving.is_set():
                self._board.refresh()
            elif requests != self._view.requests:
                requests = self._view.requests
                self._board.say(f"draining: {requests} requests left")
            await asyncio.sleep(_GLANCE)

    async def _announce(self) -> None:
        """Say when all replicas take requests, with how to send one; from then on what is lost, and when it is back."""
        while True:
            if await self._all_ready():
                break
            await asyncio.sleep(_GLANCE)
        self._board.close()
        self._board.say(ready_text(self._started.launches, time.monotonic() - self._began), "bold")
        self._board.say(usage_text(self._started.launches[0], self._started.http_port, self._started.grpc_port))
        router_pid = self._view.router.pid
        lost: dict[int, float] = {}
        router_lost = 0.0
        while not self._leaving.is_set():
            await self._say_changes(lost)
            if self._view.router.pid != router_pid:
                router_lost = router_lost or time.monotonic()
                if self._view.router.pid and await self._routed() is not None:
                    router_pid = self._view.router.pid
                    self._board.say(f"the router answers again after {time.monotonic() - router_lost:.1f} s", "green")
                    router_lost = 0.0
            await asyncio.sleep(_GLANCE)
        await asyncio.Event().wait()

    async def _all_ready(self) -> bool:
        """Whether a request can go to any replica; no, once the end has begun."""
        count = len(self._started.launches)
        if self._leaving.is_set() or self._view.serving < count or await self._routed() != count:
            return False
        return all([await http_ready(launch.pods[0]) for launch in self._started.launches])

    async def _say_changes(self, lost: dict[int, float]) -> None:
        """`lost`: since when each replica that is lost is so."""
        for index, replica in enumerate(self._view.replicas):
            if not replica.serving and index not in lost:
                lost[index] = time.monotonic()
                self._board.say(self._view.lost(index), "yellow")
            elif replica.serving and index in lost and await http_ready(replica.launch.pods[0]):
                self._board.say(self._view.found(index, time.monotonic() - lost.pop(index)), "green")

    async def _routed(self) -> int | None:
        """Replicas that the router sends requests to; None while it does not answer."""
        return await ready_replicas(LOOPBACK, self._started.http_port, self._started.launches[0].served_names[0])
