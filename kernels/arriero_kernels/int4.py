"""Weights of 4 bits: the layout that `int4_matmul` loads, and how checkpoints' layouts become it.

Legend: N outputs, K inputs, G groups of inputs that share a scale and a zero point.

Value = (code - zero) * scale, code 0..15. Each SPAN inputs of a row lie in WORDS words of 32 bits: the i-th quarter of
them in the i-th lowest four bits of both halves of each word, two neighbours in a word, the first in its low half. So a
shift and a mask give two values where a matrix instruction wants them, nothing has to be moved, and a quarter, which is
32 inputs, never has more than one scale. Where K is not a multiple of SPAN the last words are filled up, and count for
nothing, as there are no such inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from arriero_kernels.checks import FLOATS, expect

SPAN = 128
WORDS = SPAN // 8
ZERO = 8
"""The zero point of weights that have none of their own."""

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Of eight neighbouring outputs in a word of an AWQ checkpoint, lowest bits first."""


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A weight [N, K]."""

    codes: torch.Tensor
    """int32 [N, ceil(K / SPAN) * WORDS]."""
    scales: torch.Tensor
    """[G, N] bfloat16, float16 or float32."""
    zeros: torch.Tensor | None
    """uint8 [G, N], 0..15; None: all are ZERO."""
    group: int
    """Inputs that share a scale."""

    @property
    def bytes(self) -> int:
        """Of memory."""
        tensors = (self.codes, self.scales) if self.zeros is None else (self.codes, self.scales, self.zeros)
        return sum(x.numel() * x.element_size() for x in tensors)

    def expect(self, k: int, device: torch.device) -> None:
        """Raises ValueError unless the weight takes K inputs and lies on the device."""
        n = self.codes.shape[0]
        expect("weight.codes", self.codes, (n, -(-k // SPAN) * WORDS), (torch.int32,), device)
        expect("weight.scales", self.scales, (k // self.group, n), FLOATS, device)
        if self.zeros is not None:
            expect("weight.zeros", self.zeros, (k // self.group, n), (torch.uint8,), device)


def pack_int4(codes_NK: torch.Tensor, scales_GN: torch.Tensor, zeros_GN: torch.Tensor | None) -> Int4Weight:
    """The weight of codes that lie one in a byte, on their device.

    codes_NK: uint8 [N, K], 0..15.
    scales_GN: [G, N] bfloat16, float16 or float32; a group has K / G inputs, a multiple of 32, or all K.
    zeros_GN: uint8 [G, N], 0..15, or None: all are ZERO.

    Raises ValueError for other shapes or dtypes.
    """
    n, k = codes_NK.shape
    groups = scales_GN.shape[0]
    device = codes_NK.device
    if groups == 0 or k % groups or (groups > 1 and k // groups not in (32, 64) and k // groups % SPAN):
        raise ValueError(
            f"{groups} groups of {k} inputs: expected groups of 32, 64, a multiple of {SPAN}, or all inputs"
        )
    expect("codes_NK", codes_NK.contiguous(), (n, k), (torch.uint8,), device)
    expect("scales_GN", scales_GN.contiguous(), (groups, n), FLOATS, device)
    if zeros_GN is not None:
        expect("zeros_GN", zeros_GN.contiguous(), (groups, n), (torch.uint8,), device)
        zeros_GN = None if bool((zeros_GN == ZERO).all()) else zeros_GN.contiguous()
    spans = torch.nn.functional.pad(codes_NK, (0, -k % SPAN)).unflatten(1, (-1, 4, WORDS, 2))
    # Two quarters to a byte, two bytes to a half word, first neighbour in the first half: little endian.
    low, high = spans[:, :, 0] | spans[:, :, 1] << 4, spans[:, :, 2] | spans[:, :, 3] << 4
    words = torch.stack((low, high), -1).flatten(1).view(torch.int32)
    return Int4Weight(words, scales_GN.contiguous(), zeros_GN, k // groups)


def from_awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> Int4Weight:
    """A weight as AWQ checkpoints ("gemm" version) hold it.

    qweight: int32 [K, N / 8], eight outputs in a word.
    qzeros: int32 [G, N / 8], likewise.
    scales: float16 or bfloat16 [G, N].

    Raises ValueError for other shapes or dtypes.
    """
    k, words = _expect_words("qweight", qweight)
    groups, n = scales.shape[0], 8 * words
    expect("qzeros", qzeros.contiguous(), (groups, words), (torch.int32,), qweight.device)
    if scales.shape != (groups, n):
        raise ValueError(f"scales has shape {list(scales.shape)}, expected {[groups, n]} beside qweight {[k, words]}")
    place = torch.tensor(_AWQ_ORDER, device=qweight.device).argsort()
    codes_KN, zeros_GN = (_nibbles(x)[:, :, place].flatten(1) for x in (qweight, qzeros))
    return pack_int4(codes_KN.T.contiguous(), scales, zeros_GN)


def from_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    *,
    zeros_minus_one: bool = True,
) -> Int4Weight:
    """A weight as GPTQ checkpoints hold it.

    qweight: int32 [K / 8, N], eight inputs in a word.
    qzeros: int32 [G, N / 8], eight outputs in a word.
    scales: float16 or bfloat16 [G, N].
    g_idx: int32 [K]: each input's group, or None: in order.
    zeros_minus_one: whether zero points are stored less one, as `checkpoint_format` "gptq" has it; "gptq_v2" does not.

    Raises ValueError for other shapes or dtypes, and where inputs are not in the order of their groups.
    """
    words, n = _expect_words("qweight", qweight)
    groups, k = scales.shape[0], 8 * words
    if n % 8 or scales.shape != (groups, n):
        raise ValueError(f"scales has shape {list(scales.shape)}, expected [G, {n}], a multiple of 8, beside qweight")
    expect("qzeros", qzeros.contiguous(), (groups, n // 8), (torch.int32,), qweight.device)
    if g_idx is not None and groups:
        expected = torch.arange(k, device=g_idx.device) // (k // groups)
        if g_idx.shape != (k,) or not bool((g_idx == expected).all()):
            raise ValueError(
                "g_idx mixes the inputs of the groups (desc_act, act-order), which cannot be loaded tile by "
                "tile: take a checkpoint that was quantised with desc_act false"
            )
    codes_NK = _nibbles(qweight.T.contiguous()).flatten(1)
    zeros_GN = _nibbles(qzeros).flatten(1)
    return pack_int4(codes_NK, scales, (zeros_GN + 1) & 15 if zeros_minus_one else zeros_GN)


def quantize_int4(weight_NK: torch.Tensor, group: int = 128) -> Int4Weight:
    """The nearest 4-bit weight: its groups' scales and zero points span from their lowest to their highest values.

    weight_NK: [N, K] bfloat16, float16 or float32.
    group: inputs that share a scale: 32, 64, a multiple of 128, or -1, all of a row.

    Scales are bfloat16 of a bfloat16 weight, else float16. Raises ValueError for other groups.
    """
    k = weight_NK.shape[1]
    group = k if group == -1 else group
    if group <= 0 or k % group:
        raise ValueError(f"group is {group}, which does not divide the row's {k} inputs")
    values = weight_NK.float().unflatten(1, (-1, group))
    lowest, highest = values.amin(2).clamp(max=0), values.amax(2).clamp(min=0)
    dtype = torch.bfloat16 if weight_NK.dtype == torch.bfloat16 else torch.float16
    scales = ((highest - lowest) / 15).clamp(min=1e-6).to(dtype)
    zeros = (-lowest / scales).round().clamp(0, 15)
    codes = (values / scales[:, :, None] + zeros[:, :, None]).round().clamp(0, 15)
    return pack_int4(codes.flatten(1).to(torch.uint8), scales.T.contiguous(), zeros.T.to(torch.uint8).contiguous())


def _expect_words(name: str, x: torch.Tensor) -> tuple[int, int]:
    if x.dim() != 2 or x.dtype != torch.int32:
        raise ValueError(f"{name} is {str(x.dtype).removeprefix('torch.')} {list(x.shape)}, expected an int32 matrix")
    rows, columns = x.shape
    return rows, columns


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 8] of int32 [...], lowest bits first."""
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    return (words[..., None] >> shifts & 15).to(torch.uint8)
