"""All-reduce in one shot over symmetric memory, fused with the addition to the residual and RMSNorm after it.

Legend: T tokens, H hidden size, W ranks. Tuned by H. For few tokens, where a launch and a ring's steps cost more than
that every rank reads everything: `worthwhile` says up to how many.

Each rank has written its partial sums into its own buffer, which all ranks can read; every rank then adds all of them
up, in the ranks' order, so that all find the same to the bit.

The barrier: every program of a launch says to the program of the same number on each rank that it has begun, by adding
1 to that rank's signal pad (release, system scope), and waits until each has said so to it (acquire), taking 1 off
again. That a program has begun says that what its rank launched before has ended, its partial sums among it. There is
no barrier at the end: callers take two buffers in turn. Who passes the barrier of a launch knows that every rank has
ended the launch before, the last that read the other buffer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arriero_kernels.checks import FLOATS, expect, expect_2d
from arriero_kernels.numerics import narrow, store_row, widen
from arriero_kernels.quantization import Outputs, Scaling, quantized_outputs
from arriero_kernels.tuning import Tuning

PROGRAMS = 64
"""At most so many programs a launch: all must run at once, as each waits for its counterparts."""


@triton.jit
def _meet(pads, rank, WORLD: tl.constexpr, LANES: tl.constexpr):
    """Wait until the program of this number has begun on every rank."""
    peer = tl.arange(0, LANES)
    present = peer < WORLD
    place = tl.program_id(0) * WORLD
    theirs = tl.load(pads + peer, mask=present, other=0).to(tl.pointer_type(tl.int32)) + place + rank
    own = tl.load(pads + rank).to(tl.pointer_type(tl.int32)) + place + peer
    one = tl.full((LANES,), 1, tl.int32)
    tl.atomic_add(theirs, one, mask=present, sem="release", scope="sys")
    missing = WORLD
    while missing > 0:
        seen = tl.atomic_add(own, one - 1, mask=present, sem="acquire", scope="sys")
        missing = tl.sum((present & (seen < 1)).to(tl.int32), 0)
    tl.atomic_add(own, -one, mask=present, sem="relaxed", scope="sys")


@triton.jit(do_not_specialize=["rank", "tokens"])
def _all_reduce_rms_norm_kernel(
    buffers,
    pads,
    residual,
    weight,
    out,
    scales,
    eps,
    rank,
    tokens,
    n,
    stride,
    WORLD: tl.constexpr,
    LANES: tl.constexpr,
    SCALING: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every num_programs-th row."""
    column = tl.arange(0, BLOCK)
    mask = column < n
    w = widen(tl.load(weight + column, mask=mask, other=0.0))
    _meet(pads, rank, WORLD, LANES)
    for index in range(tl.program_id(0), tokens, tl.num_programs(0)):
        row = tl.zeros((), tl.int64) + index
        total = tl.zeros((BLOCK,), tl.float32)
        for peer in tl.static_range(WORLD):
            partial = tl.multiple_of(tl.load(buffers + peer).to(tl.pointer_type(residual.dtype.element_ty)), 16)
            # Past the first-level cache, which knows nothing of what other devices write.
            total += widen(tl.load(partial + row * n + column, mask=mask, other=0.0, cache_modifier=".cg"))
        x = widen(tl.load(residual + row * n + column, mask=mask, other=0.0)) + total
        kept = narrow(x, residual.dtype.element_ty)
        tl.store(residual + row * n + column, kept, mask=mask)
        x = widen(kept)
        scale = tl.rsqrt(tl.sum(x * x, 0) / n + eps)
        store_row(x * scale * w, column, n, out + row * n, scales + row * stride, SCALING, GROUP, BLOCK)


def signals(world: int) -> int:
    """How many int32, zeros at first, a rank's signal pad has for a group of `world` ranks."""
    return PROGRAMS * world


def worthwhile(tokens: int, hidden: int, device: torch.device, tuning: Tuning | None = None) -> bool:
    """Whether so many `tokens` of a `hidden` size are few enough for one shot on a `device`, by its tuning table."""
    return tokens <= (tuning or Tuning.of(device)).choose("all_reduce_rms_norm", hidden)["TOKENS"]


