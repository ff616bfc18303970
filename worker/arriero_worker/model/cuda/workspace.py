"""Memory for what a step computes: one buffer for each name, as large as the largest result yet."""

from __future__ import annotations

import torch


class Workspace:
    """A buffer's memory stays where it is once it is large enough, which CUDA graphs rely on: make it so before any is
    captured, by running the largest step, and `seal` it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._sealed = False

    @property
    def bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())

    def seal(self) -> None:
        """From now on nothing grows: a larger result has memory of its own, until it is dropped."""
        self._sealed = True

    def take(self, name: str, *sizes: int, dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of these sizes with undefined content; it shares its memory with all of this name."""
        count = 1
        for size in sizes:
            count *= size
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < count:
            buffer = torch.empty(count, dtype=dtype, device=self._device)
            if not self._sealed:
                self._buffers[name, dtype] = buffer
        return buffer[:count].view(sizes)
