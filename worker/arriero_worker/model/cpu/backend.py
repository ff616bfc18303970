"""The cpu backend: the model's operations on kernels of our own, float32 activations, float32 or bfloat16 weights."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from arriero_worker.model.backend import AttentionShape, KvCache, KvLayer
from arriero_worker.model.cpu import attention as attention_
from arriero_worker.model.cpu import elementwise, linear
from arriero_worker.model.cpu.compiled import compile_kernel
from arriero_worker.model.cpu.memory import Workspace, huge_empty
from arriero_worker.model.cpu.onednn import OneDnnLinear
from arriero_worker.model.cpu.onednn import usable as matrix_units
from arriero_worker.model.cpu.pool import BRIEF_SPIN, SPIN, Pool
from arriero_worker.model.cpu.tiles import BFLOAT16, FLOAT32, PAIRED, PANEL, tile_tables
from arriero_worker.model.forward import ForwardBatch
from arriero_worker.model.quantized import QuantizedWeight

_Kernel = tuple[int, struct.Struct]
_KERNELS: dict[str, tuple[Callable[..., Any], struct.Struct]] = {
    "pack": (linear.pack_kernel, linear.PACK_LAYOUT),
    "linear": (linear.linear_kernel, linear.LAYOUT),
    "embed": (linear.embed_kernel, linear.EMBED_LAYOUT),
    "norm": (elementwise.add_rms_norm_kernel, elementwise.NORM_LAYOUT),
    "rows": (elementwise.rows_kernel, elementwise.ROWS_LAYOUT),
    "silu": (elementwise.silu_mul_kernel, elementwise.SILU_LAYOUT),
    "angles": (elementwise.angles_kernel, elementwise.ANGLES_LAYOUT),
    "rope": (elementwise.rope_kernel, elementwise.ROPE_LAYOUT),
    "work": (attention_.work_kernel, attention_.WORK_LAYOUT),
    "attention": (attention_.attention_kernel, attention_.LAYOUT),
}


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight in panels (see `linear`), its bias in float32, and the numbers a kernel needs."""

    panels: torch.Tensor
    bias_N: torch.Tensor | None
    n: int
    k: int
    kind: int

    @property
    def addresses(self) -> tuple[int, int]:
        return self.panels.data_ptr(), 0 if self.bias_N is None else self.bias_N.data_ptr()


@cache
def _kernel(name: str) -> _Kernel:
    """Compile a kernel, or load it from numba's cache on disk. Once per process."""
    function, layout = _KERNELS[name]
    return compile_kernel(function), layout


