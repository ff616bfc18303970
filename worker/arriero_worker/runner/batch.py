"""What a rank remembers of its running sequences, and the micro-batch it makes of a step plan.

Everything a decode needs is in arrays indexed by slot, so a step of a thousand decodes is a handful of array
operations, without Python per sequence. Arrays live in host memory (this is the cpu backend's state).

Legend: S slots, T tokens, B sequences, P block-table width, R logits rows, N sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from arriero_worker.engine.step import Admit, Chunk, StepPlan
from arriero_worker.model.forward import ForwardBatch

_SEED_BITS = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class PromptRows:
    """The logits rows of a chunk that predict tokens of the prompt: positions [first, first + count) of the slot."""

    slot: int
    first: int
    targets: np.ndarray
    """int64 [count], the prompt's tokens there."""
    top: int
    """How many of the highest log-probabilities are asked for."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step plan made concrete. The R logits rows are the N sampled ones, then the `prompts` rows in order."""

    number: int
    forward: ForwardBatch
    slots_N: np.ndarray
    """int64, the slots that gain a token, in the order of `StepResult.tokens`."""
    positions_N: np.ndarray
    """int64, the position of each sampled token in its sequence."""
    prompts: list[PromptRows]
    decodes: np.ndarray
    """int64, the slots that decode: theirs are the last tokens of the batch, and the last sampled but for prompts'."""


