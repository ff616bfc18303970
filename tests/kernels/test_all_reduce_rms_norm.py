"""The fused one-shot all-reduce: what it computes, and that ranks wait for each other.

Ranks are played in two ways. In one process, one after another: before a rank is launched, its pad gets the signals of
those that come after it, so that it finds them. And in the interpreter as processes that run at the same time over
shared memory: there the barrier is what holds them together.
"""

from __future__ import annotations

import mmap
import multiprocessing
import warnings

import pytest
import torch
from tests.kernels.quantized import assert_quantized, expected_scales
from tests.kernels.tensors import DTYPES, drawn
from tests.kernels.tolerance import assert_as_good

from arriero_kernels.all_reduce_rms_norm import (
    PROGRAMS,
    all_reduce_add_rms_norm,
    all_reduce_add_rms_norm_quantized,
    signals,
    worthwhile,
)
from arriero_kernels.quantization import Scaling
from arriero_kernels.tuning import Tuning

EPS = 1e-5


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """In the precision of its arguments."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


class Group:
    """W ranks in one memory, launched one after another."""

    def __init__(self, world: int, tokens: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        self.partials = [drawn(tokens, hidden, dtype=dtype, device=device, seed=10 + rank) for rank in range(world)]
        self.pads = [torch.zeros(signals(world), dtype=torch.int32, device=device) for _ in range(world)]
        self.buffers_W = torch.tensor([x.data_ptr() for x in self.partials], device=device)
        self.pads_W = torch.tensor([x.data_ptr() for x in self.pads], device=device)
        self.residual = drawn(tokens, hidden, dtype=dtype, device=device, seed=1)
        self.weight = drawn(hidden, dtype=dtype, device=device, seed=2)
        self.total = sum(x.float() for x in [*self.partials, self.residual]).to(dtype)
        self._tokens, self._world = tokens, world

    def foretell(self, rank: int) -> torch.Tensor:
        """Signals of the ranks not launched yet: to this one's pad. Returns what they add to it."""
        programs = min(self._tokens, PROGRAMS)
        signs = torch.zeros_like(self.pads[rank]).view(PROGRAMS, self._world)
        signs[:programs, rank + 1 :] = 1
        self.pads[rank] += signs.view(-1)
        return signs.view(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("world", "tokens", "hidden"), [(1, 3, 64), (2, 1, 123), (3, 5, 1000), (8, 2, 256)])
def test_every_rank_finds_the_sum_and_its_norm(
    device: torch.device, world: int, tokens: int, hidden: int, dtype: torch.dtype
) -> None:
    group = Group(world, tokens, hidden, dtype, device)
    exact = norm(group.total.double(), group.weight.double())
    torchs = norm(group.total, group.weight)
    foretold = []
    for rank in range(world):
        foretold.append(group.foretell(rank))
        residual = group.residual.clone()
        found = all_reduce_add_rms_norm(group.buffers_W, group.pads_W, rank, residual, group.weight, EPS)
        if dtype == torch.float32:
            assert torch.allclose(residual, group.total, rtol=0, atol=1e-6)
        else:
            assert torch.equal(residual, group.total)
        assert found.dtype == dtype
        assert_as_good(found, exact, torchs)
    # Each rank signalled each once per program, and took as many off: what is left is what was foretold.
    for pad, signs in zip(group.pads, foretold, strict=True):
        assert torch.equal(pad, signs)


def test_more_rows_than_programs(device: torch.device) -> None:
    group = Group(1, PROGRAMS + 3, 16, torch.bfloat16, device)
    found = all_reduce_add_rms_norm(group.buffers_W, group.pads_W, 0, group.residual, group.weight, EPS)
    assert torch.equal(group.residual, group.total)
    assert_as_good(found, norm(group.total.double(), group.weight.double()), norm(group.total, group.weight))
    assert not group.pads[0].any()


@pytest.mark.parametrize("scaling", [Scaling.TENSOR, Scaling.TOKEN, Scaling.GROUP])
def test_quantized(device: torch.device, scaling: Scaling) -> None:
    group = Group(2, 3, 192, torch.bfloat16, device)
    group.foretell(0)
    exact = norm(group.total.float(), group.weight.float())
    scale = expected_scales(exact, torch.float8_e4m3fn, scaling, 64) if scaling is Scaling.TENSOR else None
    codes, scales = all_reduce_add_rms_norm_quantized(
        group.buffers_W, group.pads_W, 0, group.residual, group.weight, EPS, scaling=scaling, scale=scale, group=64
    )
    assert torch.equal(group.residual, group.total)
    assert_quantized(codes, scales, exact, torch.float8_e4m3fn, scaling, 64)


