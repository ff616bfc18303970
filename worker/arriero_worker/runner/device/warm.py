"""Steps that no request asked for: they have every kernel compiled, every library called and every buffer made before
the first request comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from arriero_plan.launch import EngineSettings
from arriero_worker.engine.messages import SamplingParams
from arriero_worker.engine.step import Admit, Chunk, Grow, StepPlan
from arriero_worker.runner.device.runner import DeviceRunner
from arriero_worker.runner.device.streams import Arrived


class Alone:
    """Communicator and results of a rank without its group: shapes are right, and nothing else is."""

    def __init__(self, tensor: int) -> None:
        self._tensor = tensor

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x_RV: torch.Tensor) -> torch.Tensor:
        return torch.cat([x_RV] * self._tensor, dim=-1)

    def send(self, x: torch.Tensor) -> None:
        """To nobody."""

    def recv(self, x: torch.Tensor) -> torch.Tensor:
        return x.zero_()

    def send_results(self, tensors: Sequence[torch.Tensor]) -> None:
        """To nobody."""

    def expect_results(self, tensors: Sequence[torch.Tensor]) -> Arrived:
        for tensor in tensors:
            tensor.zero_()
        return lambda: None


VARIANTS = (
    SamplingParams(max_tokens=1, temperature=0.0),
    SamplingParams(max_tokens=1, top_k=5, top_p=0.9, min_p=0.1),
    SamplingParams(max_tokens=1, repetition_penalty=1.2, presence_penalty=0.1, logit_bias={0: 1.0}),
    SamplingParams(max_tokens=1, logprobs=0),
    SamplingParams(max_tokens=1, logprobs=1, prompt_logprobs=1),
)


def sizes_up_to(limit: int) -> list[int]:
    """Powers of two, and the limit."""
    return [*(1 << i for i in range((limit - 1).bit_length())), limit] if limit > 1 else [1]


def warm_steps(runner: DeviceRunner, settings: EngineSettings, vocab: int) -> None:
    """Run chunks and decodes of every size that kernels tell apart, the largest first, over a KV cache of one block,
    which all tokens share: what they compute is of no use.
    """
    steps = _Steps(runner, settings, vocab)
    for tokens in reversed(sizes_up_to(settings.max_batch_tokens)):
        steps.prefill(tokens, VARIANTS[0])
    for sequences in reversed(sizes_up_to(settings.max_running)):
        steps.decode(sequences, VARIANTS[0])
        steps.decode(sequences, VARIANTS[1])
    for sampling in VARIANTS:
        steps.prefill(min(8, settings.max_batch_tokens), sampling)
        steps.decode(1, sampling)
    runner.close("warm")


class _Steps:
    def __init__(self, runner: DeviceRunner, settings: EngineSettings, vocab: int) -> None:
        self._runner, self._settings, self._vocab = runner, settings, vocab
        self._step = 0

    def prefill(self, tokens: int, sampling: SamplingParams) -> None:
        """As few sequences as hold so many tokens."""
        longest = self._settings.max_context
        lengths = [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 0)
        self._admit(lengths[: self._settings.max_running], sampling)

    def decode(self, sequences: int, sampling: SamplingParams) -> None:
        self._admit([1] * sequences, sampling)
        self._run(decodes=np.arange(sequences, dtype="<i4").tobytes())

    def _admit(self, lengths: Sequence[int], sampling: SamplingParams) -> None:
        size = self._settings.block_size
        plan: dict[str, Any] = {"admits": [], "grows": [], "chunks": []}
        for slot, length in enumerate(lengths):
            tokens = [i % self._vocab for i in range(length)]
            plan["admits"].append(Admit(slot, tokens, length, sampling))
            plan["grows"].append(Grow(slot, [0] * min(length // size + 1, -(-self._settings.max_context // size))))
            plan["chunks"].append(Chunk(slot, 0, length, True, sampling.prompt_logprobs >= 0))
        self._run(**plan)

    def _run(self, **plan: Any) -> None:
        self._runner.execute(StepPlan(self._step, **plan))
        self._step += 1