class BatchState:
    """The slots of one rank for one epoch. Not thread-safe.

    `apply` is called with every plan of the epoch, in order, on every rank; `store` gives the sampled tokens to the
    ranks that feed or continue them, in the order of their steps.
    """

    def __init__(self, max_running: int, max_context: int, block_size: int) -> None:
        self.block_size = block_size
        self._width = -(-max_context // block_size)
        self._tables_SP = np.zeros((max_running, self._width), dtype=np.int32)
        self._tables = torch.from_numpy(self._tables_SP)
        self._blocks_S = np.zeros(max_running, dtype=np.int64)
        self._known: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * max_running
        """Tokens each slot was admitted with."""
        self._lengths_S = np.zeros(max_running, dtype=np.int64)
        self._last_S = np.zeros(max_running, dtype=np.int64)
        self._admitted_S = np.full(max_running, -1, dtype=np.int64)
        """The step that admitted each slot's sequence."""
        self.prompt_lengths_S = np.zeros(max_running, dtype=np.int64)
        self.seeds_S = np.zeros(max_running, dtype=np.uint64)
        self.temperatures_S = np.zeros(max_running, dtype=np.float32)
        self.top_ks_S = np.zeros(max_running, dtype=np.int64)
        self.top_ps_S = np.ones(max_running, dtype=np.float64)
        self.min_ps_S = np.zeros(max_running, dtype=np.float64)
        self.logprobs_S = np.full(max_running, -1, dtype=np.int64)
        self.prompt_logprobs_S = np.full(max_running, -1, dtype=np.int64)

    def apply(self, plan: StepPlan) -> Step:
        """Take in admits and grows, give every sampled slot its next position, and lay out the micro-batch.

        The tokens that decodes feed must be stored before (on stage 0; elsewhere they are not read).
        """
        for admit in plan.admits:
            self._admit(plan.step, admit)
        for grow in plan.grows:
            at = int(self._blocks_S[grow.slot])
            end = at + len(grow.blocks)
            assert end <= self._width, f"slot {grow.slot} grows to {end} blocks; its table holds {self._width}"
            self._tables_SP[grow.slot, at:end] = grow.blocks
            self._blocks_S[grow.slot] = end
        return self._lay_out(plan)

    def store(self, step: int, slots_N: np.ndarray, tokens_N: np.ndarray) -> None:
        """Keep what a step sampled as the tokens to feed next.

        A slot that a later step gave to another sequence keeps what that one was admitted with.
        """
        current = self._admitted_S.take(slots_N) <= step
        if current.all():
            self._last_S[slots_N] = tokens_N
        else:
            self._last_S[slots_N[current]] = tokens_N[current]

    def _admit(self, step: int, admit: Admit) -> None:
        slot, sampling = admit.slot, admit.sampling
        tokens = np.array(admit.tokens, dtype=np.int64)
        self._known[slot] = tokens
        self._lengths_S[slot] = len(tokens)
        self._last_S[slot] = tokens[-1]
        self._blocks_S[slot] = 0
        self._admitted_S[slot] = step
        self.prompt_lengths_S[slot] = admit.prompt_length
        self.seeds_S[slot] = sampling.seed & _SEED_BITS
        self.temperatures_S[slot] = sampling.temperature
        self.top_ks_S[slot] = sampling.top_k
        self.top_ps_S[slot] = sampling.top_p
        self.min_ps_S[slot] = sampling.min_p
        self.logprobs_S[slot] = sampling.logprobs
        self.prompt_logprobs_S[slot] = sampling.prompt_logprobs

    def _lay_out(self, plan: StepPlan) -> Step:
        decodes = np.frombuffer(plan.decodes, dtype="<i4").astype(np.int64)
        chunks = plan.chunks
        in_chunks = sum(chunk.length for chunk in chunks)
        count, total = len(chunks) + len(decodes), in_chunks + len(decodes)
        assert total > 0, f"step {plan.step} has nothing to compute"
        tokens_T = np.empty(total, dtype=np.int64)
        positions_T = np.empty(total, dtype=np.int64)
        cache_T = np.empty(total, dtype=np.int64)
        starts_B1 = np.empty(count + 1, dtype=np.int32)
        contexts_B = np.empty(count, dtype=np.int32)

        lengths = self._lengths_S.take(decodes)
        tokens_T[in_chunks:] = self._last_S.take(decodes)
        np.subtract(lengths, 1, out=positions_T[in_chunks:])
        starts_B1[len(chunks) :] = np.arange(in_chunks, total + 1, dtype=np.int32)
        contexts_B[len(chunks) :] = lengths
        self._cache_slots(decodes, positions_T[in_chunks:], cache_T[in_chunks:])

        sampled: list[Chunk] = []
        rows: list[int] = []
        prompts: list[PromptRows] = []
        prompt_rows: list[np.ndarray] = []
        at = 0
        for i, chunk in enumerate(chunks):
            slot, start, end = chunk.slot, chunk.start, chunk.start + chunk.length
            known = self._known[slot]
            assert 0 <= start < end <= len(known), (
                f"step {plan.step} computes tokens [{start}, {end}) of slot {slot}, which has {len(known)}"
            )
            span = slice(at, at + chunk.length)
            tokens_T[span] = known[start:end]
            positions_T[span] = np.arange(start, end)
            self._cache_slots(slot, positions_T[span], cache_T[span])
            starts_B1[i] = at
            contexts_B[i] = end
            if chunk.sample:
                sampled.append(chunk)
                rows.append(at + chunk.length - 1)
            if chunk.prompt_logprobs:
                last = min(end, int(self.prompt_lengths_S[slot]) - 1)
                if last > start:
                    top = max(int(self.prompt_logprobs_S[slot]), 0)
                    prompts.append(PromptRows(slot, start + 1, known[start + 1 : last + 1], top))
                    prompt_rows.append(np.arange(at, at + last - start))
            at += chunk.length

        slots_N, positions_N, rows_R = decodes, lengths, np.arange(in_chunks, total)
        tables_of = decodes
        if chunks:
            slots_N = np.concatenate([np.array([chunk.slot for chunk in sampled], dtype=np.int64), decodes])
            ends = np.array([chunk.start + chunk.length for chunk in sampled], dtype=np.int64)
            positions_N = np.concatenate([ends, lengths])
            rows_R = np.concatenate([np.array(rows, dtype=np.int64), rows_R, *prompt_rows])
            tables_of = np.concatenate([np.array([chunk.slot for chunk in chunks], dtype=np.int64), decodes])
        self._lengths_S[slots_N] = positions_N + 1
        # A token without a block would write over another sequence's KV.
        assert (contexts_B <= self._blocks_S.take(tables_of) * self.block_size).all(), (
            f"step {plan.step} computes tokens beyond their slots' blocks"
        )

        width = -(-int(contexts_B.max()) // self.block_size)
        forward = ForwardBatch(
            tokens_T=torch.from_numpy(tokens_T),
            positions_T=torch.from_numpy(positions_T),
            slots_T=torch.from_numpy(cache_T),
            query_starts_B1=torch.from_numpy(starts_B1),
            context_lengths_B=torch.from_numpy(contexts_B),
            block_tables_BP=self._tables[:, :width].index_select(0, torch.from_numpy(tables_of)),
            logits_rows_R=torch.from_numpy(rows_R),
        )
        return Step(plan.step, forward, slots_N, positions_N, prompts, decodes)

    def _cache_slots(self, slots: np.ndarray | int, positions: np.ndarray, out: np.ndarray) -> None:
        """Where the KV at `positions` of `slots` goes."""
        blocks, offsets = np.divmod(positions, self.block_size)
        np.multiply(self._tables_SP.reshape(-1).take(slots * self._width + blocks), self.block_size, out=out)
        out += offsets