ROUNDS, WORLD, TOKENS, HIDDEN = 4, 3, 2, 32


class Shared:
    """Memory that forked processes share, at the same addresses."""

    def __init__(self) -> None:
        self.partials = self._zeros(WORLD, 2, TOKENS, HIDDEN)
        self.pads = self._zeros(WORLD, signals(WORLD)).view(torch.int32)
        self.residuals = self._zeros(WORLD, TOKENS, HIDDEN)
        self.found = self._zeros(WORLD, ROUNDS, TOKENS, HIDDEN)

    @staticmethod
    def _zeros(*shape: int) -> torch.Tensor:
        return torch.frombuffer(mmap.mmap(-1, 4 * torch.Size(shape).numel()), dtype=torch.float32).view(shape)


def partial(rank: int, turn: int) -> torch.Tensor:
    return drawn(TOKENS, HIDDEN, dtype=torch.float32, device=torch.device("cpu"), seed=100 * turn + rank)


def live(rank: int, shared: Shared) -> None:
    """A rank's life: rounds of partial sums, in two buffers in turn.

    In each round, one rank writes its partial sums only after it has seen that all others are in the launch: without
    the barrier they would add up what was there before.
    """
    torch.set_num_threads(1)
    pads = torch.tensor([shared.pads[peer].data_ptr() for peer in range(WORLD)])
    others = [peer for peer in range(WORLD) if peer != rank]
    for turn in range(ROUNDS):
        if turn % WORLD == rank:
            while not shared.pads[rank, others].all():
                pass
        shared.partials[rank, turn % 2] = partial(rank, turn)
        buffers = torch.tensor([shared.partials[peer, turn % 2].data_ptr() for peer in range(WORLD)])
        weight = torch.ones(HIDDEN)
        shared.found[rank, turn] = all_reduce_add_rms_norm(buffers, pads, rank, shared.residuals[rank], weight, EPS)


def test_ranks_that_run_at_once_wait_for_each_other(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("ranks on devices of their own need as many devices")
    shared = Shared()
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=live, args=(rank, shared)) for rank in range(WORLD)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 says of a process with threads not to fork
        for process in ranks:
            process.start()
    for process in ranks:
        process.join(60)
    late = [process for process in ranks if process.exitcode is None]
    for process in late:
        process.kill()
        process.join()
    assert not late
    assert [process.exitcode for process in ranks] == [0] * WORLD
    residual = torch.zeros(TOKENS, HIDDEN)
    for turn in range(ROUNDS):
        residual += sum(partial(rank, turn) for rank in range(WORLD))
        for rank in range(WORLD):
            assert torch.allclose(shared.found[rank, turn], norm(residual, torch.ones(HIDDEN)), atol=1e-5, rtol=0)
            assert torch.equal(shared.found[rank, turn], shared.found[0, turn])  # to the bit
    assert not shared.pads.any()


def test_few_tokens_are_worthwhile(device: torch.device) -> None:
    tuned = Tuning.of(device).using("all_reduce_rms_norm", TOKENS=16, num_warps=4)
    assert worthwhile(16, 4096, device, tuned)
    assert not worthwhile(17, 4096, device, tuned)
    assert worthwhile(1, 16384, device)
    assert not worthwhile(8192, 4096, device)


def test_no_tokens(device: torch.device) -> None:
    """No rank launches anything, so none waits."""
    group = Group(2, 0, 16, torch.bfloat16, device)
    found = all_reduce_add_rms_norm(group.buffers_W, group.pads_W, 0, group.residual, group.weight, EPS)
    assert found.shape == (0, 16)


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    group = Group(2, 3, 16, torch.bfloat16, device)
    with pytest.raises(ValueError, match="rank is 2, expected 0 to 1: there are 2 buffers"):
        all_reduce_add_rms_norm(group.buffers_W, group.pads_W, 2, group.residual, group.weight, EPS)
    with pytest.raises(ValueError, match=r"pads_W has shape \[1\], expected \[2\]"):
        all_reduce_add_rms_norm(group.buffers_W, group.pads_W[:1], 0, group.residual, group.weight, EPS)
    with pytest.raises(ValueError, match="buffers_W is int32, expected int64"):
        all_reduce_add_rms_norm(group.buffers_W.int(), group.pads_W, 0, group.residual, group.weight, EPS)
    with pytest.raises(ValueError, match="weight_H has shape"):
        all_reduce_add_rms_norm(group.buffers_W, group.pads_W, 0, group.residual, group.weight[:3], EPS)
