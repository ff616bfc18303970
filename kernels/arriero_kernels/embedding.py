"""Rows of a table: the embedding of tokens, also of a part of the vocabulary, and the picking of rows.

Legend: T tokens, H hidden size, V rows of the table. Tuned by H.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arriero_kernels.checks import FLOATS, INDICES, expect, expect_2d
from arriero_kernels.tuning import Tuning


@triton.jit
def _embedding_kernel(tokens, table, out, first, rows, n, BLOCK: tl.constexpr):
    position = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(tokens + position).to(tl.int64) - first
    read = tl.where((row >= 0) & (row < rows), n, 0)
    # Copied, not computed with: no widening is needed.
    values = tl.load(table + row * n + column, mask=column < read, other=0.0)
    tl.store(out + position * n + column, values, mask=column < n)


def embedding(
    tokens_T: torch.Tensor,
    table_VH: torch.Tensor,
    first_token: int = 0,
    *,
    out_TH: torch.Tensor | None = None,
    tuning: Tuning | None = None,
) -> torch.Tensor:
    """The tokens' rows of a table that begins at token `first_token`; zeros for tokens outside it.

    tokens_T: int64 or int32 [T], contiguous.
    table_VH: [V, H] bfloat16, float16 or float32, contiguous.
    out_TH: [T, H] of the table's dtype, contiguous; made if None.

    Returns out_TH. Raises ValueError for other shapes, dtypes, devices or strides.
    """
    v, h = expect_2d("table_VH", table_VH, FLOATS)
    t = tokens_T.numel()
    expect("tokens_T", tokens_T, (t,), INDICES, table_VH.device)
    out_TH = table_VH.new_empty(t, h) if out_TH is None else out_TH
    expect("out_TH", out_TH, (t, h), (table_VH.dtype,), table_VH.device)
    if t == 0:
        return out_TH
    parameters = (tuning or Tuning.of(table_VH.device)).choose("embedding", h)
    _embedding_kernel[(t, triton.cdiv(h, parameters["BLOCK"]))](
        tokens_T, table_VH, out_TH, first_token, v, h, **parameters
    )
    return out_TH
