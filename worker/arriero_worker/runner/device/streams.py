"""What is done beside the stream that computes: copies to and from the host. On a CPU, at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

Arrived = Callable[[], None]
"""Makes what is launched next on the current stream (on a CPU: the caller) wait for tensors that another rank sends.
May be called more than once, from any thread.
"""


class Download(Protocol):
    """Copies on their way to the host."""

    def wait(self) -> list[torch.Tensor]:
        """The copies, once they are there. From any thread."""
        ...


class Streams(Protocol):
    """Called from the thread that launches, whose current stream is the one that computes."""

    def host(self, size: int) -> torch.Tensor:
        """int32 [size] in host memory, to be filled and uploaded once."""
        ...

    def upload(self, host: torch.Tensor, target: torch.Tensor) -> None:
        """Copy before whatever is launched next."""
        ...

    def download(self, tensors: Sequence[torch.Tensor], arrived: Arrived | None = None) -> Download:
        """Copy after whatever has been launched, and after `arrived`; what is launched next does not wait. Nobody else
        may write to the tensors any more.
        """
        ...


def sent(streams: Streams, device: torch.device, numbers: np.ndarray) -> torch.Tensor:
    """The numbers as int32 on the device; those of other sizes are to be viewed as int32 first."""
    host = streams.host(len(numbers))
    host.numpy()[:] = numbers
    found = torch.empty(len(numbers), dtype=torch.int32, device=device)
    streams.upload(host, found)
    return found


class _There:
    def __init__(self, tensors: list[torch.Tensor], arrived: Arrived | None) -> None:
        self._tensors, self._arrived = tensors, arrived

    def wait(self) -> list[torch.Tensor]:
        if self._arrived is not None:
            self._arrived()
        return self._tensors


class Inline:
    """On the CPU: every launch has ended when it returns."""

    def host(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32)

    def upload(self, host: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(host)

    def download(self, tensors: Sequence[torch.Tensor], arrived: Arrived | None = None) -> Download:
        return _There(list(tensors), arrived)


class _Copying:
    def __init__(self, tensors: list[torch.Tensor], done: torch.cuda.Event) -> None:
        self._tensors, self._done = tensors, done

    def wait(self) -> list[torch.Tensor]:
        self._done.synchronize()
        return self._tensors


class Cuda:
    """Host memory is pinned. PyTorch's allocator of it keeps a piece from being used again while a copy may still read
    or write it, so none is shared out here.
    """

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def host(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, pin_memory=True)

    def upload(self, host: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(host, non_blocking=True)

    def download(self, tensors: Sequence[torch.Tensor], arrived: Arrived | None = None) -> Download:
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        copies = []
        with torch.cuda.stream(self._side):
            if arrived is not None:
                arrived()
            for tensor in tensors:
                copies.append(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True))
                copies[-1].copy_(tensor, non_blocking=True)
                tensor.record_stream(self._side)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._side)
        return _Copying(copies, done)


def streams_of(device: torch.device) -> Streams:
    make: Callable[[], Streams] = Inline if device.type == "cpu" else lambda: Cuda(device)
    return make()
