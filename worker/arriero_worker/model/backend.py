"""The seam between the model and what computes it.

Legend: T tokens, B sequences, R rows that need logits, H hidden size, N and K a linear's outputs and inputs, A heads on
this rank, D head size.

Activations are torch tensors in `hidden_dtype`, contiguous, on the backend's device; but what a linear reads (`Input`)
is made by the operation before it, which is told the linear, and may come quantised. What an operation returns lives in
the backend's workspace: it holds until the same operation is called again with the same `out` name, so a caller that
keeps a result copies it. One backend serves one rank; calls come from one thread at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from arriero_worker.model.forward import ForwardBatch
from arriero_worker.model.quantized import QuantizedWeight

LinearT = TypeVar("LinearT")
"""A linear's weights as the backend keeps them."""

Input = Any
"""What `Backend.linear` reads, as the backend likes it: only passed on."""

KvLayer = tuple[torch.Tensor, ...]
"""A layer's paged keys and values, first these two; how they are laid out, and what may follow, is the backend's."""


class DeviceError(ValueError):
    """A device that is missing, or that the model does not fit on: one sentence with the numbers."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What attention is on this rank, the same in every layer."""

    heads: int
    kv_heads: int
    head_dim: int
    sliding_window: int | None
    inverse_frequencies: torch.Tensor
    """float32 [D / 2], rotary angles per position."""

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class KvCache:
    """The rank's paged KV, of each layer of its stage."""

    layers: tuple[KvLayer, ...]
    block_size: int

    @property
    def blocks(self) -> int:
        return self.layers[0][0].shape[0]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer)


class Backend(Protocol[LinearT]):
    @property
    def dtype(self) -> torch.dtype:
        """Of weights and KV: float32 or bfloat16."""
        ...

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Of activations, and so of what crosses ranks and stages. The same on every machine of a group."""
        ...

    def pack_linear(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, as_it_is: bool = False) -> LinearT:
        """Take over a weight, in `dtype`, and a bias; the given tensors may be dropped afterwards. `as_it_is`: not
        quantised, even where the backend does that with others.
        """
        ...

    def pack_quantized(self, weight: QuantizedWeight, bias_N: torch.Tensor | None) -> LinearT:
        """Take over a weight that the checkpoint has quantised, as it is or converted to `dtype`. Raises ValueError for
        a format that the backend does not multiply.
        """
        ...

    def pack_table(self, weight_VH: torch.Tensor) -> LinearT:
        """Take over an embedding; a tied head uses it as a linear too."""
        ...

    def pack_head(self, weight_VH: torch.Tensor) -> LinearT:
        """Take over a head of its own, which is never quantised."""
        ...

    def linear_bytes(self, weight: LinearT) -> int:
        """What one pass over the weight reads."""
        ...

    def pack_vector(self, vector: torch.Tensor) -> torch.Tensor:
        """Take over a norm's weight."""
        ...

    def allocate_kv(self, layers: int, kv_blocks: int, block_size: int, attention: AttentionShape) -> KvCache:
        """Zeroed. Raises ValueError where the backend cannot work with these sizes."""
        ...

    def begin(self, batch: ForwardBatch, attention: AttentionShape, block_size: int) -> None:
        """Called once before the operations of a forward pass: what all layers share (rotary angles, work lists)."""
        ...

    def embed(self, tokens_T: torch.Tensor, table_VH: LinearT, first_token: int) -> torch.Tensor:
        """[T, H]: rows of a table that begins at token `first_token`; zeros for tokens outside it."""
        ...

    def add_rms_norm(
        self,
        residual_TH: torch.Tensor,
        delta_TH: torch.Tensor | None,
        weight_H: torch.Tensor,
        eps: float,
        into: LinearT | None = None,
    ) -> Input:
        """[T, H]: residual += delta, in place, then the norm of it, for the linear `into` (None: for the head)."""
        ...

    def add(self, residual_TH: torch.Tensor, delta_TH: torch.Tensor) -> torch.Tensor:
        """residual += delta, in place."""
        ...

    def rows(self, x_TH: torch.Tensor, rows_R: torch.Tensor, out: str) -> torch.Tensor:
        """[R, H]: the rows named."""
        ...

    def linear(self, x_TK: Input, weight: LinearT, out: str) -> torch.Tensor:
        """[T, N]: x @ weight.T + bias, accumulated in float32; x was made for this weight."""
        ...

    def rope_and_store(self, qkv: torch.Tensor, layer: KvLayer, batch: ForwardBatch) -> None:
        """qkv [T, (A + 2 * kv heads) * D]: turn queries (in place) and keys by their positions, write keys and values
        to the batch's slots.
        """
        ...

    def attention(self, qkv: torch.Tensor, layer: KvLayer, batch: ForwardBatch, into: LinearT | None = None) -> Input:
        """[T, A * D]: causal attention of the queries over each sequence's paged KV, scaled by D ** -0.5, for the
        linear `into`.
        """
        ...

    def silu_mul(self, gate_up: torch.Tensor, into: LinearT | None = None) -> Input:
        """[T, I] from [T, 2 * I]: silu(first half) * second half, for the linear `into`."""
        ...

    def logits(self, x_RH: Input, head: LinearT) -> torch.Tensor:
        """float32 [R, V] of this rank's part of the vocabulary."""
        ...

    def warm(self) -> None:
        """Load or compile every kernel, so that the first request does not wait for it."""
        ...

    def close(self) -> None:
        """End the backend's threads; it must not be used afterwards."""
        ...


AnyBackend = Backend[Any]


@dataclass(slots=True)
class LayerWeights(Generic[LinearT]):
    """One layer's weights, packed: q, k, v one under the other, and gate above up."""

    input_norm: torch.Tensor
    qkv: LinearT
    o: LinearT
    post_attention_norm: torch.Tensor
    gate_up: LinearT
    down: LinearT


@dataclass(slots=True)
class StageWeights(Generic[LinearT]):
    """A rank's weights. `embedding` on the first stage, `final_norm` and `head` on the last, else None."""

    layers: list[LayerWeights[LinearT]]
    embedding: LinearT | None
    final_norm: torch.Tensor | None
    head: LinearT | None
