"""The data plane of the cpu backend: shared memory inside a pod, torch.distributed (gloo) between pods. One object
lives for one epoch.

A pending gloo call ends when the peer's socket does, and a lost rank's peers drop their groups in turn, so the end
of an epoch runs through the whole group in milliseconds. Where a peer is silent instead of dead the call stays
pending: the caller's thread is then left behind with its epoch (see `rank.py`).
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from arriero_plan.launch import Launch
from arriero_worker.group.comm import GroupAborted, meet
from arriero_worker.group.memory import PodMemory
from arriero_worker.group.reduce import PodReduce

# torch's stubs know neither the Gloo group's calls nor its options.
dist: Any = torch.distributed

_PENDING = timedelta(minutes=30)  # gloo's own limit: the control plane ends an epoch long before
_FORMING = timedelta(seconds=20)
_HIDDEN, _RESULT = 1, 2  # tags
_IN_FLIGHT = 8  # sends not yet taken by the next stage


def local_address(towards: str, port: int) -> str:
    """This host's address on the interface that leads to another host. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, port or 1))
        return str(probe.getsockname()[0])


class GroupData:
    """Communicator and result transport of one rank in one epoch."""

    def __init__(self, launch: Launch, rank: int, epoch: int, store: Any, memory: PodMemory) -> None:
        """Blocks until every rank of the group is here. Raises GroupAborted when the epoch ends before that."""
        layout = launch.layout
        self._epoch, self._memory = epoch, memory
        self._tensor, self._rank, self._world = layout.tensor, rank, layout.world
        stage, tp_rank = divmod(rank, layout.tensor)
        self._next, self._previous = rank + layout.tensor, rank - layout.tensor
        self._first_stage, self._last_stage = tp_rank, (layout.pipeline - 1) * layout.tensor + tp_rank
        self._sends: deque[tuple[Any, torch.Tensor]] = deque()
        prefix = f"epoch/{epoch}"
        meet(dist.PrefixStore(prefix, store), layout.world, self._check)
        host = local_address(launch.pods[0].host, launch.pods[0].store_port)
        pods = {launch.pod_of(stage * layout.tensor + i) for i in range(layout.tensor)}
        self._pod_reduce: PodReduce | None = None
        self._stage_group: Any = None
        if layout.tensor > 1 and len(pods) == 1:
            first = launch.pods[launch.pod_of(rank)].ranks.index(stage * layout.tensor)
            self._pod_reduce = PodReduce(memory, tp_rank, first, layout.tensor, epoch)
        elif layout.tensor > 1:
            self._stage_group = self._gloo(
                dist.PrefixStore(f"{prefix}/stage/{stage}", store), tp_rank, layout.tensor, host
            )
        # Hidden states and results are sent from different threads, so they have groups of their own.
        self._hidden = self._results = None
        if layout.pipeline > 1:
            self._hidden = self._gloo(dist.PrefixStore(f"{prefix}/hidden", store), rank, layout.world, host)
            self._results = self._gloo(dist.PrefixStore(f"{prefix}/results", store), rank, layout.world, host)

    def _check(self) -> None:
        if self._memory.aborted_epoch >= self._epoch:
            raise GroupAborted(f"epoch {self._epoch} ended")

    @staticmethod
    def _gloo(store: Any, rank: int, size: int, host: str) -> Any:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = _FORMING
        options._threads = 1
        group = dist.ProcessGroupGloo(store, rank, size, options)
        group._set_default_timeout(_PENDING)
        return group

    def _wait(self, work: Any) -> None:
        try:
            work.wait(_PENDING)
        except RuntimeError as error:
            raise GroupAborted(
                f"epoch {self._epoch}: a peer's connection broke ({str(error).splitlines()[0]})"
            ) from error
        self._check()

    def close(self) -> None:
        """Nothing to do: connections end with this object."""

    # Communicator

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self._pod_reduce is not None:
            return self._pod_reduce.all_reduce(x)
        if self._stage_group is not None:
            parts = self._gather(x)
            total = parts[0].to(torch.float32)
            for part in parts[1:]:
                total = total + part
            x.copy_(total)
        return x

    def all_gather(self, x_RV: torch.Tensor) -> torch.Tensor:
        if self._pod_reduce is not None:
            return self._pod_reduce.all_gather(x_RV)
        return x_RV if self._stage_group is None else torch.cat(self._gather(x_RV.contiguous()), dim=-1)

    def _gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        assert self._stage_group is not None
        # Bytes, because gloo does not know every dtype.
        parts = [torch.empty_like(x) for _ in range(self._tensor)]
        work = self._stage_group.allgather(
            [[part.view(-1).view(torch.uint8) for part in parts]], [x.view(-1).view(torch.uint8)]
        )
        self._wait(work)
        return parts

    def send(self, x: torch.Tensor) -> None:
        assert self._hidden is not None
        self._post(self._hidden, x, self._next, _HIDDEN)

    def recv(self, x: torch.Tensor) -> torch.Tensor:
        assert self._hidden is not None
        self._wait(self._hidden.recv([x.view(-1).view(torch.uint8)], self._previous, _HIDDEN))
        return x

    # Results, from the last stage to the same tensor rank of the first

    def send_results(self, tensors: Sequence[torch.Tensor]) -> None:
        assert self._results is not None
        for tensor in tensors:
            self._post(self._results, tensor, self._first_stage, _RESULT)

    def recv_results(self, tensors: Sequence[torch.Tensor]) -> None:
        assert self._results is not None
        for tensor in (tensor for tensor in tensors if tensor.numel()):
            self._wait(self._results.recv([tensor.view(-1).view(torch.uint8)], self._last_stage, _RESULT))

    def _post(self, group: Any, x: torch.Tensor, to: int, tag: int) -> None:
        """Send a copy without waiting for the receiver: the next stage may still be busy with the step before."""
        if x.numel() == 0:
            return
        copy = x.detach().clone().contiguous().view(-1).view(torch.uint8)
        try:
            self._sends.append((group.send([copy], to, tag), copy))
        except RuntimeError as error:
            raise GroupAborted(
                f"epoch {self._epoch}: a peer's connection broke ({str(error).splitlines()[0]})"
            ) from error
        while len(self._sends) > _IN_FLIGHT:
            work, _ = self._sends.popleft()
            self._wait(work)
