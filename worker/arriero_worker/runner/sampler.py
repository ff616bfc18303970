"""From logits to tokens, on the last stage.

A row's token is a function of its logits, its sequence's `SamplingParams`, its seed and its position: the batch
around it does not matter, every tensor rank finds the same, and so does a replay after a crash.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from arriero_worker.engine.step import Admit
from arriero_worker.runner import filters, random
from arriero_worker.runner.batch import BatchState, Step
from arriero_worker.runner.logprobs import logprobs
from arriero_worker.runner.penalties import LogitEdits
from arriero_worker.runner.results import Logprobs, ResultLayout


class Sampler:
    """Samples for the slots of a `BatchState`. What it compiles, it compiles when it is made."""

    def __init__(self, state: BatchState, vocab: int) -> None:
        self._state = state
        self._edits = LogitEdits(len(state.seeds_S), vocab)
        self._warm()

    def admit(self, admits: Iterable[Admit]) -> None:
        """Sequences take slots; call it before the step that admits them is sampled."""
        for admit in admits:
            self._edits.admit(admit)

    def sample(self, step: Step, layout: ResultLayout, logits_RV: torch.Tensor) -> tuple[np.ndarray, Logprobs | None]:
        """The tokens of a step, int64 [N], and the log-probabilities that its requests ask for.

        logits_RV: float32, the rows of `Step`; overwritten.
        """
        sampled = len(step.slots_N)
        # Edits and filters overwrite the sampled rows; prompt rows stay as they are.
        raw_LV = logits_RV.index_select(0, torch.from_numpy(layout.asked)) if len(layout.asked) else None
        tokens_N = self._choose(step, np.require(logits_RV[:sampled].numpy(), requirements=["C", "W"]))
        self._edits.append(step.slots_N, tokens_N)
        found: list[Logprobs] = []
        if raw_LV is not None:
            found.append(logprobs(raw_LV, tokens_N[layout.asked], layout.top))
        if step.prompts:
            targets = np.concatenate([prompt.targets for prompt in step.prompts])
            found.append(logprobs(logits_RV[sampled:], targets, layout.top))
        return tokens_N, Logprobs.joined(found) if found else None

    def _choose(self, step: Step, logits_NV: np.ndarray) -> np.ndarray:
        state, slots_N = self._state, step.slots_N
        self._edits.apply(logits_NV, slots_N, step.positions_N)
        temperatures_N = state.temperatures_S.take(slots_N)
        drawn = np.flatnonzero(temperatures_N > 0)
        everything = len(drawn) == len(slots_N)
        # argmax takes the first of equals.
        tokens_N = np.empty(len(slots_N), dtype=np.int64) if everything else logits_NV.argmax(axis=1)
        if len(drawn):
            rows, slots = (logits_NV, slots_N) if everything else (logits_NV[drawn], slots_N[drawn])
            filters.filter_rows(
                rows,
                temperatures_N[drawn],
                state.top_ks_S[slots],
                state.top_ps_S[slots],
                state.min_ps_S[slots],
            )
            tokens = np.empty(len(drawn), dtype=np.int64)
            random.choose(rows, state.seeds_S[slots], step.positions_N[drawn], tokens)
            tokens_N[drawn] = tokens
        return tokens_N

    @staticmethod
    def _warm() -> None:
        """Compile everything now, not under the first request that wants it."""
        rows, ones = np.zeros((2, 3), dtype=np.float32), np.ones(2, dtype=np.int64)
        filters.filter_rows(rows, np.ones(2, dtype=np.float32), ones, np.ones(2), np.zeros(2))
        random.choose(rows, ones.astype(np.uint64), ones, ones.copy())
        logprobs(torch.zeros(2, 3), ones, 1)
