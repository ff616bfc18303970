"""Linear layers in every number format: what each keeps, what it reads, and the product.

Legend: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from arriero_kernels.fp8_matmul import fp8_matmul
from arriero_kernels.int4 import Int4Weight, pack_int4
from arriero_kernels.int4_matmul import int4_matmul
from arriero_kernels.int8_matmul import int8_matmul
from arriero_kernels.quantization import Scaling
from arriero_kernels.tuning import Tuning
from arriero_worker.model.quantized import BLOCK, QuantizedWeight


class Form(NamedTuple):
    """How a linear's input is quantised."""

    dtype: torch.dtype
    scaling: Scaling
    group: int = BLOCK


class Quantized(NamedTuple):
    """A linear's input, quantised in its form."""

    codes_TK: torch.Tensor
    scales: torch.Tensor


Input = torch.Tensor | Quantized


class Linear(Protocol):
    """A weight, packed. `form`: how its input comes; None: as it is."""

    @property
    def form(self) -> Form | None: ...

    @property
    def n(self) -> int: ...

    @property
    def bytes(self) -> int:
        """What one pass reads."""
        ...

    def product(self, x_TK: Input, out_TN: torch.Tensor, tuning: Tuning) -> None:
        """Write x @ weight.T + bias, in `out_TN`'s dtype."""
        ...


@dataclass(frozen=True, slots=True)
class Dense:
    """In the backend's own dtype: cuBLAS multiplies."""

    weight_NK: torch.Tensor
    bias_N: torch.Tensor | None

    form = None

    @property
    def n(self) -> int:
        return self.weight_NK.shape[0]

    @property
    def bytes(self) -> int:
        return self.weight_NK.numel() * self.weight_NK.element_size()

    def product(self, x_TK: Input, out_TN: torch.Tensor, tuning: Tuning) -> None:
        assert isinstance(x_TK, torch.Tensor)
        weight_KN = self.weight_NK.t()
        if out_TN.dtype != x_TK.dtype:
            self._widened(x_TK, weight_KN, out_TN)
        elif self.bias_N is None:
            torch.mm(x_TK, weight_KN, out=out_TN)
        else:
            torch.addmm(self.bias_N, x_TK, weight_KN, out=out_TN)

    @staticmethod
    def _widened(x_TK: torch.Tensor, weight_KN: torch.Tensor, out_TN: torch.Tensor) -> None:
        """Without rounding the sums: only the head's, which has no bias."""
        if x_TK.is_cuda:
            torch.mm(x_TK, weight_KN, out_TN.dtype, out=out_TN)
        else:
            torch.mm(x_TK.to(out_TN.dtype), weight_KN.to(out_TN.dtype), out=out_TN)


@dataclass(frozen=True, slots=True)
class Scaled:
    """float8_e4m3fn or int8 weights, and inputs of the same dtype: scales for each row and token, or (float8) for
    blocks and for BLOCK inputs of a token.
    """

    weight_NK: torch.Tensor
    scales: torch.Tensor
    bias_N: torch.Tensor | None
    form: Form

    @classmethod
    def pack(cls, weight: QuantizedWeight, bias_N: torch.Tensor | None) -> Scaled:
        form = Form(weight.codes_NK.dtype, Scaling.GROUP if weight.blocks else Scaling.TOKEN)
        return cls(weight.codes_NK.contiguous(), weight.scales.contiguous(), bias_N, form)

    @property
    def n(self) -> int:
        return self.weight_NK.shape[0]

    @property
    def bytes(self) -> int:
        return self.weight_NK.numel() + 4 * self.scales.numel()

    def product(self, x_TK: Input, out_TN: torch.Tensor, tuning: Tuning) -> None:
        assert isinstance(x_TK, Quantized)
        matmul = int8_matmul if self.weight_NK.dtype == torch.int8 else fp8_matmul
        matmul(
            x_TK.codes_TK,
            self.weight_NK,
            x_TK.scales,
            self.scales,
            bias_N=self.bias_N,
            dtype=out_TN.dtype,
            out_TN=out_TN,
            tuning=tuning,
        )


@dataclass(frozen=True, slots=True)
class Int4:
    """4-bit weights with a scale and a zero point for each group of a row's inputs; inputs stay bfloat16."""

    weight: Int4Weight
    bias_N: torch.Tensor | None

    form = None

    @classmethod
    def pack(cls, weight: QuantizedWeight, bias_N: torch.Tensor | None) -> Int4:
        scales_GN = _narrowed(weight.scales.t().contiguous())
        zeros_GN = None if weight.zeros_NG is None else weight.zeros_NG.t().contiguous()
        return cls(pack_int4(weight.codes_NK, scales_GN, zeros_GN), bias_N)

    @property
    def n(self) -> int:
        return self.weight.codes.shape[0]

    @property
    def bytes(self) -> int:
        return self.weight.bytes

    def product(self, x_TK: Input, out_TN: torch.Tensor, tuning: Tuning) -> None:
        assert isinstance(x_TK, torch.Tensor)
        int4_matmul(x_TK, self.weight, bias_N=self.bias_N, out_TN=out_TN, tuning=tuning)


def _narrowed(scales: torch.Tensor) -> torch.Tensor:
    """As two bytes, where that loses nothing."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(scales.to(dtype).float(), scales):
            return scales.to(dtype)
    return scales


def pack_quantized(weight: QuantizedWeight, bias_N: torch.Tensor | None) -> Linear:
    """For the kernels. Raises ValueError for what none of them reads."""
    if weight.kind == "int4":
        return Int4.pack(weight, bias_N)
    if weight.group is not None:
        raise ValueError(f"no kernel multiplies {weight.kind} weights in groups of {weight.group}")
    return Scaled.pack(weight, bias_N)
