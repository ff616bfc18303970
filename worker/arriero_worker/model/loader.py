"""A rank's weights, from a checkpoint or drawn at random, handed to the backend tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from arriero_plan.model import ModelShape
from arriero_worker.model.backend import Backend, LayerWeights, StageWeights
from arriero_worker.model.checkpoint import (
    Checkpoint,
    CheckpointError,
    quantization_config,
    read_shape,
    weights_digest,
)
from arriero_worker.model.quantized import QuantizedWeight
from arriero_worker.model.shard import FINAL_NORM, Shard, TensorSlice
from arriero_worker.model.stored import StoredLinear, stored_linear

__all__ = ["CheckpointError", "load_weights", "random_weights", "read_shape", "weights_digest"]

LinearT = TypeVar("LinearT")
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total, those of this rank's slices."""


class _Source(Protocol):
    """Where weights come from."""

    def tensor(self, part: TensorSlice) -> torch.Tensor:
        """In the backend's dtype, with the zeros behind it."""
        ...

    def quantized(self, weight: TensorSlice) -> QuantizedWeight | None:
        """A linear layer's weight, where it is stored quantised."""
        ...

    @property
    def keeps(self) -> bool:
        """Weights that are not quantised are meant to stay so."""
        ...


def load_weights(
    directory: Path, shape: ModelShape, shard: Shard, backend: Backend[LinearT], progress: Progress | None = None
) -> StageWeights[LinearT]:
    """Read the rank's slices and nothing else, converted to the backend's dtype, or quantised as they are stored. All
    tensors are checked before the first is read. At no time are more than one layer's tensors held twice. Raises
    CheckpointError, ShardError.
    """
    shard.check(shape)
    source = _Files(directory, shape, shard, backend.dtype, progress)
    try:
        return _build(source, shape, shard, backend)
    finally:
        source.close()


class _Files:
    def __init__(
        self, directory: Path, shape: ModelShape, shard: Shard, dtype: torch.dtype, progress: Progress | None
    ) -> None:
        self._checkpoint, self._dtype, self._progress = Checkpoint(directory), dtype, progress
        self._stored: dict[str, StoredLinear] = {}
        self.keeps = shape.quantization is not None
        linears = {slice_.name for slice_ in shard.linear_slices(shape)} if self.keeps else set()
        config = quantization_config(directory) if self.keeps else {}
        self._done = self._total = 0
        for part in shard.slices(shape):
            if shape.quantization is not None and part.name in linears:
                stored = stored_linear(self._checkpoint, shape.quantization, config, part)
                if stored is not None:
                    self._stored[part.name] = stored
                    self._total += sum(self._checkpoint.stored_bytes(one) for one in stored.parts.values())
                    continue
            self._total += self._checkpoint.stored_bytes(part)
        self._tell(0)

    def tensor(self, part: TensorSlice) -> torch.Tensor:
        return _padded(self._read(part).to(self._dtype), part)

    def quantized(self, weight: TensorSlice) -> QuantizedWeight | None:
        stored = self._stored.get(weight.name)
        return None if stored is None else stored.read(self._read)

    def close(self) -> None:
        self._checkpoint.close()

    def _read(self, part: TensorSlice) -> torch.Tensor:
        stored = self._checkpoint.read(part)
        self._tell(stored.numel() * stored.element_size())
        return stored

    def _tell(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


def random_weights(
    shape: ModelShape,
    shard: Shard,
    backend: Backend[LinearT],
    seed: int = 0,
    device: torch.device | None = None,
) -> StageWeights[LinearT]:
    """Weights of the right shapes and sensible sizes, for benchmarks that need no file, drawn on `device` (None: the
    CPU). Each rank draws its own: the ranks of a group do not hold slices of one model.
    """
    shard.check(shape)
    return _build(_Drawn(backend.dtype, seed, device or torch.device("cpu")), shape, shard, backend)


class _Drawn:
    keeps = False

    def __init__(self, dtype: torch.dtype, seed: int, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._generator = torch.Generator(device).manual_seed(seed)

    def tensor(self, part: TensorSlice) -> torch.Tensor:
        size = part.local_shape
        if len(size) == 1:
            return torch.ones(size, dtype=self._dtype, device=self._device)
        # Uniform, as drawing normals for a billion weights takes longer than the benchmark.
        scale = (3.0 / size[1]) ** 0.5
        empty = torch.empty(size, dtype=self._dtype, device=self._device)
        return empty.uniform_(-scale, scale, generator=self._generator)

    def quantized(self, weight: TensorSlice) -> QuantizedWeight | None:
        return None


def _padded(stored: torch.Tensor, part: TensorSlice) -> torch.Tensor:
    if stored.shape == part.local_shape:
        return stored
    tensor = stored.new_zeros(part.local_shape)
    tensor[: len(stored)] = stored
    return tensor


def _build(source: _Source, shape: ModelShape, shard: Shard, backend: Backend[LinearT]) -> StageWeights[LinearT]:
    embedding = head = final_norm = None
    if shard.first:
        embedding = backend.pack_table(source.tensor(shard.embedding_slice(shape)))
    layers = [_layer(source, shape, shard, layer, backend) for layer in range(shard.first_layer, shard.end_layer)]
    if shard.last:
        norm = TensorSlice(FINAL_NORM, (shape.hidden_size,), 0, 0, shape.hidden_size)
        final_norm = backend.pack_vector(source.tensor(norm))
        tied = shape.tie_word_embeddings and embedding is not None
        head = embedding if tied else backend.pack_head(source.tensor(shard.head_slice(shape)))
    return StageWeights(layers, embedding, final_norm, head)


def _layer(
    source: _Source, shape: ModelShape, shard: Shard, layer: int, backend: Backend[LinearT]
) -> LayerWeights[LinearT]:
    slices = shard.layer_slices(shape, layer)

    def packed(names: tuple[str, ...], bias: torch.Tensor | None) -> LinearT:
        weights = [slices[f"{name}.weight"] for name in names]
        quantized = [found for weight in weights if (found := source.quantized(weight)) is not None]
        if not quantized:
            dense = [source.tensor(weight) for weight in weights]
            return backend.pack_linear(dense[0] if len(dense) == 1 else torch.cat(dense), bias, source.keeps)
        if len(quantized) < len(weights):
            raise CheckpointError(f"{weights[0].name}: of {' and '.join(names)}, some are quantised and some are not")
        try:
            return backend.pack_quantized(QuantizedWeight.stacked(quantized), bias)
        except ValueError as error:
            raise CheckpointError(f"{weights[0].name}: {error}") from error

    def stacked(*names: str) -> LinearT:
        biases = [source.tensor(slices[f"{name}.bias"]) for name in names if f"{name}.bias" in slices]
        return packed(names, torch.cat(biases) if biases else None)

    def summed(name: str) -> LinearT:
        """A linear whose result is summed over the ranks: the bias must enter once."""
        bias = source.tensor(slices[f"{name}.bias"]) if f"{name}.bias" in slices else None
        return packed((name,), bias if shard.tp_rank == 0 else None)

    return LayerWeights(
        input_norm=backend.pack_vector(source.tensor(slices["input_layernorm.weight"])),
        qkv=stacked("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        o=summed("self_attn.o_proj"),
        post_attention_norm=backend.pack_vector(source.tensor(slices["post_attention_layernorm.weight"])),
        gate_up=stacked("mlp.gate_proj", "mlp.up_proj"),
        down=summed("mlp.down_proj"),
    )
