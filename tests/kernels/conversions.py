"""Kernels that convert, for the tests of conversions: `mode` imports them as it imports the product's."""

from __future__ import annotations

import triton
import triton.language as tl

from arriero_kernels.numerics import narrow, rint, widen


@triton.jit
def convert(source, target, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + i, narrow(widen(tl.load(source + i)), target.dtype.element_ty))


@triton.jit
def round_to_whole(source, target, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + i, rint(tl.load(source + i)))
