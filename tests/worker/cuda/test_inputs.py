"""Where a step's numbers lie on the device."""

from __future__ import annotations

import numpy as np
import torch

from arriero_worker.engine.messages import SamplingParams
from arriero_worker.engine.step import Admit, Chunk, Grow, StepPlan
from arriero_worker.model.forward import ForwardBatch
from arriero_worker.runner.batch import BatchState
from arriero_worker.runner.device.inputs import StepInputs
from arriero_worker.runner.device.streams import streams_of

FIELDS = ("query_starts_B1", "context_lengths_B", "positions_T", "slots_T", "tokens_T", "block_tables_BP")


def made(device: torch.device) -> tuple[BatchState, StepInputs]:
    state = BatchState(8, 64, 4)
    return state, StepInputs(
        streams_of(device), device, max_running=8, max_batch_tokens=16, max_context=64, block_size=4
    )


def admitted(state: BatchState, count: int) -> StepPlan:
    """One sequence of three tokens in each slot, as chunks that sample."""
    sampling = SamplingParams(max_tokens=9)
    return StepPlan(
        0,
        admits=[Admit(slot, [slot, slot + 10, slot + 20], 3, sampling) for slot in range(count)],
        grows=[Grow(slot, [2 * slot, 2 * slot + 1]) for slot in range(count)],
        chunks=[Chunk(slot, 0, 3, True) for slot in range(count)],
    )


def addresses(batch: ForwardBatch) -> list[int]:
    return [getattr(batch, name).data_ptr() for name in FIELDS]


def test_decodes_are_padded_to_their_bucket_at_the_places_its_graph_reads(device: torch.device) -> None:
    state, inputs = made(device)
    captured = {bucket: addresses(inputs.bucket_batch(bucket)) for bucket in (2, 4, 8)}
    inputs.buckets = [2, 4, 8]
    last_S = torch.arange(100, 108, dtype=torch.int32, device=device)
    inputs.place(state.apply(admitted(state, 5)), last_S)
    for count, bucket in ((1, 2), (2, 2), (3, 4), (5, 8)):
        slots = np.arange(count, dtype="<i4")[::-1].copy()
        step = state.apply(StepPlan(1, slots.tobytes()))
        placed = inputs.place(step, last_S)
        batch = placed.forward
        assert addresses(batch) == captured[bucket]
        assert batch.logits_rows_R is None
        assert batch.tokens_T.tolist() == [100 + slot for slot in slots] + [0] * (bucket - count)
        assert batch.slots_T.tolist()[count:] == [-1] * (bucket - count)
        assert batch.context_lengths_B.tolist()[count:] == [0] * (bucket - count)
        assert batch.positions_T.tolist()[count:] == [0] * (bucket - count)
        assert batch.query_starts_B1.tolist() == [*range(count + 1), *[count] * (bucket - count)]
        assert batch.context_lengths_B.tolist()[:count] == step.forward.context_lengths_B.tolist()
        assert batch.block_tables_BP[:count, 0].tolist() == [2 * slot for slot in slots]
        assert placed.gains_N.tolist() == slots.tolist()
        assert placed.positions_N.tolist() == step.positions_N.tolist()


def test_other_batches_are_not_padded(device: torch.device) -> None:
    state, inputs = made(device)
    inputs.buckets = [2, 8]
    last_S = torch.full((8,), 7, dtype=torch.int32, device=device)
    chunks = inputs.place(state.apply(admitted(state, 2)), last_S).forward
    assert chunks.tokens_T.tolist() == [0, 10, 20, 1, 11, 21], "chunks bring their own tokens"
    assert chunks.logits_rows_R is not None
    assert chunks.logits_rows_R.tolist() == [2, 5]
    mixed = StepPlan(
        1,
        np.array([1], dtype="<i4").tobytes(),
        admits=[Admit(2, [5, 6], 2, SamplingParams(max_tokens=9))],
        grows=[Grow(2, [9])],
        chunks=[Chunk(2, 0, 2, True)],
    )
    batch = inputs.place(state.apply(mixed), last_S).forward
    assert batch.tokens_T.tolist() == [5, 6, 7]
    assert batch.query_starts_B1.tolist() == [0, 2, 3]
    assert batch.block_tables_BP.shape[0] == 2


def test_a_bucket_is_captured_with_nothing_but_padding(device: torch.device) -> None:
    state, inputs = made(device)
    inputs.place(state.apply(admitted(state, 5)), None)
    batch = inputs.bucket_batch(4)
    assert batch.slots_T.tolist() == [-1] * 4
    for name in ("query_starts_B1", "context_lengths_B", "positions_T", "tokens_T", "block_tables_BP"):
        assert not getattr(batch, name).any(), name
