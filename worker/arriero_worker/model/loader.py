"""A rank's weights, from a checkpoint or drawn at random, handed to the backend tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from arriero_plan.model import ModelShape
from arriero_worker.model.backend import Backend, LayerWeights, StageWeights
from arriero_worker.model.checkpoint import Checkpoint, CheckpointError, read_shape, weights_digest
from arriero_worker.model.shard import FINAL_NORM, Shard, TensorSlice

__all__ = ["CheckpointError", "load_weights", "random_weights", "read_shape", "weights_digest"]

LinearT = TypeVar("LinearT")
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total, those of this rank's slices."""


def load_weights(
    directory: Path, shape: ModelShape, shard: Shard, backend: Backend[LinearT], progress: Progress | None = None
) -> StageWeights[LinearT]:
    """Read the rank's slices and nothing else, converted to the backend's dtype. All tensors are checked before the
    first is read. At no time are more than one layer's tensors held twice. Raises CheckpointError, ShardError.
    """
    shard.check(shape)
    checkpoint = Checkpoint(directory)
    total = sum(checkpoint.stored_bytes(part) for part in shard.slices(shape))
    done = 0

    def read(part: TensorSlice) -> torch.Tensor:
        nonlocal done
        stored = checkpoint.read(part)
        done += stored.numel() * stored.element_size()
        tensor = _padded(stored.to(backend.dtype), part)
        if progress is not None:
            progress(done, total)
        return tensor

    if progress is not None:
        progress(0, total)
    try:
        return _build(read, shape, shard, backend)
    finally:
        checkpoint.close()


def random_weights(shape: ModelShape, shard: Shard, backend: Backend[LinearT], seed: int = 0) -> StageWeights[LinearT]:
    """Weights of the right shapes and sensible sizes, for benchmarks that need no file. Each rank draws its own: the
    ranks of a group do not hold slices of one model.
    """
    shard.check(shape)
    generator = torch.Generator().manual_seed(seed)

    def draw(part: TensorSlice) -> torch.Tensor:
        size = part.local_shape
        if len(size) == 1:
            return torch.ones(size, dtype=backend.dtype)
        # Uniform, as drawing normals for a billion weights takes longer than the benchmark.
        scale = (3.0 / size[1]) ** 0.5
        return torch.empty(size, dtype=backend.dtype).uniform_(-scale, scale, generator=generator)

    return _build(draw, shape, shard, backend)


def _padded(stored: torch.Tensor, part: TensorSlice) -> torch.Tensor:
    if stored.shape == part.local_shape:
        return stored
    tensor = stored.new_zeros(part.local_shape)
    tensor[: len(stored)] = stored
    return tensor


def _build(
    read: Callable[[TensorSlice], torch.Tensor], shape: ModelShape, shard: Shard, backend: Backend[LinearT]
) -> StageWeights[LinearT]:
    embedding = head = final_norm = None
    if shard.first:
        embedding = backend.pack_table(read(shard.embedding_slice(shape)))
    layers = [_layer(read, shape, shard, layer, backend) for layer in range(shard.first_layer, shard.end_layer)]
    if shard.last:
        final_norm = backend.pack_vector(read(TensorSlice(FINAL_NORM, (shape.hidden_size,), 0, 0, shape.hidden_size)))
        tied = shape.tie_word_embeddings and embedding is not None
        head = embedding if tied else backend.pack_head(read(shard.head_slice(shape)))
    return StageWeights(layers, embedding, final_norm, head)


def _layer(
    read: Callable[[TensorSlice], torch.Tensor], shape: ModelShape, shard: Shard, layer: int, backend: Backend[LinearT]
) -> LayerWeights[LinearT]:
    slices = shard.layer_slices(shape, layer)

    def stacked(*names: str) -> LinearT:
        weight = torch.cat([read(slices[f"{name}.weight"]) for name in names])
        biases = [read(slices[f"{name}.bias"]) for name in names if f"{name}.bias" in slices]
        return backend.pack_linear(weight, torch.cat(biases) if biases else None)

    def summed(name: str) -> LinearT:
        """A linear whose result is summed over the ranks: the bias must enter once."""
        weight = read(slices[f"{name}.weight"])
        bias = read(slices[f"{name}.bias"]) if f"{name}.bias" in slices else None
        return backend.pack_linear(weight, bias if shard.tp_rank == 0 else None)

    return LayerWeights(
        input_norm=backend.pack_vector(read(slices["input_layernorm.weight"])),
        qkv=stacked("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        o=summed("self_attn.o_proj"),
        post_attention_norm=backend.pack_vector(read(slices["post_attention_layernorm.weight"])),
        gate_up=stacked("mlp.gate_proj", "mlp.up_proj"),
        down=summed("mlp.down_proj"),
    )
