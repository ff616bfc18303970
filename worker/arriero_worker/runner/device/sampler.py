"""From logits to tokens, on the device: token for token what `runner.sampler` samples on the host.

Legend: S slots, N sampled rows, L rows with log-probabilities, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from arriero_kernels.log_softmax_top import MOST, log_softmax_top
from arriero_kernels.sample import deepest, sample
from arriero_kernels.tuning import Tuning
from arriero_worker.engine.step import Admit
from arriero_worker.runner.batch import BatchState, Step
from arriero_worker.runner.device.edits import DeviceEdits
from arriero_worker.runner.device.streams import Streams, sent
from arriero_worker.runner.results import Logprobs, ResultLayout


class DeviceSampler:
    """Samples for the slots of a `BatchState`, whose parameters it keeps on the device."""

    def __init__(
        self, state: BatchState, vocab: int, device: torch.device, streams: Streams, tuning: Tuning | None = None
    ) -> None:
        self._state, self._device, self._streams, self._tuning = state, device, streams, tuning
        slots = len(state.seeds_S)
        self._edits = DeviceEdits(slots, vocab, device, streams)
        self._filtered_S = np.zeros(slots, dtype=np.bool_)
        self._temperatures_S = torch.zeros(slots, device=device)
        self._top_ks_S = torch.zeros(slots, dtype=torch.int32, device=device)
        self._top_ps_S = torch.ones(slots, dtype=torch.float64, device=device)
        self._deepest_S = torch.zeros(slots, device=device)
        self._seeds_S = torch.zeros(slots, dtype=torch.int64, device=device)

    def admit(self, admits: Sequence[Admit]) -> None:
        """Sequences take slots; call it, after the state's `apply`, before the step that admits them is sampled."""
        if not admits:
            return
        for admit in admits:
            self._edits.admit(admit)
            sampling = admit.sampling
            self._filtered_S[admit.slot] = sampling.top_k > 0 or sampling.top_p < 1
        state, slots = self._state, np.array([admit.slot for admit in admits], dtype=np.int64)
        bounds = np.array([deepest(admit.sampling.min_p) for admit in admits], dtype=np.float32)
        # The eight-byte numbers first, so that each lies aligned.
        fields: list[np.ndarray] = [
            slots,
            state.seeds_S[slots],
            state.top_ps_S[slots].astype(np.float64),
            state.temperatures_S[slots].astype(np.float32),
            bounds,
            state.top_ks_S[slots].astype(np.int32),
        ]
        numbers = sent(self._streams, self._device, np.concatenate([field.view(np.int32) for field in fields]))
        parts = torch.split(numbers, [field.nbytes // 4 for field in fields])
        where = parts[0].view(torch.int64)
        kept = (self._seeds_S, self._top_ps_S, self._temperatures_S, self._deepest_S, self._top_ks_S)
        for target, part in zip(kept, parts[1:], strict=True):
            target.index_copy_(0, where, part.view(target.dtype))

    def sample(
        self,
        step: Step,
        layout: ResultLayout,
        logits_RV: torch.Tensor,
        slots_N: torch.Tensor,
        positions_N: torch.Tensor,
    ) -> tuple[torch.Tensor, Logprobs | None]:
        """The tokens of a step, int64 [N], and the log-probabilities that its requests ask for, all on the device.

        logits_RV: float32, the rows of `Step`, and maybe more behind them; overwritten.
        slots_N, positions_N: those of `Step`, on the device.
        """
        sampled = len(step.slots_N)
        logits_NV = logits_RV[:sampled].contiguous()
        # Edits overwrite the sampled rows; prompt rows stay as they are.
        raw_LV = None
        if len(layout.asked):
            asked_L = sent(self._streams, self._device, layout.asked)
            raw_LV = logits_NV.index_select(0, asked_L)
        self._edits.apply(logits_NV, step.slots_N, step.positions_N)
        tokens_N = sample(
            logits_NV,
            positions_N,
            self._temperatures_S,
            self._top_ks_S,
            self._top_ps_S,
            self._deepest_S,
            self._seeds_S,
            slots_N,
            filtered=bool(self._filtered_S.take(step.slots_N).any()),
            tuning=self._tuning,
        )
        self._edits.append(step.slots_N, tokens_N)
        found: list[Logprobs] = []
        if raw_LV is not None:
            found.append(_logprobs(raw_LV, tokens_N.index_select(0, asked_L), layout.top, self._tuning))
        if step.prompts:
            targets = np.concatenate([prompt.targets for prompt in step.prompts])
            rows_LV = logits_RV[sampled : sampled + len(targets)].contiguous()
            targets_L = sent(self._streams, self._device, targets)
            found.append(_logprobs(rows_LV, targets_L, layout.top, self._tuning))
        return tokens_N, Logprobs.joined(found) if found else None


def _logprobs(logits_LV: torch.Tensor, tokens_L: torch.Tensor, top: int, tuning: Tuning | None) -> Logprobs:
    """For none of the highest tokens, or for as many as any request may want: else a kernel would be compiled for each
    number, while requests wait.
    """
    most = min(MOST, logits_LV.shape[1]) if top else 0
    ids, values = log_softmax_top(logits_LV, tokens_L, most, tuning=tuning)
    return Logprobs(ids[:, : 2 + top].contiguous(), values[:, : 1 + top].contiguous())
