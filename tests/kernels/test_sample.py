"""Sampling gives the cpu backend's tokens, whatever filters are on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from arriero_kernels.sample import LARGEST_VOCABULARY, deepest, sample
from arriero_kernels.tuning import Tuning
from arriero_worker.runner import random
from arriero_worker.runner.filters import filter_rows


@dataclass(frozen=True)
class Parameters:
    """Of one slot."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


@pytest.fixture(autouse=True)
def _depths_may_be_infinite() -> Iterator[None]:
    # The interpreter is numpy, which says so.
    with np.errstate(over="ignore"):
        yield


def small(device: torch.device) -> Tuning:
    """Blocks that make several tiles of a vocabulary that the interpreter can do."""
    tuned = Tuning.of(device).using("sample", SPLITS=2, BLOCK=512, num_warps=4)
    return tuned.using("sample_threshold", BLOCK=512, WAYS=16, num_warps=4)


def of_cpu_backend(logits_NV: torch.Tensor, positions: list[int], slots: list[Parameters]) -> list[int]:
    """What the worker's sampler does with rows without penalties."""
    logits = logits_NV.float().cpu().numpy()
    tokens = logits.argmax(axis=1)
    drawn = [row for row, slot in enumerate(slots) if slot.temperature > 0]
    if drawn:
        rows = np.ascontiguousarray(logits[drawn])
        those = [slots[row] for row in drawn]
        filter_rows(
            rows,
            np.array([slot.temperature for slot in those], dtype=np.float32),
            np.array([slot.top_k for slot in those]),
            np.array([slot.top_p for slot in those]),
            np.array([slot.min_p for slot in those], dtype=np.float64),
        )
        found = np.empty(len(drawn), dtype=np.int64)
        seeds = np.array([slot.seed for slot in those], dtype=np.uint64)
        random.choose(rows, seeds, np.array(positions)[drawn], found)
        tokens[drawn] = found
    return [int(token) for token in tokens]


def sampled(
    logits_NV: torch.Tensor,
    positions: list[int],
    slots: list[Parameters],
    *,
    index: list[int] | None = None,
    filtered: bool = True,
    tuning: Tuning | None = None,
) -> list[int]:
    device = logits_NV.device
    found = sample(
        logits_NV,
        torch.tensor(positions, dtype=torch.int64, device=device),
        torch.tensor([slot.temperature for slot in slots], dtype=torch.float32, device=device),
        torch.tensor([slot.top_k for slot in slots], dtype=torch.int32, device=device),
        torch.tensor([slot.top_p for slot in slots], dtype=torch.float64, device=device),
        torch.tensor([deepest(slot.min_p) for slot in slots], dtype=torch.float32, device=device),
        torch.from_numpy(np.array([slot.seed for slot in slots], dtype=np.uint64).view(np.int64)).to(device),
        None if index is None else torch.tensor(index, device=device),
        filtered=filtered,
        tuning=tuning or small(device),
    )
    return [int(token) for token in found.tolist()]


