"""All ranks of a group in one process, as threads that meet in memory; batches over paged KV with shuffled blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue

import torch

from arriero_plan.launch import Layout, Stage
from arriero_worker.model.backend import KvCache
from arriero_worker.model.cpu.backend import CpuBackend
from arriero_worker.model.forward import ForwardBatch
from arriero_worker.model.llama import LlamaStage
from arriero_worker.model.loader import load_weights, read_shape
from arriero_worker.model.shard import Shard

TIME_LIMIT = 60.0


class ThreadedStage:
    """What the tensor ranks of one stage share."""

    def __init__(self, tensor: int) -> None:
        self.barrier = threading.Barrier(tensor)
        self.parts: list[torch.Tensor | None] = [None] * tensor


class ThreadedCommunicator:
    """A Communicator among threads: sums in rank order in float32."""

    def __init__(
        self, stage: ThreadedStage, tp_rank: int, inbox: SimpleQueue[torch.Tensor], outbox: SimpleQueue[torch.Tensor]
    ) -> None:
        self._stage, self._tp_rank, self._inbox, self._outbox = stage, tp_rank, inbox, outbox

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._stage.parts[self._tp_rank] = x.clone()
        self._stage.barrier.wait(TIME_LIMIT)
        parts = [part for part in self._stage.parts if part is not None]
        self._stage.barrier.wait(TIME_LIMIT)
        return parts

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        assert x.is_contiguous()
        parts = self._exchange(x)
        x.copy_(torch.stack([part.float() for part in parts]).sum(0))
        return x

    def all_gather(self, x_RV: torch.Tensor) -> torch.Tensor:
        assert x_RV.is_contiguous()
        return torch.cat(self._exchange(x_RV), dim=-1)

    def send(self, x: torch.Tensor) -> None:
        self._outbox.put(x.clone())

    def recv(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(self._inbox.get(timeout=TIME_LIMIT))


def even_layout(layers: int, tensor: int, pipeline: int) -> Layout:
    ends = [layers * (i + 1) // pipeline for i in range(pipeline)]
    starts = [0, *ends[:-1]]
    stages = tuple(Stage(first_layer=a, end_layer=b) for a, b in zip(starts, ends, strict=True))
    return Layout(tensor=tensor, pipeline=pipeline, stages=stages)


class ThreadedGroup:
    """A checkpoint served by tensor x pipeline ranks. `forward` gives the last stage's logits, after checking that
    every tensor rank has the same bits.
    """

    def __init__(
        self,
        path: Path,
        *,
        tensor: int = 1,
        pipeline: int = 1,
        dtype: torch.dtype = torch.float32,
        kv_blocks: int = 64,
        block_size: int = 16,
        threads: int = 1,
        backend: Callable[[torch.dtype, int], CpuBackend] = CpuBackend,
    ) -> None:
        self.shape = read_shape(path)
        self.layout = even_layout(self.shape.num_layers, tensor, pipeline)
        stages = [ThreadedStage(tensor) for _ in range(pipeline)]
        pipes: list[list[SimpleQueue[torch.Tensor]]] = [
            [SimpleQueue() for _ in range(tensor)] for _ in range(pipeline + 1)
        ]
        self.ranks: list[LlamaStage] = []
        self.caches: list[KvCache] = []
        for rank in range(self.layout.world):
            shard = Shard.of(self.layout, rank)
            comm = ThreadedCommunicator(
                stages[shard.stage],
                shard.tp_rank,
                pipes[shard.stage][shard.tp_rank],
                pipes[shard.stage + 1][shard.tp_rank],
            )
            rank_backend = backend(dtype, threads)
            weights = load_weights(path, self.shape, shard, rank_backend)
            stage = LlamaStage(self.shape, shard, weights, rank_backend, comm)
            self.ranks.append(stage)
            self.caches.append(stage.allocate_kv(kv_blocks, block_size))

    def close(self) -> None:
        for stage in self.ranks:
            stage.backend.close()

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        results: list[torch.Tensor | BaseException | None] = [None] * len(self.ranks)

        def run(rank: int) -> None:
            try:
                results[rank] = self._rank_forward(rank, batch)
            except BaseException as error:
                results[rank] = error

        if len(self.ranks) == 1:
            run(0)
        else:
            threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(self.ranks))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        last = results[-self.layout.tensor :]
        first = last[0]
        assert isinstance(first, torch.Tensor)
        for other in last[1:]:
            assert isinstance(other, torch.Tensor)
            assert torch.equal(first, other), "tensor ranks disagree"
        return first.clone()

    def _rank_forward(self, rank: int, batch: ForwardBatch) -> torch.Tensor:
        stage = self.ranks[rank]
        hidden = None
        if not stage.shard.first:
            hidden = torch.empty((len(batch.positions_T), self.shape.hidden_size), dtype=stage.hidden_dtype)
            stage.comm.recv(hidden)
        result = stage.forward(batch, self.caches[rank], hidden)
        if not stage.shard.last:
            stage.comm.send(result)
        return result


class Blocks:
    """Hands out KV blocks in a shuffled order, so that no two neighbours are neighbours in memory."""

    def __init__(self, kv_blocks: int, block_size: int, seed: int = 0) -> None:
        order = torch.randperm(kv_blocks, generator=torch.Generator().manual_seed(seed))
        self._free = [int(block) for block in order]
        self.block_size = block_size
        self.tables: dict[int, list[int]] = {}

    def grow(self, sequence: int, length: int) -> list[int]:
        table = self.tables.setdefault(sequence, [])
        while len(table) * self.block_size < length:
            table.append(self._free.pop())
        return table


def make_batch(
    blocks: Blocks, work: Sequence[tuple[int, Sequence[int], int]], logits: Sequence[int] | None = None
) -> ForwardBatch:
    """`work`: (sequence, new tokens, tokens it already has). Logits of all rows unless `logits` names some."""
    tokens, positions, slots, starts, lengths = [], [], [], [0], []
    for sequence, new, past in work:
        table = blocks.grow(sequence, past + len(new))
        tokens += list(new)
        for position in range(past, past + len(new)):
            positions.append(position)
            slots.append(table[position // blocks.block_size] * blocks.block_size + position % blocks.block_size)
        starts.append(len(tokens))
        lengths.append(past + len(new))
    width = max(len(blocks.tables[sequence]) for sequence, _, _ in work)
    # What lies beyond a sequence's context is undefined: a block id that does not exist would crash who reads it.
    table_rows = [(blocks.tables[sequence] + [1 << 30] * width)[:width] for sequence, _, _ in work]
    return ForwardBatch(
        tokens_T=torch.tensor(tokens, dtype=torch.int64),
        positions_T=torch.tensor(positions, dtype=torch.int64),
        slots_T=torch.tensor(slots, dtype=torch.int64),
        query_starts_B1=torch.tensor(starts, dtype=torch.int32),
        context_lengths_B=torch.tensor(lengths, dtype=torch.int32),
        block_tables_BP=torch.tensor(table_rows, dtype=torch.int32),
        logits_rows_R=torch.tensor(range(len(tokens)) if logits is None else logits, dtype=torch.int64),
    )
