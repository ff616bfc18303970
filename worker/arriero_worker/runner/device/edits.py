"""What changes logits before temperature, on the device: as `penalties` does it on the host, to the bit.

What the host knows (bias, banned stop tokens) comes with each step as places and numbers; the tokens that a penalised
sequence has seen are counted on the device, where its sampled ones are.

Legend: N sampled rows, V vocabulary, Q penalised sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from arriero_worker.engine.messages import SamplingParams
from arriero_worker.engine.step import Admit
from arriero_worker.runner.device.streams import Streams, sent

_FIRST_ROWS = 8


@dataclass(frozen=True, slots=True)
class _Edit:
    """What the host adds to a slot's logits."""

    biased: np.ndarray
    bias: np.ndarray
    stops: np.ndarray
    stops_from: int
    """The first position at which a stop token may be sampled."""


class DeviceEdits:
    """The edits of all slots. Tokens outside the vocabulary, which no logit belongs to, are passed over."""

    def __init__(self, max_running: int, vocab: int, device: torch.device, streams: Streams) -> None:
        self._vocab, self._device, self._streams = vocab, device, streams
        self._edits: list[_Edit | None] = [None] * max_running
        self._edited_S = np.zeros(max_running, dtype=np.bool_)
        self._row_S = np.full(max_running, -1, dtype=np.int64)
        """The slot's row of the counts; -1: not penalised."""
        self._factors_S3 = np.ones((max_running, 3), dtype=np.float32)
        """Repetition, presence and frequency penalty."""
        self._free: list[int] = []
        self._outputs_QV = torch.empty(0, vocab, dtype=torch.int32, device=device)
        """How often each token is in the output."""
        self._seen_QV = torch.empty(0, vocab, dtype=torch.bool, device=device)
        """What a repetition penalty is for: the tokens of prompt and output."""

    def admit(self, admit: Admit) -> None:
        """A sequence takes a slot: its history is counted from its tokens, so a replay continues it."""
        sampling, slot = admit.sampling, admit.slot
        bias = {token: value for token, value in sampling.logit_bias.items() if 0 <= token < self._vocab}
        stops = [token for token in sampling.stop_token_ids if 0 <= token < self._vocab] if sampling.min_tokens else []
        self._edited_S[slot] = bool(bias or stops)
        self._edits[slot] = _Edit(
            np.fromiter(bias.keys(), dtype=np.int64, count=len(bias)),
            np.fromiter(bias.values(), dtype=np.float32, count=len(bias)),
            np.array(stops, dtype=np.int64),
            admit.prompt_length + sampling.min_tokens,
        )
        if _penalised(sampling):
            self._factors_S3[slot] = (
                sampling.repetition_penalty,
                sampling.presence_penalty,
                sampling.frequency_penalty,
            )
            self._count(admit)
        elif self._row_S[slot] >= 0:
            self._free.append(int(self._row_S[slot]))
            self._row_S[slot] = -1

    def _count(self, admit: Admit) -> None:
        if self._row_S[admit.slot] < 0:
            if not self._free:
                self._grow()
            self._row_S[admit.slot] = self._free.pop()
        row = int(self._row_S[admit.slot])
        outputs_V, seen_V = self._outputs_QV[row], self._seen_QV[row]
        outputs_V.zero_()
        seen_V.zero_()
        output = admit.tokens[admit.prompt_length :]
        if output:
            tokens = self._sent(output).long()
            outputs_V.index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.int32))
        seen_V.index_fill_(0, self._sent(admit.tokens).long(), True)

    def _grow(self) -> None:
        rows = len(self._outputs_QV)
        more = max(_FIRST_ROWS, rows)
        self._free.extend(range(rows, rows + more))
        self._outputs_QV = torch.cat([self._outputs_QV, self._outputs_QV.new_zeros(more, self._vocab)])
        self._seen_QV = torch.cat([self._seen_QV, self._seen_QV.new_zeros(more, self._vocab)])

    def apply(self, logits_NV: torch.Tensor, slots_N: np.ndarray, positions_N: np.ndarray) -> None:
        """Edit in place the float32 logits (contiguous) from which the token at each position is to be sampled."""
        rows = np.flatnonzero(self._row_S.take(slots_N) >= 0)
        if len(rows):
            self._penalise(logits_NV, rows, slots_N[rows])
        edited = np.flatnonzero(self._edited_S.take(slots_N)).tolist()
        places, values = [], []
        for row in edited:
            edit = self._edits[slots_N[row]]
            assert edit is not None
            places.append(edit.biased + row * self._vocab)
            values.append(edit.bias)
            if positions_N[row] < edit.stops_from:
                places.append(edit.stops + row * self._vocab)
                values.append(np.full(len(edit.stops), -np.inf, dtype=np.float32))
        if places:
            where = self._sent_long(np.concatenate(places))
            numbers = self._sent(np.concatenate(values).view(np.int32)).view(torch.float32)
            logits_NV.view(-1).index_add_(0, where, numbers)

    def _penalise(self, logits_NV: torch.Tensor, rows: np.ndarray, slots: np.ndarray) -> None:
        where = self._sent(np.concatenate([rows, self._row_S.take(slots)])).long()
        at, counted = where[: len(rows)], where[len(rows) :]
        factors = self._sent(self._factors_S3[slots].reshape(-1).view(np.int32)).view(torch.float32).view(-1, 3, 1)
        repetition, presence, frequency = factors.unbind(1)
        outputs = self._outputs_QV.index_select(0, counted)
        values = logits_NV.index_select(0, at)
        repeated = torch.where(values > 0, values / repetition, values * repetition)
        values = torch.where(self._seen_QV.index_select(0, counted), repeated, values)
        values = values - presence * (outputs > 0)
        values = values - frequency * outputs.to(torch.float32)
        logits_NV.index_copy_(0, at, values)

    def append(self, slots_N: np.ndarray, tokens_N: torch.Tensor) -> None:
        """The slots' sequences gained these tokens (int64, on the device)."""
        rows = np.flatnonzero(self._row_S.take(slots_N) >= 0)
        if not len(rows):
            return
        where = self._sent(np.concatenate([rows, self._row_S.take(slots_N[rows])])).long()
        places = where[len(rows) :] * self._vocab + tokens_N.index_select(0, where[: len(rows)])
        self._outputs_QV.view(-1).index_add_(0, places, torch.ones_like(places, dtype=torch.int32))
        self._seen_QV.view(-1).index_fill_(0, places, True)

    def _sent(self, numbers: np.ndarray | Sequence[int]) -> torch.Tensor:
        """int32, on the device."""
        return sent(self._streams, self._device, np.asarray(numbers, dtype=np.int32))

    def _sent_long(self, numbers: np.ndarray) -> torch.Tensor:
        return self._sent(numbers.astype(np.int64).view(np.int32)).view(torch.int64)


def _penalised(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
