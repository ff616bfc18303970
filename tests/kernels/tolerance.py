"""When a kernel's result is right.

FlashAttention-3's rule: its error against a float32 reference is at most twice that of PyTorch's own operation in the
precision that the kernel computes for. What is exact has no tolerance.
"""

from __future__ import annotations

import torch


def assert_as_good(found: torch.Tensor, exact: torch.Tensor, torchs: torch.Tensor, floor: float = 2e-6) -> None:
    """`exact` in float32 or float64, `torchs` the same computed by PyTorch in the kernel's precision."""
    assert found.shape == exact.shape == torchs.shape
    if found.numel() == 0:
        return
    exact = exact.double()
    error = (found.double() - exact).abs().max().item()
    allowed = 2 * (torchs.double() - exact).abs().max().item() + floor * exact.abs().max().item()
    assert error <= allowed, f"largest error {error:.3g}, allowed are {allowed:.3g}"
