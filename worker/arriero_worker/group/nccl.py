"""The data plane of the cuda backend: torch.distributed's NCCL. One object lives for one epoch.

Calls are launched, not waited for: what is launched next on the current stream comes after them. When the epoch ends a
thread of this object aborts every communicator (ncclCommAbort), which ends their kernels on the device, wherever the
peers are; so no time-out is ever waited out. What an aborted call leaves in its tensors is undefined: who brings
results out asks `alive` first, since the epoch's end is written down before anything is aborted.

All-reduces run on the stream that computes, and so become part of its graphs. Hidden states and results, between two
ranks each, run on streams of their own.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from arriero_plan.launch import Launch
from arriero_worker.group.comm import GroupAborted, meet
from arriero_worker.group.memory import PodMemory

# torch's stubs know neither NCCL's groups nor their options.
dist: Any = torch.distributed

_PENDING = timedelta(hours=24)
_GLANCE = 0.002  # seconds between looks at the epoch

ENVIRONMENT = {
    # The control plane watches over ranks; torch's own watchdog would end the process, and the weights with it.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}


def set_environment() -> None:
    """Before the first communicator: what NCCL's owner in torch reads from the environment."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


class NcclData:
    """Communicator and results of one rank in one epoch."""

    def __init__(
        self, launch: Launch, rank: int, epoch: int, store: Any, memory: PodMemory, device: torch.device
    ) -> None:
        """Blocks until every rank of the group is here and connected. Raises GroupAborted when the epoch ends first."""
        layout = launch.layout
        self._epoch, self._memory, self._device = epoch, memory, device
        self._tensor = layout.tensor
        stage, tp_rank = divmod(rank, layout.tensor)
        last = layout.pipeline - 1
        self._groups: list[Any] = []
        self._closed = threading.Event()
        prefix = f"epoch/{epoch}"
        meet(dist.PrefixStore(prefix, store), layout.world, self._check)
        threading.Thread(target=self._watch, name=f"nccl-{epoch}", daemon=True).start()

        def group(name: str, rank: int, size: int) -> Any:
            return self._connect(dist.PrefixStore(f"{prefix}/{name}", store), rank, size)

        with self._translated():
            self._stage = group(f"stage/{stage}", tp_rank, layout.tensor) if layout.tensor > 1 else None
            # In the order of the stages, so that no two wait for each other.
            self._previous = group(f"hidden/{rank}", 1, 2) if stage else None
            self._next = group(f"hidden/{rank + layout.tensor}", 0, 2) if stage < last else None
            ends = stage in (0, last) and last > 0
            self._results = group(f"results/{tp_rank}", 0 if stage else 1, 2) if ends else None
        self._send_stream, self._recv_stream, self._result_stream = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for _ in range(3)
        )
        self._arrivals = deque(
            (torch.empty(0, device=device), torch.cuda.Event())  # type: ignore[no-untyped-call]
            for _ in range(2)
        )

    @property
    def alive(self) -> bool:
        return self._memory.aborted_epoch < self._epoch

    def close(self) -> None:
        """The epoch is over."""
        self._closed.set()

    # Communicator

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self._stage is not None:
            options = dist.AllreduceOptions()
            options.asyncOp = False  # on the current stream
            with self._translated():
                self._stage.allreduce([x], options)
        return x

    def all_gather(self, x_RV: torch.Tensor) -> torch.Tensor:
        if self._stage is None:
            return x_RV
        rows, width = x_RV.shape
        parts = torch.empty(self._tensor, rows, width, dtype=x_RV.dtype, device=x_RV.device)
        with self._translated():
            self._stage._allgather_base(parts, x_RV.contiguous()).wait()
        return parts.transpose(0, 1).reshape(rows, self._tensor * width)

    def send(self, x: torch.Tensor) -> None:
        """x may be overwritten by what is launched next: a copy is sent, beside it."""
        assert self._next is not None
        self._post(self._next, x.clone(), self._send_stream)

    def recv(self, x: torch.Tensor) -> torch.Tensor:
        """Received beside what still runs, into memory that nothing else uses; what is launched next waits for it."""
        assert self._previous is not None
        current = torch.cuda.current_stream(self._device)
        buffer, free = self._arrivals.popleft()
        with torch.cuda.stream(self._recv_stream), self._translated():
            self._recv_stream.wait_event(free)
            if buffer.numel() < x.numel():
                buffer = torch.empty(x.numel(), dtype=x.dtype, device=self._device)
            part = buffer[: x.numel()].view(x.shape)
            self._previous.recv([part], 0, 0).wait()
        current.wait_stream(self._recv_stream)
        x.copy_(part)
        free.record(current)
        self._arrivals.append((buffer, free))
        return x

    # Results, from the last stage to the same tensor rank of the first

    def send_results(self, tensors: Sequence[torch.Tensor]) -> None:
        assert self._results is not None
        for tensor in tensors:
            if tensor.numel():
                self._post(self._results, tensor, self._result_stream)

    def expect_results(self, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        assert self._results is not None
        here = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # The tensors' memory may be another's in what still runs.
        self._result_stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._result_stream), self._translated():
            for tensor in tensors:
                if tensor.numel():
                    self._results.recv([tensor], 1, 0).wait()
                    tensor.record_stream(self._result_stream)
            here.record(self._result_stream)
        return lambda: torch.cuda.current_stream(self._device).wait_event(here)

    def _post(self, group: Any, x: torch.Tensor, stream: torch.cuda.Stream) -> None:
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream), self._translated():
            group.send([x], 1 - group.rank(), 0).wait()
        x.record_stream(stream)

    # Groups

    def _connect(self, store: Any, rank: int, size: int) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _PENDING
        group = dist.ProcessGroupNCCL(store, rank, size, options)
        self._groups.append(group)
        self._check()
        group.eager_connect_single_device(self._device)
        return group

    def _watch(self) -> None:
        while self.alive and not self._closed.is_set():
            self._closed.wait(_GLANCE)
        for group in list(self._groups):
            group.abort()

    def _check(self) -> None:
        if not self.alive:
            raise GroupAborted(f"epoch {self._epoch} ended")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """What NCCL raises, because a peer is gone or the communicator was aborted, as the end of the epoch."""
        try:
            yield
        except RuntimeError as error:
            raise GroupAborted(f"epoch {self._epoch}: communication failed ({str(error).splitlines()[0]})") from error
        self._check()
