from __future__ import annotations

import math

import torch
from benchmarks.gpu.candidates import product
from benchmarks.gpu.case import Case, Outputs, Work, bytes_of, plain

from arriero_kernels.sample import deepest, sample
from arriero_kernels.tuning import Tuning


def case(
    rows: int,
    vocabulary: int,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    temperature: float = 0.8,
    dtype: torch.dtype = torch.bfloat16,
    spread: float = 2.0,
    timed: bool = True,
) -> Case:
    """`spread`: the logits' standard deviation. Normal logits are flatter than a model's: more tokens are left."""
    filtered = top_k > 0 or top_p < 1

    def make(device: torch.device, tuning: Tuning | None) -> Work:
        logits = (torch.randn(rows, vocabulary, device=device) * spread).to(dtype)
        # What must come out the same of two random number generators: the one token that stands out of each row.
        logits.scatter_(1, torch.randint(0, vocabulary, (rows, 1), device=device), 60.0)
        positions = torch.randint(0, 1 << 17, (rows,), device=device)
        temperatures = torch.full((rows,), temperature, device=device)
        top_ks = torch.full((rows,), top_k, dtype=torch.int32, device=device)
        top_ps = torch.full((rows,), top_p, dtype=torch.float64, device=device)
        depths = torch.full((rows,), deepest(min_p), device=device)
        seeds = torch.randint(0, 1 << 62, (rows,), device=device)

        def call() -> Outputs:
            return sample(
                logits, positions, temperatures, top_ks, top_ps, depths, seeds, filtered=filtered, tuning=tuning
            )

        def twin() -> Outputs:
            if temperature == 0:
                return logits.argmax(-1)
            x = logits.float() / temperature
            if top_k:
                x = x.masked_fill(x < x.topk(top_k).values[:, -1:], -math.inf)
            if top_p < 1:
                ordered, ids = x.sort(descending=True)
                chances = ordered.softmax(-1)
                dropped = chances.cumsum(-1) - chances >= top_p
                x = x.masked_fill(dropped.scatter(1, ids, dropped), -math.inf)
            chances = x.softmax(-1)
            if min_p:
                chances = chances.masked_fill(chances < min_p * chances.amax(-1, keepdim=True), 0.0)
            return (chances / torch.empty_like(chances).exponential_()).argmax(-1)

        return Work(call, twin, bytes_of(logits, positions, temperatures, top_ks, top_ps, depths, seeds) + 8 * rows)

    filters = [f"top_k={top_k}"] * (top_k > 0) + [f"top_p={top_p}"] * (top_p < 1) + [f"min_p={min_p}"] * (min_p > 0)
    how = "greedy" if temperature == 0 else " ".join(filters) or "all"
    return Case("sample", f"N={rows} V={vocabulary} {plain(dtype)} {how}", make, timed)


CASES = [
    *(case(rows, 128_256) for rows in (1, 64, 256)),
    *(case(rows, 128_256, top_p=0.95) for rows in (1, 64, 256)),
    *(case(rows, 128_256, top_k=50, top_p=0.95, min_p=0.01) for rows in (1, 64)),
    case(64, 128_256, top_k=50, dtype=torch.float32),
    case(64, 128_256, temperature=0.0),
    case(64, 32_000, top_p=0.95),
    case(16, 50_257, top_p=0.95, timed=False),
]

CANDIDATES = {
    "sample": product(SPLITS=[2, 4, 8, 16, 32, 64], BLOCK=[512, 1024, 2048], num_warps=[4, 8, 16]),
    "sample_threshold": product(BLOCK=[512, 1024], WAYS=[2, 4, 8], num_warps=[8, 16]),
}