class CpuBackend:
    """One rank's kernels and their threads. See `model.backend.Backend` for what the operations do."""

    def __init__(self, dtype: torch.dtype, threads: int) -> None:
        """`threads`: also torch's. Raises ValueError for a dtype other than float32 and bfloat16."""
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"the cpu backend computes in float32 or bfloat16, not in {dtype}")
        self.dtype = dtype
        self.hidden_dtype = torch.float32
        self._one_dnn = dtype == torch.bfloat16 and matrix_units()
        # torch's own threads do the linears then, on the same cores: ours must not spin in their way.
        self._pool = Pool(threads, BRIEF_SPIN if self._one_dnn else SPIN)
        self._threads = threads
        self._float32_tiles, bfloat16_tiles, paired_tiles = tile_tables()
        self._weight_tiles = self._float32_tiles if dtype == torch.float32 else paired_tiles
        self._key_tiles = self._float32_tiles if dtype == torch.float32 else bfloat16_tiles
        self._space = Workspace()
        self._scratch = torch.empty(threads * linear.SCRATCH_BYTES, dtype=torch.uint8)
        self._attention_scratch = torch.empty(0, dtype=torch.uint8)
        self._counters = torch.zeros(2, dtype=torch.int64)
        self._counter_view = self._counters.numpy()
        self._work = torch.empty(0, dtype=torch.int32)
        self._items = 0
        self._attention: AttentionShape | None = None
        self._cos = self._sin = self._work
        self._block_size = 0

    def close(self) -> None:
        """End the threads."""
        self._pool.close()

    def warm(self) -> None:
        for name in _KERNELS:
            _kernel(name)

    # -- weights and cache

    def pack_linear(
        self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, as_it_is: bool = True
    ) -> PackedLinear | OneDnnLinear:
        if self._one_dnn:
            return OneDnnLinear.pack(weight_NK, bias_N)
        return self._pack_panels(weight_NK, bias_N)

    def pack_quantized(self, weight: QuantizedWeight, bias_N: torch.Tensor | None) -> PackedLinear | OneDnnLinear:
        return self.pack_linear(weight.dequantized().to(self.dtype), bias_N)

    def pack_table(self, weight_VH: torch.Tensor) -> PackedLinear:
        return self._pack_panels(weight_VH, None)

    def pack_head(self, weight_VH: torch.Tensor) -> PackedLinear | OneDnnLinear:
        return self.pack_linear(weight_VH, None)

    def _pack_panels(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> PackedLinear:
        assert weight_NK.dtype == self.dtype
        n, k = weight_NK.shape
        if weight_NK.stride(1) != 1:
            weight_NK = weight_NK.contiguous()
        panels = -(-n // PANEL)
        storage = huge_empty((panels, k, PANEL), self.dtype)
        stride = weight_NK.stride(0)
        self._run("pack", weight_NK.data_ptr(), stride, storage.data_ptr(), n, k, self.dtype.itemsize)
        bias = None
        if bias_N is not None:
            bias = torch.zeros(panels * PANEL)
            bias[:n] = bias_N
        return PackedLinear(storage, bias, n, k, FLOAT32 if self.dtype == torch.float32 else PAIRED)

    def linear_bytes(self, weight: PackedLinear | OneDnnLinear) -> int:
        return weight.n * weight.k * self.dtype.itemsize

    def pack_vector(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.to(torch.float32, copy=True)

    def allocate_kv(self, layers: int, kv_blocks: int, block_size: int, attention: AttentionShape) -> KvCache:
        keys = (kv_blocks, attention.kv_heads, attention.head_dim, _padded(block_size))
        values = (kv_blocks, attention.kv_heads, block_size, _padded(attention.head_dim))

        def allocate(shape: tuple[int, ...]) -> torch.Tensor:
            return huge_empty(shape, self.dtype).zero_()

        return KvCache(tuple((allocate(keys), allocate(values)) for _ in range(layers)), block_size)

    # -- a forward pass

    def begin(self, batch: ForwardBatch, attention: AttentionShape, block_size: int) -> None:
        # Kernels see addresses: another type or stride would be read as garbage.
        for tensor in (batch.tokens_T, batch.positions_T, batch.slots_T, batch.logits_rows_R):
            assert tensor is not None
            assert tensor.dtype == torch.int64 and tensor.is_contiguous()  # noqa: PT018
        for tensor in (batch.query_starts_B1, batch.context_lengths_B, batch.block_tables_BP):
            assert tensor.dtype == torch.int32 and tensor.stride(-1) == 1  # noqa: PT018
        tokens, sequences = len(batch.positions_T), len(batch.context_lengths_B)
        half = attention.head_dim // 2
        self._attention, self._block_size = attention, block_size
        self._cos, self._sin = self._space.take("cos", tokens, half), self._space.take("sin", tokens, half)
        self._run(
            "angles",
            batch.positions_T.data_ptr(),
            attention.inverse_frequencies.data_ptr(),
            self._cos.data_ptr(),
            self._sin.data_ptr(),
            tokens,
            half,
        )
        if len(self._work) < 2 * tokens:
            self._work = torch.empty(4 * tokens, dtype=torch.int32)
        step = attention_.queries_per_item(attention.heads, attention.kv_heads)
        starts = batch.query_starts_B1.data_ptr()
        self._run("work", starts, sequences, step, self._work.data_ptr(), self._counters.data_ptr() + 8)
        self._items = int(self._counter_view[1])
        key_width, value_width = _padded(block_size), _padded(attention.head_dim)
        need = attention_.scratch_bytes(
            attention.heads, attention.kv_heads, attention.head_dim, block_size, key_width, value_width
        )
        self._scratch_each = -(-need // 64) * 64
        if len(self._attention_scratch) < self._scratch_each * self._threads:
            self._attention_scratch = torch.empty(self._scratch_each * self._threads, dtype=torch.uint8)

    def embed(self, tokens_T: torch.Tensor, table_VH: PackedLinear | OneDnnLinear, first_token: int) -> torch.Tensor:
        assert isinstance(table_VH, PackedLinear)
        t, w = len(tokens_T), table_VH
        out = self._space.take("residual", t, w.k)
        panels = w.panels.data_ptr()
        self._run("embed", tokens_T.data_ptr(), panels, out.data_ptr(), t, w.k, first_token, first_token + w.n, w.kind)
        return out

    def add_rms_norm(
        self,
        residual_TH: torch.Tensor,
        delta_TH: torch.Tensor | None,
        weight_H: torch.Tensor,
        eps: float,
        into: object = None,
    ) -> torch.Tensor:
        t, h = residual_TH.shape
        out = self._space.take("normed", t, h)
        delta = 0 if delta_TH is None else delta_TH.data_ptr()
        self._run("norm", residual_TH.data_ptr(), delta, weight_H.data_ptr(), out.data_ptr(), t, h, eps)
        return out

    def add(self, residual_TH: torch.Tensor, delta_TH: torch.Tensor) -> torch.Tensor:
        t, h = residual_TH.shape
        self._run("norm", residual_TH.data_ptr(), delta_TH.data_ptr(), 0, 0, t, h, 0.0)
        return residual_TH

    def rows(self, x_TH: torch.Tensor, rows_R: torch.Tensor, out: str) -> torch.Tensor:
        r, h = len(rows_R), x_TH.shape[1]
        picked = self._space.take(out, r, h)
        self._run("rows", x_TH.data_ptr(), rows_R.data_ptr(), picked.data_ptr(), r, h)
        return picked

    def linear(self, x_TK: torch.Tensor, weight: PackedLinear | OneDnnLinear, out: str) -> torch.Tensor:
        t, n = len(x_TK), weight.n
        result = self._space.take(out, t, n)
        if isinstance(weight, OneDnnLinear):
            weight(x_TK, result)
            return result
        panels, bias = weight.addresses
        tail = self._space.take("tail", t, PANEL).data_ptr() if n % PANEL else 0
        scratch = self._scratch.data_ptr()
        self._run(
            "linear",
            x_TK.data_ptr(),
            panels,
            bias,
            result.data_ptr(),
            t,
            n,
            weight.k,
            self.dtype.itemsize,
            self._weight_tiles,
            scratch,
            tail,
        )
        return result

    def rope_and_store(self, qkv: torch.Tensor, layer: KvLayer, batch: ForwardBatch) -> None:
        shape = self._attention
        assert shape is not None
        keys, values = layer
        self._run(
            "rope",
            qkv.data_ptr(),
            self._cos.data_ptr(),
            self._sin.data_ptr(),
            batch.slots_T.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            len(qkv),
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            values.shape[2],
            keys.shape[3],
            values.shape[3],
            self._kv_kind,
            0,
        )

    def attention(self, qkv: torch.Tensor, layer: KvLayer, batch: ForwardBatch, into: object = None) -> torch.Tensor:
        shape = self._attention
        assert shape is not None
        keys, values = layer
        out = self._space.take("attended", len(qkv), shape.q_size)
        self._counter_view[0] = 0
        self._run(
            "attention",
            attention_.softmax_scale(shape.head_dim),
            qkv.data_ptr(),
            out.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            batch.positions_T.data_ptr(),
            batch.query_starts_B1.data_ptr(),
            batch.context_lengths_B.data_ptr(),
            batch.block_tables_BP.data_ptr(),
            batch.block_tables_BP.stride(0),
            self._work.data_ptr(),
            self._items,
            self._counters.data_ptr(),
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            values.shape[2],
            keys.shape[3],
            values.shape[3],
            shape.sliding_window or 0,
            self._kv_kind,
            self._attention_scratch.data_ptr(),
            self._scratch_each,
            self._key_tiles,
            self._float32_tiles,
        )
        return out

    def silu_mul(self, gate_up: torch.Tensor, into: object = None) -> torch.Tensor:
        t, n = len(gate_up), gate_up.shape[1] // 2
        out = self._space.take("activated", t, n)
        self._run("silu", gate_up.data_ptr(), out.data_ptr(), t, n)
        return out

    def logits(self, x_RH: torch.Tensor, head: PackedLinear | OneDnnLinear) -> torch.Tensor:
        return self.linear(x_RH, head, "logits")

    @property
    def _kv_kind(self) -> int:
        return FLOAT32 if self.dtype == torch.float32 else BFLOAT16

    def _run(self, name: str, *arguments: float) -> None:
        kernel, layout = _kernel(name)
        self._pool.run(kernel, layout, *arguments)


def _padded(size: int) -> int:
    return -(-size // PANEL) * PANEL
