"""What one rank holds of a Llama: its layers, and its slice of each of their tensors.

Query heads, key/value heads and the intermediate width are split over the tensor ranks; where there are fewer KV heads
than ranks, each KV head is on several. Embedding and head are split by vocabulary, padded to equal parts. Norms are
whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from arriero_plan.launch import Layout
from arriero_plan.model import ModelShape

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

FLOATS = frozenset({"F32", "BF16", "F16"})
"""What safetensors calls the dtypes of weights that are not quantised."""


class ShardError(ValueError):
    """A model that cannot be split as asked; the message names the number that does not divide."""


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A rank's part of one tensor of the checkpoint: [start, stop) along `dim`, all of it along the others.

    A `stop` beyond the tensor's size means rows of zeros behind it.
    """

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor, as the checkpoint must have it."""
    dim: int
    start: int
    stop: int
    dtypes: frozenset[str] = FLOATS
    """As which of safetensors' dtypes it may be stored."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of the part, its zeros included."""
        if not self.shape:
            return ()
        sizes = list(self.shape)
        sizes[self.dim] = self.stop - self.start
        return tuple(sizes)

    @property
    def stored(self) -> tuple[int, int]:
        """The part that exists in the checkpoint, without zeros; empty where all of it is padding."""
        size = self.shape[self.dim]
        return min(self.start, size), min(self.stop, size)

    @property
    def stored_elements(self) -> int:
        if not self.shape:
            return 1
        start, stop = self.stored
        count = stop - start
        for dim, size in enumerate(self.shape):
            if dim != self.dim:
                count *= size
        return count


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's place in the group: layers [first_layer, end_layer), part `tp_rank` of `tensor`."""

    stage: int
    pipeline: int
    tp_rank: int
    tensor: int
    first_layer: int
    end_layer: int

    @classmethod
    def of(cls, layout: Layout, rank: int) -> Shard:
        stage, tp_rank = divmod(rank, layout.tensor)
        layers = layout.stages[stage]
        return cls(stage, layout.pipeline, tp_rank, layout.tensor, layers.first_layer, layers.end_layer)

    @property
    def first(self) -> bool:
        """Holds the embedding."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Holds the final norm and the head."""
        return self.stage == self.pipeline - 1

    def check(self, shape: ModelShape) -> None:
        """Raises ShardError where the model cannot be split this way."""
        if self.end_layer > shape.num_layers:
            raise ShardError(f"layers up to {self.end_layer} asked for, the model has {shape.num_layers}")
        for what, size in (("attention heads", shape.num_heads), ("intermediate_size", shape.intermediate_size)):
            if size % self.tensor:
                raise ShardError(f"tensor {self.tensor} does not divide the model's {what} ({size})")
        if shape.num_kv_heads % self.tensor and self.tensor % shape.num_kv_heads:
            raise ShardError(
                f"tensor {self.tensor} neither divides the model's KV heads ({shape.num_kv_heads}) "
                "nor is a multiple of them"
            )

    def heads(self, shape: ModelShape) -> int:
        return shape.num_heads // self.tensor

    def kv_heads(self, shape: ModelShape) -> int:
        return max(1, shape.num_kv_heads // self.tensor)

    def first_kv_head(self, shape: ModelShape) -> int:
        return self.tp_rank * shape.num_kv_heads // self.tensor

    def intermediate(self, shape: ModelShape) -> int:
        return shape.intermediate_size // self.tensor

    def vocab(self, shape: ModelShape) -> int:
        """Rows of embedding and head on each rank, padding included."""
        return -(-shape.vocab_size // self.tensor)

    def first_token(self, shape: ModelShape) -> int:
        return self.tp_rank * self.vocab(shape)

    def embedding_slice(self, shape: ModelShape) -> TensorSlice:
        return self._vocab_rows(EMBEDDING, shape)

    def head_slice(self, shape: ModelShape) -> TensorSlice:
        """Of the head's own tensor, or of the embedding where they are tied."""
        return self._vocab_rows(EMBEDDING if shape.tie_word_embeddings else HEAD, shape)

    def _vocab_rows(self, name: str, shape: ModelShape) -> TensorSlice:
        rows, start = self.vocab(shape), self.first_token(shape)
        return TensorSlice(name, (shape.vocab_size, shape.hidden_size), 0, start, start + rows)

    def layer_slices(self, shape: ModelShape, layer: int) -> dict[str, TensorSlice]:
        """By name within the layer, e.g. `self_attn.q_proj.weight`."""
        hidden, d = shape.hidden_size, shape.head_dim
        q_rows = self.heads(shape) * d
        kv_start, kv_rows = self.first_kv_head(shape) * d, self.kv_heads(shape) * d
        mlp_rows = self.intermediate(shape)
        q = (self.tp_rank * q_rows, (self.tp_rank + 1) * q_rows)
        kv = (kv_start, kv_start + kv_rows)
        mlp = (self.tp_rank * mlp_rows, (self.tp_rank + 1) * mlp_rows)
        slices: dict[str, TensorSlice] = {}

        def add(name: str, sizes: tuple[int, ...], dim: int, part: tuple[int, int]) -> None:
            slices[name] = TensorSlice(f"model.layers.{layer}.{name}", sizes, dim, *part)

        def add_linear(name: str, rows: int, columns: int, dim: int, part: tuple[int, int], bias: bool) -> None:
            add(f"{name}.weight", (rows, columns), dim, part)
            if bias:
                add(f"{name}.bias", (rows,), 0, part if dim == 0 else (0, rows))

        add("input_layernorm.weight", (hidden,), 0, (0, hidden))
        add("post_attention_layernorm.weight", (hidden,), 0, (0, hidden))
        add_linear("self_attn.q_proj", shape.q_size, hidden, 0, q, shape.attention_bias)
        add_linear("self_attn.k_proj", shape.kv_size, hidden, 0, kv, shape.attention_bias)
        add_linear("self_attn.v_proj", shape.kv_size, hidden, 0, kv, shape.attention_bias)
        add_linear("self_attn.o_proj", hidden, shape.q_size, 1, q, shape.attention_bias)
        add_linear("mlp.gate_proj", shape.intermediate_size, hidden, 0, mlp, shape.mlp_bias)
        add_linear("mlp.up_proj", shape.intermediate_size, hidden, 0, mlp, shape.mlp_bias)
        add_linear("mlp.down_proj", hidden, shape.intermediate_size, 1, mlp, shape.mlp_bias)
        return slices

    def linear_slices(self, shape: ModelShape) -> Iterator[TensorSlice]:
        """The weights of the layers' linears."""
        for layer in range(self.first_layer, self.end_layer):
            yield from (part for part in self.layer_slices(shape, layer).values() if part.name.endswith("_proj.weight"))

    def slices(self, shape: ModelShape) -> Iterator[TensorSlice]:
        """All that this rank reads, each once."""
        hidden = shape.hidden_size
        if self.first:
            yield self.embedding_slice(shape)
        for layer in range(self.first_layer, self.end_layer):
            yield from self.layer_slices(shape, layer).values()
        if self.last:
            yield TensorSlice(FINAL_NORM, (hidden,), 0, 0, hidden)
            if not (shape.tie_word_embeddings and self.first):
                yield self.head_slice(shape)
