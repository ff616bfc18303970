"""CUDA graphs of a stage's decodes: one for each bucket of sequences, attention inside.

A graph reads its inputs from fixed places (`StepInputs.bucket_batch`) and lengths from device memory, so one serves
every batch of at most as many sequences. All graphs share one memory pool: they never run at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from arriero_worker.model.backend import KvCache
from arriero_worker.model.forward import ForwardBatch
from arriero_worker.model.llama import LlamaStage
from arriero_worker.runner.device.inputs import StepInputs

Progress = Callable[[int, int], None]
"""Called with graphs captured and graphs in all."""


def buckets_up_to(sequences: int) -> list[int]:
    """1, 2, 4, 8, then in steps of an eighth to a quarter of their size, so that padding costs little."""
    found, size = [], 1
    while size < sequences:
        found.append(size)
        step = 8 if size < 64 else 16 if size < 256 else 32 if size < 512 else 64
        size = 2 * size if size < 8 else size + step
    return [*found, sequences]


class GraphedStage:
    """A stage whose decodes run as graphs; all else runs as it is. `forward` is that of `LlamaStage`."""

    def __init__(self, stage: LlamaStage, inputs: StepInputs) -> None:
        self._stage, self._inputs = stage, inputs
        self._graphs: dict[int, tuple[Any, torch.Tensor]] = {}
        self._kv: KvCache | None = None
        self._hidden_TH: torch.Tensor | None = None

    def capture(self, buckets: Iterable[int], kv: KvCache, device: torch.device, progress: Progress) -> None:
        """The largest first, whose memory the others then share."""
        descending = sorted(buckets, reverse=True)
        self._kv = kv
        if not self._stage.shard.first:
            size = (descending[0], self._stage.shape.hidden_size)
            self._hidden_TH = torch.zeros(size, dtype=self._stage.hidden_dtype, device=device)
        pool = torch.cuda.graph_pool_handle()
        with torch.no_grad():
            for done, bucket in enumerate(descending):
                batch = self._inputs.bucket_batch(bucket)
                self._run(batch, kv)  # what must not happen inside a graph: compiling, libraries' first calls
                torch.cuda.synchronize(device)
                graph = torch.cuda.CUDAGraph()
                # Other threads may ask the driver for memory's state meanwhile.
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    output = self._run(batch, kv)
                self._graphs[bucket] = (graph, output)
                progress(done + 1, len(descending))
        self._inputs.buckets = sorted(self._graphs)

    def _run(self, batch: ForwardBatch, kv: KvCache) -> torch.Tensor:
        hidden = None if self._hidden_TH is None else self._hidden_TH[: len(batch.positions_T)]
        return self._stage.forward(batch, kv, hidden)

    def forward(self, batch: ForwardBatch, kv: KvCache, hidden_TH: torch.Tensor | None = None) -> torch.Tensor:
        found = self._graphs.get(len(batch.positions_T)) if batch.decodes and batch.logits_rows_R is None else None
        if found is None:
            return self._stage.forward(batch, kv, hidden_TH)
        assert kv is self._kv, "graphs write to the cache that they were captured with"
        graph, output = found
        if hidden_TH is not None:
            assert self._hidden_TH is not None
            self._hidden_TH[: len(hidden_TH)].copy_(hidden_TH)
        graph.replay()
        return output
