"""How checkpoints store quantised linear layers, and the part of one that a rank reads.

Sources: compressed-tensors (https://github.com/vllm-project/compressed-tensors), AutoAWQ's GEMM layout, AutoGPTQ's
layout, and transformers' `FbgemmFp8Config` and `FineGrainedFP8Config`.

Legend: N outputs, K inputs, G groups of a row's inputs, of the whole layer or of the rank's part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from arriero_plan.model import Quantization
from arriero_worker.model.checkpoint import FLOATS, Checkpoint, CheckpointError
from arriero_worker.model.quantized import BLOCK, QuantizedWeight
from arriero_worker.model.shard import TensorSlice

Read = Callable[[TensorSlice], torch.Tensor]

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which four bits of a word hold each of eight columns, lowest first."""
_PLAIN_ORDER = tuple(range(8))


@dataclass(frozen=True, slots=True)
class StoredLinear:
    """The tensors of one layer that this rank reads, and how a weight is made of them."""

    parts: Mapping[str, TensorSlice]
    build: Callable[[Mapping[str, torch.Tensor]], QuantizedWeight]

    def read(self, read: Read) -> QuantizedWeight:
        return self.build({name: read(part) for name, part in self.parts.items()})


def stored_linear(
    checkpoint: Checkpoint, quantization: Quantization, config: Mapping[str, Any], weight: TensorSlice
) -> StoredLinear | None:
    """How the layer of `weight` (its slice, were it stored as it is) is stored; None: unquantised.

    config: `quantization_config` of config.json. Raises CheckpointError for what cannot be read.
    """
    module = weight.name.removesuffix(".weight")
    if quantization.ignores(module):
        return None
    layer = _Layer(checkpoint, quantization, config, module, weight)
    if quantization.method == "awq":
        return layer.awq()
    if quantization.method == "gptq":
        return layer.gptq()
    if quantization.weights == "int4":
        return layer.packed()
    return layer.eight_bits()


