"""Where weights and activations live."""

from __future__ import annotations

import contextlib
import mmap

import torch

_HUGE = 2 << 20


def huge_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised, on huge pages where the kernel grants them on request: a pass over the weights touches every page,
    and with 4 KiB pages the address look-ups cost a fifth of the bandwidth. Small tensors come from torch.
    """
    count = 1
    for size in shape:
        count *= size
    size = count * torch.empty((), dtype=dtype).element_size()
    if size < _HUGE:
        return torch.empty(shape, dtype=dtype)
    area = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        area.madvise(mmap.MADV_HUGEPAGE)
    everything = torch.frombuffer(area, dtype=torch.uint8)
    start = -everything.data_ptr() % _HUGE
    return everything[start : start + size].view(dtype).view(shape)


class Workspace:
    """Named buffers that grow to the largest batch seen. The same name gives the same memory."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._views: dict[tuple[str, int, int], torch.Tensor] = {}

    def take(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """float32 [rows, columns], contiguous, holding what was there before."""
        key = (name, rows, columns)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = self._make(name, rows, columns)
        return view

    def _make(self, name: str, rows: int, columns: int) -> torch.Tensor:
        count = rows * columns
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < count:
            # Slack, so that batches creeping up do not allocate each time.
            buffer = self._buffers[name] = huge_empty((max(64, count + count // 4),), torch.float32)
            for key in [key for key in self._views if key[0] == name]:
                del self._views[key]
        return buffer[:count].view(rows, columns)
