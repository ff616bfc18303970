from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as functional
from benchmarks.gpu.candidates import product
from benchmarks.gpu.case import Case, Outputs, Work

from arriero_kernels.embedding import embedding
from arriero_kernels.tuning import Tuning


@lru_cache(maxsize=1)
def _table(device: torch.device, vocabulary: int, hidden: int) -> torch.Tensor:
    """One for all sets of tokens, as it is many times the cache."""
    return torch.randn(vocabulary, hidden, device=device, dtype=torch.bfloat16)


def case(tokens: int, vocabulary: int, hidden: int, timed: bool = True) -> Case:
    def make(device: torch.device, tuning: Tuning | None) -> Work:
        table = _table(device, vocabulary, hidden)
        ids = torch.randint(0, vocabulary, (tokens,), device=device)

        def call() -> Outputs:
            return embedding(ids, table, tuning=tuning)

        def twin() -> Outputs:
            return functional.embedding(ids, table)

        return Work(call, twin, tokens * (8 + 2 * 2 * hidden))

    return Case("embedding", f"T={tokens} V={vocabulary} H={hidden}", make, timed)


CASES = [case(64, 128_256, 4096), case(8192, 128_256, 4096), case(8192, 128_256, 8192, timed=False)]

CANDIDATES = {"embedding": product(BLOCK=[512, 1024, 2048, 4096, 8192], num_warps=[1, 2, 4, 8])}
