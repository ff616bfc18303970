"""The data plane's seam: the collective calls a rank makes during a step, whatever carries them.

Legend: T tokens of the micro-batch, H hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class GroupAborted(Exception):
    """The epoch ended under a running step (a rank was lost or the leader said so). Weights stay; the rank joins
    again.
    """


def meet(store: Any, world: int, check: Callable[[], None]) -> None:
    """Return when all ranks are here. `store` is the epoch's own; `check` raises GroupAborted once that is over."""
    here = store.add("here", 1)
    while here < world:
        check()
        time.sleep(0.002)
        here = store.add("here", 0)


class Communicator(Protocol):
    """Every call may raise `GroupAborted`. Ranks of a group make the same calls in the same order."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the tensor ranks of this stage, in place where possible. x: contiguous, any shape, float32 or
        bfloat16.

        Every rank gets the same bits. On CPUs the sum runs in rank order, in float32; on GPUs in NCCL's order.
        """
        ...

    def all_gather(self, x_RV: torch.Tensor) -> torch.Tensor:
        """Concatenate over the tensor ranks along the last axis: [R, V] -> [R, tensor * V]."""
        ...

    def send(self, x: torch.Tensor) -> None:
        """To the same tensor rank of the next stage; returns once x may be overwritten (on a GPU: by a launch)."""
        ...

    def recv(self, x: torch.Tensor) -> torch.Tensor:
        """From the same tensor rank of the previous stage, into x."""
        ...


class Solo:
    """A rank that is its whole group: nothing to exchange."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x_RV: torch.Tensor) -> torch.Tensor:
        return x_RV

    def send(self, x: torch.Tensor) -> None:
        raise AssertionError("a group of one rank has no next stage")

    def recv(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a group of one rank has no previous stage")
