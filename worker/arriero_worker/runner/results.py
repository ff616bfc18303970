"""What goes from the last stage to stage 0 after each step.

Both ends know the plan and the sampling parameters of its slots, so both know every shape: a step's results travel
as tensors of known shape and dtype, without sizes, in the order of the steps.

Legend: N sampled tokens, L rows with log-probabilities, K highest tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from arriero_worker.engine.step import SampledLogprobs, StepResult
from arriero_worker.runner.batch import BatchState, PromptRows, Step


class ResultChannel(Protocol):
    """Carries the results of tensor rank i of the last stage to tensor rank i of stage 0. Steps arrive in order.

    Either call may raise `GroupAborted`. They may run at the same time as the calls of `Communicator`.
    """

    def send_results(self, tensors: Sequence[torch.Tensor]) -> None:
        """On the last stage. Returns without waiting for the receiver, at least for the steps that may be in flight
        (one more than there are stages); the tensors may be overwritten then.
        """
        ...

    def recv_results(self, tensors: Sequence[torch.Tensor]) -> None:
        """On stage 0. Blocks until the tensors, of the shapes and dtypes sent, are filled."""
        ...


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities at L places."""

    ids: torch.Tensor
    """int64 [L, 2 + K]: the chosen token, its rank (1 = most likely), the K highest tokens."""
    values: torch.Tensor
    """float32 [L, 1 + K]: log-probabilities of the chosen token and of the K highest."""

    @staticmethod
    def empty(rows: int, top: int, device: torch.device | None = None) -> Logprobs:
        ids = torch.empty(rows, 2 + top, dtype=torch.int64, device=device)
        return Logprobs(ids, torch.empty(rows, 1 + top, device=device))

    @staticmethod
    def joined(parts: Sequence[Logprobs]) -> Logprobs:
        """One behind the other; all have the same K."""
        return Logprobs(torch.cat([part.ids for part in parts]), torch.cat([part.values for part in parts]))


@dataclass(frozen=True, slots=True)
class ResultLayout:
    """What the results of one step consist of."""

    step: int
    slots_N: np.ndarray
    """int64, the slots that gain a token."""
    asked: np.ndarray
    """int64, the sampled rows whose log-probabilities are asked for: the first of the L rows."""
    tops: list[int]
    """How many of the highest each of them wants."""
    prompts: list[PromptRows]
    """The other L rows."""
    vocab: int

    @classmethod
    def of(cls, step: Step, state: BatchState, vocab_size: int) -> ResultLayout:
        """Of a step, as every rank knows it."""
        tops_N = state.logprobs_S.take(step.slots_N)
        asked = np.flatnonzero(tops_N >= 0)
        return cls(step.number, step.slots_N, asked, tops_N[asked].tolist(), step.prompts, vocab_size)

    @property
    def rows(self) -> int:
        """L."""
        return len(self.asked) + sum(len(prompt.targets) for prompt in self.prompts)

    @property
    def top(self) -> int:
        """K: as many as any row wants."""
        return min(max(self.tops + [prompt.top for prompt in self.prompts], default=0), self.vocab)


def encode(layout: ResultLayout, tokens_N: np.ndarray, logprobs: Logprobs | None) -> list[torch.Tensor]:
    """The tensors of a step's results: int64 [1 + N], the step's number and its tokens; where log-probabilities are
    asked for, also their int64 [L, 2 + K] and float32 [L, 1 + K].
    """
    head = torch.empty(1 + len(tokens_N), dtype=torch.int64)
    head[0] = layout.step
    head[1:] = torch.from_numpy(tokens_N)
    return [head] if logprobs is None else [head, logprobs.ids, logprobs.values]


def blank(layout: ResultLayout, device: torch.device | None = None) -> list[torch.Tensor]:
    """Tensors to receive what `encode` sent for the same layout, on the host unless a device is named."""
    head = torch.empty(1 + len(layout.slots_N), dtype=torch.int64, device=device)
    if layout.rows == 0:
        return [head]
    room = Logprobs.empty(layout.rows, layout.top, device)
    return [head, room.ids, room.values]


def tokens_of(layout: ResultLayout, tensors: Sequence[torch.Tensor]) -> np.ndarray:
    """The sampled tokens, int64 [N]."""
    head: np.ndarray = tensors[0].numpy()
    assert head[0] == layout.step, f"expected the results of step {layout.step}, got those of step {head[0]}"
    return head[1:]


def decode(layout: ResultLayout, tensors: Sequence[torch.Tensor]) -> StepResult:
    """What the scheduler is told. A prompt position's `index` is the position of its token in the sequence."""
    result = StepResult(layout.step, tokens_of(layout, tensors).tolist())
    if len(tensors) == 1:
        return result
    ids, values = tensors[1].tolist(), tensors[2].tolist()

    def row(at: int, index: int, top: int) -> SampledLogprobs:
        token, rank, *highest = ids[at]
        return SampledLogprobs(index, token, values[at][0], rank, highest[:top], values[at][1 : 1 + top])

    asked = layout.asked.tolist()
    result.logprobs = [row(at, index, layout.tops[at]) for at, index in enumerate(asked)]
    at = len(asked)
    for prompt in layout.prompts:
        count = len(prompt.targets)
        positions = [row(at + i, prompt.first + i, prompt.top) for i in range(count)]
        result.prompt_logprobs.append((prompt.slot, positions))
        at += count
    return result
