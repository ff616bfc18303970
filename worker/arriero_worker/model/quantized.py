"""Quantised weights as the loader and the backends pass them on: plain codes and scales, whatever a checkpoint or a
kernel packs them into.

Legend: N outputs, K inputs, G groups of a row's inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

Kind = Literal["fp8", "int8", "int4"]

FLOAT8_MAX = 448.0
BLOCK = 128
"""Rows and columns that share a scale in block-scaled float8."""
INT4_GROUP = 128
"""Inputs that share a scale where weights are quantised to int4 while they are loaded."""

_SMALLEST = 1e-12


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """(codes - zeros) * scales is the weight. What shares a scale: a row, `group` inputs of a row, or a block of
    BLOCK x BLOCK (fp8 alone).
    """

    kind: Kind
    codes_NK: torch.Tensor
    """float8_e4m3fn, int8, or for int4 uint8 of 0 to 15."""
    scales: torch.Tensor
    """float32 [N], [N, G], or [ceil(N / BLOCK), ceil(K / BLOCK)]."""
    zeros_NG: torch.Tensor | None = None
    """uint8 of 0 to 15, for int4."""
    group: int | None = None
    """Inputs that share a scale, where `scales` is [N, G]."""
    blocks: bool = False

    def copied(self, device: torch.device) -> QuantizedWeight:
        """In memory of its own on a device."""
        zeros = None if self.zeros_NG is None else self.zeros_NG.to(device, copy=True)
        codes = self.codes_NK.to(device, copy=True)
        return replace(self, codes_NK=codes, scales=self.scales.to(device, copy=True), zeros_NG=zeros)

    def dequantized(self) -> torch.Tensor:
        """float32 [N, K]."""
        n, k = self.codes_NK.shape
        if self.blocks:
            scales = self.scales.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
            return self.codes_NK.float() * scales
        if self.group is None:
            return self.codes_NK.float() * self.scales[:, None]
        codes_NGI = self.codes_NK.float().view(n, -1, self.group)
        if self.zeros_NG is not None:
            codes_NGI = codes_NGI - self.zeros_NG.float()[:, :, None]
        return (codes_NGI * self.scales[:, :, None]).view(n, k)

    @staticmethod
    def stacked(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """One under the other; all are of one kind and group. Raises ValueError where blocks would not line up."""
        first = parts[0]
        if len(parts) == 1:
            return first
        if first.blocks and any(len(part.codes_NK) % BLOCK for part in parts[:-1]):
            raise ValueError(f"block-scaled weights of {[len(p.codes_NK) for p in parts]} rows do not line up")
        zeros = [part.zeros_NG for part in parts if part.zeros_NG is not None]
        # A byte view, because concatenation does not know float8 on every device.
        codes = torch.cat([part.codes_NK.view(torch.uint8) for part in parts]).view(first.codes_NK.dtype)
        return QuantizedWeight(
            first.kind,
            codes,
            torch.cat([part.scales for part in parts]),
            torch.cat(zeros) if zeros else None,
            first.group,
            first.blocks,
        )


def quantize_weight(weight_NK: torch.Tensor, kind: Kind) -> QuantizedWeight:
    """Round a weight, on its own device: fp8 and int8 with a scale for each row, int4 with a scale and a zero point for
    each INT4_GROUP inputs (or each row, where the group does not divide it).
    """
    weight = weight_NK.float()
    if kind == "int4":
        return _int4(weight)
    largest = weight.abs().amax(1).clamp_min(_SMALLEST)
    if kind == "fp8":
        scales = largest / FLOAT8_MAX
        codes = (weight / scales[:, None]).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
    else:
        scales = largest / 127.0
        codes = (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
    return QuantizedWeight(kind, codes, scales)


def _int4(weight: torch.Tensor) -> QuantizedWeight:
    n, k = weight.shape
    group = INT4_GROUP if k % INT4_GROUP == 0 else k
    groups = weight.view(n, k // group, group)
    low, high = groups.amin(2).clamp_max(0.0), groups.amax(2).clamp_min(0.0)
    # As kernels keep them: the codes are found with the scale that will multiply them.
    scales = ((high - low) / 15.0).clamp_min(1e-7).to(torch.float16).float()
    zeros = (-low / scales).round().clamp(0, 15)
    codes = ((groups / scales[:, :, None]).round() + zeros[:, :, None]).clamp(0, 15).to(torch.uint8)
    return QuantizedWeight("int4", codes.view(n, k), scales, zeros.to(torch.uint8), group)
