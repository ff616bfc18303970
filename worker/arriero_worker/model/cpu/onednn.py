"""Linears on a CPU's matrix units (AMX, AVX512-BF16) through oneDNN, with weights in the order oneDNN likes best.

Our own tiles compute in float32: where the machine multiplies bfloat16 itself, oneDNN does several times their work per
second, and prefill and large batches gain. The operations are the ones torch.compile's CPU backend emits.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import torch

log = logging.getLogger("arriero.cpu")

_TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class OneDnnLinear:
    """A weight as oneDNN keeps it. bfloat16 in and out, accumulated in float32."""

    weight: torch.Tensor
    bias_N: torch.Tensor | None
    n: int
    k: int

    @classmethod
    def pack(cls, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> OneDnnLinear:
        n, k = weight_NK.shape
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous())
        return cls(packed, None if bias_N is None else bias_N.clone(), n, k)

    def __call__(self, x_TK: torch.Tensor, out_TN: torch.Tensor) -> None:
        """x and out: float32."""
        x = x_TK.to(torch.bfloat16)
        out_TN.copy_(torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias_N, "none", [], ""))


@cache
def usable() -> bool:
    """Whether this machine has matrix units and oneDNN uses them rightly, tried on a small product."""
    if not (torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((96, 64), generator=generator).to(torch.bfloat16)
    bias = torch.randn(96, generator=generator).to(torch.bfloat16)
    x, out = torch.randn((5, 64), generator=generator), torch.empty(5, 96)
    try:
        OneDnnLinear.pack(weight, bias)(x, out)
    except RuntimeError as error:
        log.warning("oneDNN's packed linears are not usable, going on without them: %s", error)
        return False
    expected = x.to(torch.bfloat16).double() @ weight.double().T + bias.double()
    deviation = float((out.double() - expected).abs().max() / expected.abs().max())
    if deviation > _TOLERANCE:
        log.warning("oneDNN's packed linears err by %.3f, going on without them", deviation)
        return False
    return True
