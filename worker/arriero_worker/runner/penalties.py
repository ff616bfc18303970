"""What changes logits before temperature: penalties, `logit_bias`, and the ban on stop tokens before `min_tokens`.

Kept per slot, and only for the slots that ask for it; each costs a few array operations over the tokens concerned,
never one over the vocabulary. Histories live in host memory (this is the cpu backend's).
"""

from __future__ import annotations

import numpy as np

from arriero_worker.engine.messages import SamplingParams
from arriero_worker.engine.step import Admit


class _Penalties:
    """The tokens a sequence has seen, with how often each is in its output."""

    def __init__(self, admit: Admit, vocab: int) -> None:
        sampling = admit.sampling
        self._repetition = np.float32(sampling.repetition_penalty)
        self._presence = np.float32(sampling.presence_penalty)
        self._frequency = np.float32(sampling.frequency_penalty)
        output = admit.tokens[admit.prompt_length :]
        # Presence and frequency look at the output alone, repetition at the prompt too.
        concerned = np.unique(np.array(admit.tokens if sampling.repetition_penalty != 1 else output, dtype=np.int64))
        self._count = len(concerned)
        self._tokens = np.empty(max(2 * self._count, 64), dtype=np.int64)
        self._tokens[: self._count] = concerned
        self._seen = np.zeros(vocab, dtype=np.bool_)
        self._seen[concerned] = True
        self._outputs = np.bincount(np.array(output, dtype=np.int64), minlength=vocab).astype(np.int32)

    def append(self, token: int) -> None:
        self._outputs[token] += 1
        if self._seen[token]:
            return
        self._seen[token] = True
        if self._count == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
        self._tokens[self._count] = token
        self._count += 1

    def apply(self, logits_V: np.ndarray) -> None:
        tokens = self._tokens[: self._count]
        values = logits_V[tokens]
        counts = self._outputs[tokens]
        if self._repetition != 1:
            values = np.where(values > 0, values / self._repetition, values * self._repetition)
        values -= self._presence * (counts > 0)
        values -= self._frequency * counts.astype(np.float32)
        logits_V[tokens] = values


class _Edits:
    """All edits of one slot's sequence."""

    def __init__(self, admit: Admit, vocab: int) -> None:
        sampling = admit.sampling
        self.penalties = _Penalties(admit, vocab) if _penalised(sampling) else None
        bias = {token: value for token, value in sampling.logit_bias.items() if 0 <= token < vocab}
        self._biased = np.fromiter(bias.keys(), dtype=np.int64, count=len(bias))
        self._bias = np.fromiter(bias.values(), dtype=np.float32, count=len(bias))
        self._stops = np.array([token for token in sampling.stop_token_ids if 0 <= token < vocab], dtype=np.int64)
        self._stops_from = admit.prompt_length + sampling.min_tokens
        """The first position at which a stop token may be sampled."""

    def apply(self, logits_V: np.ndarray, position: int) -> None:
        if self.penalties is not None:
            self.penalties.apply(logits_V)
        if len(self._biased):
            logits_V[self._biased] += self._bias
        if position < self._stops_from:
            logits_V[self._stops] = -np.inf


def _penalised(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


class LogitEdits:
    """The edits of all slots. Tokens outside the vocabulary, which no logit belongs to, are passed over."""

    def __init__(self, max_running: int, vocab: int) -> None:
        self._vocab = vocab
        self._edits: list[_Edits | None] = [None] * max_running
        self._edited_S = np.zeros(max_running, dtype=np.bool_)
        self._penalised_S = np.zeros(max_running, dtype=np.bool_)

    def admit(self, admit: Admit) -> None:
        """A sequence takes a slot: its history is counted from its tokens, so a replay continues it."""
        sampling, slot = admit.sampling, admit.slot
        edited = bool(_penalised(sampling) or sampling.logit_bias or (sampling.min_tokens and sampling.stop_token_ids))
        self._edits[slot] = _Edits(admit, self._vocab) if edited else None
        self._edited_S[slot] = edited
        self._penalised_S[slot] = _penalised(sampling)

    def append(self, slots_N: np.ndarray, tokens_N: np.ndarray) -> None:
        """The slots' sequences gained these tokens."""
        for row in np.flatnonzero(self._penalised_S.take(slots_N)).tolist():
            edits = self._edits[slots_N[row]]
            assert edits is not None
            assert edits.penalties is not None
            edits.penalties.append(int(tokens_N[row]))

    def apply(self, logits_NV: np.ndarray, slots_N: np.ndarray, positions_N: np.ndarray) -> None:
        """Edit in place the float32 logits from which the token at each position is to be sampled."""
        for row in np.flatnonzero(self._edited_S.take(slots_N)).tolist():
            edits = self._edits[slots_N[row]]
            assert edits is not None
            edits.apply(logits_NV[row], int(positions_N[row]))
