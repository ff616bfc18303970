"""One rank's process: load the weights once, then be part of one epoch after another.

Each epoch runs in a thread of its own. When the epoch ends under it, waits in shared memory return at once and
broken connections raise; a thread that still hangs in a silent connection is left behind, holding nothing but its
place in that epoch, while the weights serve the next one.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed

from arriero.inference.v1 import worker_pb2 as pb
from arriero_faces.process import EXIT_UNUSABLE, die_with_parent, set_process_name, set_up_logging
from arriero_plan.launch import Launch, parse_launch
from arriero_plan.model import ModelError
from arriero_worker.engine.engine import Engine
from arriero_worker.engine.limits import SchedulerSettings
from arriero_worker.engine.messages import EngineStatus, Model
from arriero_worker.engine.scheduler import Scheduler
from arriero_worker.engine.server import EngineServer
from arriero_worker.group.comm import GroupAborted
from arriero_worker.group.member import Member, Truth
from arriero_worker.group.memory import PodMemory
from arriero_worker.model.backend import DeviceError
from arriero_worker.model.loader import CheckpointError
from arriero_worker.model.shard import ShardError
from arriero_worker.rank_entry import engine_socket
from arriero_worker.session import Session
from arriero_worker.stage import LoadedStage, load_stage

log = logging.getLogger("arriero.rank")

dist: Any = torch.distributed

_LINGER = 2.0  # seconds an ended epoch's thread has to come back
_STORE_LIMIT = timedelta(seconds=60)


def main(launch_path: str, rank: int, memory_path: str, parent: int | None = None) -> int:
    """Run until released or told to stop. `parent`: the process id of who forked this one.

    Returns EXIT_UNUSABLE where the checkpoint cannot be run.
    """
    die_with_parent(parent)
    set_process_name(f"arriero-rank{rank}")
    set_up_logging(os.environ.get("ARRIERO_LOG_LEVEL", "info"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    launch = parse_launch(Path(launch_path).read_text(), launch_path)
    torch.set_num_threads(launch.engine.threads)
    return Rank(launch, rank, memory_path).run()


class _Ended:
    """The epoch's thread came to its end."""

    def __init__(self, epoch: int, reason: str) -> None:
        self.epoch, self.reason = epoch, reason