def normal(rows: int, vocab: int, seed: int, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


FILTERS = [
    Parameters(),
    Parameters(temperature=0.0, top_k=3, top_p=0.1),
    Parameters(temperature=0.7),
    Parameters(top_k=1),
    Parameters(top_k=40),
    Parameters(top_k=599, temperature=50.0),
    Parameters(top_p=0.9),
    Parameters(top_p=0.31, temperature=1.5),
    Parameters(top_p=0.0),
    Parameters(top_p=0.99999, temperature=4.0),
    Parameters(min_p=0.05),
    Parameters(min_p=1.0),
    Parameters(top_k=50, top_p=0.95, min_p=0.02, temperature=0.8),
    Parameters(top_k=300, top_p=0.5, temperature=3.0),
    Parameters(top_k=10**6, top_p=0.8),
    Parameters(temperature=1e-6, top_p=0.9),
    Parameters(temperature=1e-30, top_k=5),
]


@pytest.mark.parametrize(("vocab", "slots"), [(601, FILTERS), (600, FILTERS[3:9] + FILTERS[12:15])], ids=["", "ties"])
def test_every_filter_leaves_the_cpu_backends_tokens(device: torch.device, vocab: int, slots: list[Parameters]) -> None:
    logits = normal(len(slots), vocab, vocab)
    logits = (logits.round() if vocab % 2 == 0 else logits).to(device)
    rng = np.random.default_rng(vocab)
    slots = [Parameters(s.temperature, s.top_k, s.top_p, s.min_p, int(rng.integers(0, 2**63)) * 2) for s in slots]
    positions = [0, 1, 131_071, 2**32 + 5, *rng.integers(0, 5000, len(slots) - 4).tolist()]
    assert sampled(logits, positions, slots) == of_cpu_backend(logits, positions, slots)


@pytest.mark.parametrize("seed", [0, 2**64 - 1, 0x0123456789ABCDEF])
def test_the_numbers_are_those_of_the_seed_and_the_position(device: torch.device, seed: int) -> None:
    """Flat rows: which token is taken is the random numbers' choice alone."""
    logits = normal(1, 700, 3, spread=0.01).expand(12, -1).contiguous().to(device)
    slots, positions = [Parameters(seed=seed)] * 12, list(range(12))
    tuned = Tuning.of(device).using("sample", SPLITS=1, BLOCK=1024, num_warps=4)
    found = sampled(logits, positions, slots, filtered=False, tuning=tuned)
    assert found == of_cpu_backend(logits, positions, slots)
    assert len(set(found)) > 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_logits_are_widened(device: torch.device, dtype: torch.dtype) -> None:
    """Coarse logits have many ties."""
    logits = normal(3, 500, 4, spread=1.0).to(device, dtype)
    slots = [Parameters(top_p=0.6, seed=8), Parameters(temperature=0), Parameters(top_k=300, top_p=0.7)]
    assert sampled(logits, [5] * 3, slots) == of_cpu_backend(logits, [5] * 3, slots)


@pytest.mark.parametrize("vocab", [1, 2, 17])
def test_tiny_vocabularies(device: torch.device, vocab: int) -> None:
    logits = normal(4, vocab, 5).to(device)
    slots = [Parameters(), Parameters(top_k=1), Parameters(top_p=0.5), Parameters(temperature=0)]
    assert sampled(logits, [9] * 4, slots) == of_cpu_backend(logits, [9] * 4, slots)


def test_broken_logits_give_the_cpu_backends_tokens(device: torch.device) -> None:
    logits = torch.zeros(8, 300)
    logits[0, 7] = math.inf
    logits[1] = -math.inf
    logits[2] = math.nan
    logits[3] = math.nan
    logits[3, 11] = 0.0
    logits[4] = -1e38
    logits[5, 5:] = -math.inf
    logits[6, 200] = math.nan
    logits[7, ::2] = -0.0
    logits = logits.to(device)
    for one in (Parameters(top_p=0.9, top_k=50, min_p=0.01, seed=3), Parameters(seed=4), Parameters(temperature=0)):
        slots, positions = [one] * len(logits), list(range(len(logits)))
        assert sampled(logits, positions, slots) == of_cpu_backend(logits, positions, slots)


def test_rows_find_their_slots(device: torch.device) -> None:
    logits = normal(3, 400, 6).to(device)
    slots = [Parameters(seed=s, temperature=t) for s, t in ((1, 1.0), (2, 0.0), (3, 2.0), (4, 0.5), (5, 1.0))]
    expected = of_cpu_backend(logits, [7, 8, 9], [slots[4], slots[1], slots[3]])
    assert sampled(logits, [7, 8, 9], slots, index=[4, 1, 3]) == expected


def test_blocks_and_splits_do_not_matter(device: torch.device) -> None:
    """And logits are left as they are."""
    logits = normal(3, 500, 7).to(device)
    given = logits.clone()
    slots = [Parameters(top_p=0.95, seed=1), Parameters(top_k=60, top_p=0.8, seed=2), Parameters(seed=3)]
    expected = of_cpu_backend(logits, [1, 2, 3], slots)
    for splits, block, ways in ((1, 512, 8), (4, 128, 4)):
        tuned = Tuning.of(device).using("sample", SPLITS=splits, BLOCK=block, num_warps=4)
        tuned = tuned.using("sample_threshold", BLOCK=block, WAYS=ways, num_warps=4)
        assert sampled(logits, [1, 2, 3], slots, tuning=tuned) == expected
    assert torch.equal(logits, given)


def test_min_p_is_rounded_to_what_it_keeps() -> None:
    assert deepest(0.0) == math.inf
    assert deepest(1.0) == 0.0
    for min_p in (1e-9, 0.01, 0.1, 0.3, 0.5, 0.999999):
        found = np.float32(deepest(min_p))
        assert float(found) <= -math.log(min_p) < float(np.nextafter(found, np.float32(np.inf)))


def test_no_rows(device: torch.device) -> None:
    assert sampled(torch.empty(0, 50, device=device), [], []) == []


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    logits = torch.zeros(2, 8, device=device)
    slots = [Parameters()] * 2
    with pytest.raises(ValueError, match="there are 2 rows and 3 slots"):
        sampled(logits, [1, 1], [Parameters()] * 3)
    with pytest.raises(ValueError, match=r"positions_N has shape \[1\], expected \[2\]"):
        sampled(logits, [1], slots)
    with pytest.raises(ValueError, match="logits_NV has 0 columns, expected 1 to 262,144"):
        sampled(logits[:, :0].contiguous(), [1, 1], slots)
    with pytest.raises(ValueError, match="logits_NV is int64"):
        sampled(logits.long(), [1, 1], slots)
    wide = torch.empty(1, 1, device=device).expand(1, LARGEST_VOCABULARY + 1).contiguous()
    with pytest.raises(ValueError, match="262,145 columns"):
        sampled(wide, [1], slots[:1])
