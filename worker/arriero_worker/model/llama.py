"""Llama, written once over the backend seam.

Legend: T tokens, H hidden size, R rows that need logits, V vocabulary, D head size.
"""

from __future__ import annotations

import math

import torch

from arriero_plan.model import ModelShape
from arriero_worker.group.comm import Communicator
from arriero_worker.model.backend import AnyBackend, AttentionShape, KvCache, StageWeights
from arriero_worker.model.forward import ForwardBatch
from arriero_worker.model.shard import Shard


def inverse_frequencies(shape: ModelShape) -> torch.Tensor:
    """float32 [D / 2]: rotary angle per position, bit for bit as transformers computes it (`modeling_rope_utils`)."""
    d = shape.head_dim
    inverse = 1.0 / (shape.rope_theta ** (torch.arange(0, d, 2, dtype=torch.int64).to(torch.float32) / d))
    scaling = shape.rope_scaling
    if scaling is None:
        return inverse
    original = scaling.original_max_position_embeddings
    longest_kept = original / scaling.high_freq_factor
    shortest_stretched = original / scaling.low_freq_factor
    wavelength = 2 * math.pi / inverse
    stretched = torch.where(wavelength > shortest_stretched, inverse / scaling.factor, inverse)
    smooth = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    is_between = ~(wavelength < longest_kept) * ~(wavelength > shortest_stretched)
    return torch.where(is_between, between, stretched)


class LlamaStage:
    """The layers of one rank. Every rank of a stage gets the same batch and makes the same calls of `comm`."""

    def __init__(
        self, shape: ModelShape, shard: Shard, weights: StageWeights[object], backend: AnyBackend, comm: Communicator
    ) -> None:
        shard.check(shape)
        assert (weights.embedding is not None) == shard.first, "the embedding is the first stage's"
        assert (weights.head is not None) == (weights.final_norm is not None) == shard.last, "the head is the last's"
        assert len(weights.layers) == shard.end_layer - shard.first_layer, "weights of each of the stage's layers"
        self.shape, self.shard, self.weights, self.backend, self.comm = shape, shard, weights, backend, comm
        self.attention = AttentionShape(
            shard.heads(shape),
            shard.kv_heads(shape),
            shape.head_dim,
            shape.sliding_window,
            inverse_frequencies(shape),
        )
        self._first_token = shard.first_token(shape)

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Of the [T, H] tensor that crosses a stage boundary."""
        return self.backend.hidden_dtype

    def allocate_kv(self, kv_blocks: int, block_size: int) -> KvCache:
        return self.backend.allocate_kv(len(self.weights.layers), kv_blocks, block_size, self.attention)

    def forward(self, batch: ForwardBatch, kv: KvCache, hidden_TH: torch.Tensor | None = None) -> torch.Tensor:
        """Run the stage's layers over a micro-batch, writing its KV.

        `hidden_TH`: what the previous stage returned, in `hidden_dtype`, contiguous; it is overwritten. None on the
        first stage. Returns [T, H] in `hidden_dtype` for the next stage, or on the last stage float32 logits [R, V],
        whole on every tensor rank. The result is overwritten by the next call.
        """
        backend, weights = self.backend, self.weights
        assert hidden_TH is None or (hidden_TH.dtype == backend.hidden_dtype and hidden_TH.is_contiguous())
        backend.begin(batch, self.attention, kv.block_size)
        residual_TH = self._embed(batch) if hidden_TH is None else hidden_TH
        delta_TH: torch.Tensor | None = None
        eps = self.shape.rms_norm_eps
        for layer, layer_kv in zip(weights.layers, kv.layers, strict=True):
            x_TH = backend.add_rms_norm(residual_TH, delta_TH, layer.input_norm, eps, layer.qkv)
            qkv = backend.linear(x_TH, layer.qkv, "qkv")
            backend.rope_and_store(qkv, layer_kv, batch)
            attended = backend.attention(qkv, layer_kv, batch, layer.o)
            delta_TH = self._sum(backend.linear(attended, layer.o, "delta"))
            x_TH = backend.add_rms_norm(residual_TH, delta_TH, layer.post_attention_norm, eps, layer.gate_up)
            gate_up = backend.linear(x_TH, layer.gate_up, "gate_up")
            delta_TH = self._sum(backend.linear(backend.silu_mul(gate_up, layer.down), layer.down, "delta"))
        assert delta_TH is not None, "a stage has a layer"
        if not self.shard.last:
            return backend.add(residual_TH, delta_TH)
        return self._logits(batch, residual_TH, delta_TH)

    def _embed(self, batch: ForwardBatch) -> torch.Tensor:
        assert self.weights.embedding is not None, "a later stage is given hidden states"
        return self._sum(self.backend.embed(batch.tokens_T, self.weights.embedding, self._first_token))

    def _sum(self, part: torch.Tensor) -> torch.Tensor:
        """Over the tensor ranks."""
        return part if self.shard.tensor == 1 else self.comm.all_reduce(part)

    def _logits(self, batch: ForwardBatch, residual_TH: torch.Tensor, delta_TH: torch.Tensor) -> torch.Tensor:
        backend, weights, rows_R = self.backend, self.weights, batch.logits_rows_R
        assert weights.final_norm is not None
        if rows_R is not None:
            residual_TH = backend.rows(residual_TH, rows_R, "last_residual")
            delta_TH = backend.rows(delta_TH, rows_R, "last_delta")
        x_RH = backend.add_rms_norm(residual_TH, delta_TH, weights.final_norm, self.shape.rms_norm_eps)
        logits_RV = backend.logits(x_RH, weights.head)
        if self.shard.tensor == 1:
            return logits_RV
        return self.comm.all_gather(logits_RV)[:, : self.shape.vocab_size]
