"""Log-probabilities of chosen tokens: of the distribution the model gave, before penalties, bias, temperature and
filters, as OpenAI and vLLM report them. Ranks and highest tokens are ordered by logit, ties by id.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from arriero_worker.runner.random import compiled
from arriero_worker.runner.results import Logprobs

_ROWS = 64
"""Rows at a time: what is computed besides the logits stays small however long a chunk is."""
_INSERTED = 64
"""Up to so many highest tokens are found by insertion, more by sorting."""


@compiled
def _rank(logits_LV: Any, tokens_L: Any, ranks_L: Any) -> None:
    for row in range(tokens_L.shape[0]):
        logits = logits_LV[row]
        token = tokens_L[row]
        rank = 1
        for i in range(token):
            rank += logits[i] >= logits[token]
        for i in range(token + 1, logits.shape[0]):
            rank += logits[i] > logits[token]
        ranks_L[row] = rank


@compiled
def _highest(logits_LV: Any, ids_LK: Any) -> None:
    rows, width = ids_LK.shape
    for row in range(rows):
        logits, ids = logits_LV[row], ids_LK[row]
        count = 0
        for i in range(logits.shape[0]):
            if count == width and logits[i] <= logits[ids[count - 1]]:
                continue
            at = min(count, width - 1)
            while at > 0 and logits[i] > logits[ids[at - 1]]:
                ids[at] = ids[at - 1]
                at -= 1
            ids[at] = i
            count = min(count + 1, width)


def _highest_of(logits_LV: np.ndarray, top: int) -> np.ndarray:
    if top > _INSERTED:
        order: np.ndarray = np.argsort(-logits_LV, axis=1, kind="stable")
        return order[:, :top]
    ids_LK = np.empty((len(logits_LV), top), dtype=np.int64)
    _highest(logits_LV, ids_LK)
    return ids_LK


def logprobs(logits_LV: torch.Tensor, tokens_L: np.ndarray, top: int) -> Logprobs:
    """Of each row's token and its `top` highest (all, where the vocabulary has fewer).

    logits_LV: float32; tokens_L: int64.
    """
    rows, vocab = logits_LV.shape
    top = min(top, vocab)
    result = Logprobs.empty(rows, top)
    ids, values = result.ids.numpy(), result.values.numpy()
    ids[:, 0] = tokens_L
    for first in range(0, rows, _ROWS):
        part = slice(first, first + _ROWS)
        part_logits = logits_LV[part].contiguous()
        logits = part_logits.numpy()
        ranks = np.empty(len(logits), dtype=np.int64)
        _rank(logits, np.ascontiguousarray(tokens_L[part]), ranks)
        ids[part, 1] = ranks
        if top:
            ids[part, 2:] = _highest_of(logits, top)
        asked = np.concatenate([ids[part, :1], ids[part, 2:]], axis=1)
        total = torch.logsumexp(part_logits, dim=-1, keepdim=True).numpy()
        values[part] = np.take_along_axis(logits, asked, axis=1) - total
    return result