class _Layer:
    def __init__(
        self,
        checkpoint: Checkpoint,
        quantization: Quantization,
        config: Mapping[str, Any],
        module: str,
        weight: TensorSlice,
    ) -> None:
        self._checkpoint, self._quantization, self._config = checkpoint, quantization, config
        self._module, self._weight = module, weight
        self._n, self._k = weight.shape
        self._by_rows = weight.dim == 0
        self._start, self._stop = weight.start, weight.stop
        self._group = quantization.group_size or self._k

    # -- float8 and int8, one number for each weight

    def eight_bits(self) -> StoredLinear:
        """`weight` [N, K]; `weight_scale` of the tensor, or [N] or [N, 1]; or `weight_scale_inv` of blocks."""
        if self._quantization.group_size is not None:
            raise self._error(f"8-bit weights in groups of {self._quantization.group_size} are not supported")
        kind = self._quantization.weights
        codes = self._slice("weight", (self._n, self._k), {"F8_E4M3"} if kind == "fp8" else {"I8"})
        if self._quantization.block is not None:
            return self._blocks(codes)
        name = f"{self._module}.weight_scale"
        shape = self._checkpoint.shape(name)
        if shape not in ((), (1,), (self._n,), (self._n, 1)):
            raise self._error(f"{name} has shape {list(shape)}, expected one scale or {self._n}")
        each_row = self._n > 1 and self._n in shape
        span = (self._start, self._stop) if each_row and self._by_rows else (0, shape[0] if shape else 1)
        scale = TensorSlice(name, shape, 0, *span, FLOATS)
        rows = codes.local_shape[0]

        def build(tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
            scales = tensors["scale"].float().reshape(-1).expand(rows).contiguous()
            return QuantizedWeight(kind, tensors["codes"], scales)

        return StoredLinear({"codes": codes, "scale": scale}, build)

    def _blocks(self, codes: TensorSlice) -> StoredLinear:
        if self._quantization.block != (BLOCK, BLOCK):
            raise self._error(f"weight_block_size is {self._quantization.block}, only {BLOCK} x {BLOCK} is supported")
        if self._start % BLOCK or (self._stop % BLOCK and self._stop != self._weight.shape[self._weight.dim]):
            raise self._error(f"rows or columns {self._start} to {self._stop} cut through blocks of {BLOCK}")
        grid = (-(-self._n // BLOCK), -(-self._k // BLOCK))
        span = (self._start // BLOCK, -(-self._stop // BLOCK))
        scales = TensorSlice(f"{self._module}.weight_scale_inv", grid, self._weight.dim, *span, FLOATS)

        def build(tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
            return QuantizedWeight("fp8", tensors["codes"], tensors["scales"].float(), blocks=True)

        return StoredLinear({"codes": codes, "scales": scales}, build)

    # -- int4, eight weights in a word

    def awq(self) -> StoredLinear:
        """`qweight` int32 [K, N / 8], `qzeros` int32 [G, N / 8], `scales` [G, N]."""
        codes = self._slice_KN("qweight", self._k, 1, 8)
        zeros = self._slice_KN("qzeros", self._k // self._group, self._group, 8)
        scales = self._slice_KN("scales", self._k // self._group, self._group, 1, FLOATS)

        def build(tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
            unpacked = [_columns(tensors[name], _AWQ_ORDER).t().contiguous() for name in ("codes", "zeros")]
            return QuantizedWeight("int4", unpacked[0], _scales(tensors["scales"].t()), unpacked[1], self._group)

        return StoredLinear({"codes": codes, "zeros": zeros, "scales": scales}, build)

    def gptq(self) -> StoredLinear:
        """`qweight` int32 [K / 8, N], `qzeros` int32 [G, N / 8], `scales` [G, N], `g_idx` int32 [K]. Zero points are
        stored less one, but in the format gptq_v2.
        """
        if self._quantization.weights != "int4":
            raise self._error("GPTQ weights of 8 bits are not supported, only those of 4")
        codes = self._slice_KN("qweight", self._k // 8, 8, 1)
        zeros = self._slice_KN("qzeros", self._k // self._group, self._group, 8)
        scales = self._slice_KN("scales", self._k // self._group, self._group, 1, FLOATS)
        parts = {"codes": codes, "zeros": zeros, "scales": scales}
        indices = f"{self._module}.g_idx"
        if self._checkpoint.has(indices):
            parts["groups"] = TensorSlice(indices, (self._k,), 0, 0, self._k, frozenset({"I32"}))
        more = 0 if self._config.get("checkpoint_format") == "gptq_v2" else 1

        def build(tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
            if "groups" in tensors and not torch.equal(tensors["groups"].long(), torch.arange(self._k) // self._group):
                raise self._error("desc_act: columns are quantised in another order than their own")
            unpacked = _columns(tensors["zeros"], _PLAIN_ORDER).t()
            zero_points = ((unpacked.to(torch.int16) + more) & 15).to(torch.uint8).contiguous()
            weight_NK = _columns(tensors["codes"].t().contiguous(), _PLAIN_ORDER)
            return QuantizedWeight("int4", weight_NK, _scales(tensors["scales"].t()), zero_points, self._group)

        return StoredLinear(parts, build)

    def packed(self) -> StoredLinear:
        """compressed-tensors' pack-quantized: `weight_packed` int32 [N, K / 8] of weights plus 8, `weight_scale`
        [N, G], and for asymmetric weights `weight_zero_point` int32 [N / 8, G], plus 8 as well.
        """
        groups = self._k // self._group
        codes = self._slice_NK("weight_packed", 1, self._k // 8, 8)
        scales = self._slice_NK("weight_scale", 1, groups, self._group, FLOATS)
        parts = {"codes": codes, "scales": scales}
        if self._checkpoint.has(f"{self._module}.weight_zero_point"):
            parts["zeros"] = self._slice_NK("weight_zero_point", 8, groups, self._group)

        def build(tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
            scales_NG = _scales(tensors["scales"])
            if "zeros" in tensors:
                zeros_NG = _columns(tensors["zeros"].t().contiguous(), _PLAIN_ORDER).t().contiguous()
            else:
                zeros_NG = torch.full(scales_NG.shape, 8, dtype=torch.uint8)
            return QuantizedWeight("int4", _columns(tensors["codes"], _PLAIN_ORDER), scales_NG, zeros_NG, self._group)

        return StoredLinear(parts, build)

    # -- slices

    def _slice(self, name: str, shape: tuple[int, ...], dtypes: set[str]) -> TensorSlice:
        weight = self._weight
        return TensorSlice(f"{self._module}.{name}", shape, weight.dim, weight.start, weight.stop, frozenset(dtypes))

    def _slice_NK(
        self, name: str, each_n: int, columns: int, each_k: int, dtypes: frozenset[str] = frozenset({"I32"})
    ) -> TensorSlice:
        """Of a tensor [N / each_n, columns], a column for every each_k inputs."""
        return self._cut(name, (self._n // each_n, columns), 0 if self._by_rows else 1, each_n, each_k, dtypes)

    def _slice_KN(
        self, name: str, rows: int, each_k: int, each_n: int, dtypes: frozenset[str] = frozenset({"I32"})
    ) -> TensorSlice:
        """Of a tensor [rows, N / each_n], a row for every each_k inputs."""
        return self._cut(name, (rows, self._n // each_n), 1 if self._by_rows else 0, each_n, each_k, dtypes)

    def _cut(
        self, name: str, shape: tuple[int, ...], dim: int, each_n: int, each_k: int, dtypes: frozenset[str]
    ) -> TensorSlice:
        each = each_n if self._by_rows else each_k
        if self._start % each or self._stop % each:
            raise self._error(
                f"{'outputs' if self._by_rows else 'inputs'} {self._start} to {self._stop} of {name} cut through what "
                f"is quantised together, {each}: a smaller tensor parallelism does not"
            )
        return TensorSlice(f"{self._module}.{name}", shape, dim, self._start // each, self._stop // each, dtypes)

    def _error(self, sentence: str) -> CheckpointError:
        return CheckpointError(f"{self._checkpoint.directory}: {self._module}: {sentence}")


def _columns(words: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """uint8 [rows, 8 * columns] of 0 to 15, from int32 words whose four bits are in this order."""
    shifts = torch.tensor([4 * place for place in order], dtype=torch.int32)
    return ((words[:, :, None] >> shifts) & 15).to(torch.uint8).view(len(words), -1)


def _scales(scales: torch.Tensor) -> torch.Tensor:
    return scales.float().contiguous()
