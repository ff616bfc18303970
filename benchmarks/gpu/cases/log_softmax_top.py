from __future__ import annotations

import torch
from benchmarks.gpu.candidates import product
from benchmarks.gpu.case import Case, Outputs, Work, bytes_of, plain

from arriero_kernels.log_softmax_top import log_softmax_top
from arriero_kernels.tuning import Tuning


def case(rows: int, vocabulary: int, top: int, dtype: torch.dtype = torch.bfloat16, timed: bool = True) -> Case:
    def make(device: torch.device, tuning: Tuning | None) -> Work:
        logits = (torch.randn(rows, vocabulary, device=device) * 2).to(dtype)
        tokens = torch.randint(0, vocabulary, (rows,), device=device)

        def call() -> Outputs:
            ids, values = log_softmax_top(logits, tokens, top, tuning=tuning)
            return values, ids

        def twin() -> Outputs:
            found = logits.log_softmax(-1, dtype=torch.float32)
            asked = found.gather(1, tokens[:, None])
            rank = (found > asked).sum(-1, keepdim=True) + 1
            highest = found.topk(top)
            return torch.cat([asked, highest.values], 1), torch.cat([tokens[:, None], rank, highest.indices], 1)

        return Work(call, twin, bytes_of(logits, tokens) + rows * (8 * (2 + top) + 4 * (1 + top)))

    return Case("log_softmax_top", f"N={rows} V={vocabulary} {plain(dtype)} K={top}", make, timed)


CASES = [
    *(case(rows, 128_256, 20) for rows in (1, 64, 1024)),
    case(64, 128_256, 0),
    case(64, 128_256, 5, torch.float32),
    case(64, 32_000, 20, timed=False),
    case(16, 50_257, 20, timed=False),
]

CANDIDATES = {"log_softmax_top": product(BLOCK=[1024, 2048, 4096, 8192, 16384], num_warps=[4, 8, 16, 32])}