class Rank:
    def __init__(self, launch: Launch, rank: int, memory_path: str) -> None:
        self._launch, self._rank = launch, rank
        self._pod = launch.pod_of(rank)
        self._memory = PodMemory(memory_path, len(launch.pods[self._pod].ranks))
        self._truth = Truth(launch, rank, self._memory)
        self._commands: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._member = Member(launch, rank, self._memory, self._truth, self._commands.put)
        self._engine: Engine | None = None
        self._store: Any = None
        self._released = False
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        # The leader's pod drains through its faces before it stops its ranks, and who was never in an epoch is not
        # missed.
        if self._pod == 0 or self._truth.phase in ("Starting", "Loading", "Warming"):
            os._exit(0)
        threading.Thread(target=self._member.leave, args=(self._launch.drain_seconds,), name="leave").start()

    def run(self) -> int:
        try:
            stage = self._load()
        except (CheckpointError, ModelError, ShardError, DeviceError) as error:
            log.error("rank %d cannot run: %s", self._rank, error)
            self._truth.enter("Failed", str(error))
            time.sleep(0.3)  # for the status to reach who watches
            return EXIT_UNUSABLE
        if self._rank == 0:
            self._open_store()
            self._start_engine(stage)
        while not self._released:
            self._truth.enter("Joining")
            self._member.ready(stage.digest)
            form = self._await_form()
            if form is not None:
                self._serve(form, stage)
        self._member.stop()
        return 0

    def _load(self) -> LoadedStage:
        self._truth.enter("Loading")

        def progress(done: int, total: int) -> None:
            self._truth.bytes_loaded, self._truth.bytes_total = done, total
            self._truth.now()

        stage = load_stage(self._launch, self._rank, progress)
        self._truth.memory_bytes = stage.memory_bytes
        self._truth.enter("Warming")
        stage.warm()
        return stage

    def _open_store(self) -> None:
        if self._launch.layout.world > 1:
            address = self._launch.pods[0]
            listener = socket.create_server((self._launch.bind_address, address.store_port))
            self._store = dist.TCPStore(
                address.host,
                address.store_port,
                None,
                True,
                _STORE_LIMIT,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )

    def _start_engine(self, stage: LoadedStage) -> None:
        settings = self._launch.engine
        scheduler = Scheduler(
            SchedulerSettings(
                block_size=settings.block_size,
                kv_blocks=stage.kv_blocks,
                max_context=settings.max_context,
                max_running=settings.max_running,
                max_waiting=settings.max_waiting,
                max_batch_tokens=settings.max_batch_tokens,
                max_chunk_tokens=settings.max_chunk_tokens,
                pipeline=self._launch.layout.pipeline,
                prefix_cache=settings.prefix_cache,
                vocab_size=stage.shape.vocab_size,
            ),
            time.monotonic,
        )

        def publish(status: EngineStatus) -> None:
            self._memory.write_engine(
                running=status.running,
                waiting=status.waiting,
                kv_blocks=status.kv_blocks,
                kv_blocks_used=status.kv_blocks_used,
                recoveries=status.recoveries,
                draining=scheduler.draining,
                run=status.run,
                tokens_per_second=status.tokens_per_second,
            )

        engine = Engine(scheduler, Model(settings.max_context, stage.shape.vocab_size), publish)
        server = EngineServer(engine_socket(self._launch), engine.receive, engine.faces_came, engine.faces_gone)
        engine.start(server.send)
        self._member.follow(lambda ranks: setattr(engine, "ranks", ranks))
        self._engine = engine

    def _await_form(self) -> pb.Form | None:
        while True:
            command = self._commands.get()
            if isinstance(command, pb.Form):
                return command
            if self._obey(command):
                return None

    def _obey(self, command: object) -> bool:
        """Commands that concern no epoch. True for a release."""
        if isinstance(command, pb.SetDraining) and self._engine is not None:
            self._engine.set_draining(command.draining)
        if isinstance(command, pb.Release):
            self._released = True
        return self._released

    def _serve(self, form: pb.Form, stage: LoadedStage) -> None:
        """Be part of an epoch until it ends, by the leader's word, by a failure here, or by this rank's release."""
        self._truth.epoch = form.epoch
        thread = threading.Thread(target=self._run_epoch, args=(form, stage), name=f"epoch-{form.epoch}", daemon=True)
        thread.start()
        while True:
            command = self._commands.get()
            if isinstance(command, _Ended) and command.epoch == form.epoch:
                self._member.broken(form.epoch, command.reason)
                break
            if isinstance(command, pb.AbortEpoch) and command.epoch >= form.epoch:
                log.info("rank %d leaves epoch %d: %s", self._rank, form.epoch, command.reason)
                break
            if self._obey(command):
                break
        self._memory.abort_epoch(form.epoch)
        if self._engine is not None:
            self._engine.detach()
        thread.join(_LINGER)
        if thread.is_alive():
            log.warning(
                "rank %d: epoch %d still hangs in a silent connection; going on without its thread",
                self._rank,
                form.epoch,
            )

    def _run_epoch(self, form: pb.Form, stage: LoadedStage) -> None:
        epoch = form.epoch
        reason = "the session ended"
        try:
            store = self._store or self._dial_store(form.store)
            session = Session(self._launch, self._rank, epoch, store, self._memory, self._truth, stage, self._engine)
            self._member.formed(epoch)
            self._truth.enter("Serving")
            log.info("rank %d serves epoch %d", self._rank, epoch)
            try:
                session.run()
            finally:
                session.close()
                if session.failure is not None:
                    raise session.failure
        except GroupAborted as error:
            reason = str(error)
        except Exception as error:
            if self._memory.aborted_epoch < epoch:
                log.exception("rank %d: a step of epoch %d failed", self._rank, epoch)
            reason = f"{type(error).__name__}: {error}"
            if not stage.usable():
                log.critical("rank %d: its device can compute no more; starting again", self._rank)
                os._exit(1)
        self._commands.put(_Ended(epoch, reason))

    def _dial_store(self, address: str) -> Any:
        if self._launch.layout.world == 1:
            return None
        host, _, port = address.rpartition(":")
        return dist.TCPStore(host, int(port), None, False, _STORE_LIMIT, wait_for_workers=False)