def all_reduce_add_rms_norm(
    buffers_W: torch.Tensor,
    pads_W: torch.Tensor,
    rank: int,
    residual_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    *,
    out_TH: torch.Tensor | None = None,
    tuning: Tuning | None = None,
) -> torch.Tensor:
    """residual += the sum of all ranks' partial sums, in place, then residual / sqrt(mean(residual^2) + eps) * weight.

    Called by all ranks, with equal T and H, in the same order.
    buffers_W: int64 [W], on the device: where each rank's partial sums lie, [T, H] of the residual's dtype, contiguous,
    at a multiple of 16 bytes. Another buffer than in the call before, and written only after that call was launched.
    pads_W: int64 [W], on the device: where each rank's signal pad lies, `signals(W)` int32; zeros at first, again zeros
    when all ranks have ended. The same in every call.
    rank: this one, in [0, W).
    residual_TH: [T, H] bfloat16, float16 or float32, contiguous, equal on all ranks; rounded once, after the addition.
    weight_H: [H], any of these dtypes.
    out_TH: [T, H] of the residual's dtype, contiguous, not the residual; made if None.

    Returns out_TH. Raises ValueError for other shapes, dtypes, devices or strides. The launch waits on the device for
    all ranks, for ever if one does not come: who aborts a group has to end the process that waits.
    """
    t, h = expect_2d("residual_TH", residual_TH, FLOATS)
    out_TH = torch.empty_like(residual_TH) if out_TH is None else out_TH
    expect("out_TH", out_TH, (t, h), (residual_TH.dtype,), residual_TH.device)
    out = Outputs(out_TH, out_TH, 0, 1)
    _launch(buffers_W, pads_W, rank, residual_TH, weight_H, eps, out, Scaling.NONE, tuning)
    return out_TH


def all_reduce_add_rms_norm_quantized(
    buffers_W: torch.Tensor,
    pads_W: torch.Tensor,
    rank: int,
    residual_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scaling: Scaling = Scaling.TOKEN,
    scale: torch.Tensor | None = None,
    group: int = 128,
    out_TH: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    tuning: Tuning | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`all_reduce_add_rms_norm`, its result quantised before it is written.

    The first arguments are those of `all_reduce_add_rms_norm`; the others, and what is returned, those of
    `quantization.quantized_outputs`. Raises ValueError as both do.
    """
    t, h = expect_2d("residual_TH", residual_TH, FLOATS)
    out = quantized_outputs(t, h, residual_TH.device, dtype, scaling, scale, group, out_TH, scales)
    _launch(buffers_W, pads_W, rank, residual_TH, weight_H, eps, out, scaling, tuning)
    return out.codes_TN, out.scales


def _launch(
    buffers_W: torch.Tensor,
    pads_W: torch.Tensor,
    rank: int,
    residual_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    out: Outputs,
    scaling: Scaling,
    tuning: Tuning | None,
) -> None:
    (t, h), device, world = residual_TH.shape, residual_TH.device, buffers_W.numel()
    expect("buffers_W", buffers_W, (world,), (torch.int64,), device)
    expect("pads_W", pads_W, (world,), (torch.int64,), device)
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}, expected 0 to {world - 1}: there are {world} buffers")
    expect("weight_H", weight_H, (h,), FLOATS, device)
    if t == 0:
        return
    tuning = tuning or Tuning.of(device)
    parameters = {k: v for k, v in tuning.choose("all_reduce_rms_norm", h).items() if k != "TOKENS"}
    _all_reduce_rms_norm_kernel[(min(t, PROGRAMS, tuning.multiprocessors),)](
        buffers_W,
        pads_W,
        residual_TH,
        weight_H,
        out.codes_TN,
        out.scales,
        eps,
        rank,
        t,
        h,
        out.stride,
        WORLD=world,
        LANES=triton.next_power_of_2(world),
        SCALING=scaling.value,
        GROUP=out.group,
        BLOCK=triton.next_power_of_2(h),
        **parameters,
    )
