"""The cuda backend: the model's operations on Triton's kernels and cuBLAS.

Where kernels are interpreted it computes the same on the CPU: nothing here knows what device it is on. Nothing waits
for the device either, and no launch depends on a value that lies there; so a forward pass can be captured as a graph.
"""

from __future__ import annotations

from typing import Any

import torch

from arriero_kernels.decode_attention import decode_attention
from arriero_kernels.embedding import embedding
from arriero_kernels.paged_attention import paged_attention
from arriero_kernels.quantize import quantize
from arriero_kernels.rms_norm import add_rms_norm, add_rms_norm_quantized
from arriero_kernels.rope_kv import rope_and_store, rope_table
from arriero_kernels.swiglu import silu_mul, silu_mul_quantized
from arriero_kernels.tuning import Tuning
from arriero_plan.memory import KvFormat, WeightFormat
from arriero_worker.model.backend import AttentionShape, KvCache, KvLayer
from arriero_worker.model.cuda.linear import Dense, Form, Input, Linear, Quantized, pack_quantized
from arriero_worker.model.cuda.workspace import Workspace
from arriero_worker.model.forward import ForwardBatch
from arriero_worker.model.quantized import QuantizedWeight, quantize_weight

_FEW = 4
"""Pairs of a sequence and a KV head, for each multiprocessor, up to which decodes split each sequence's keys: with
more, one program for each pair keeps the device busy. Not measured yet."""

_KV_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


class CudaBackend:
    """One rank's kernels. See `model.backend.Backend` for what the operations do."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        *,
        max_context: int,
        weights: WeightFormat | None = None,
        kv: KvFormat | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        """dtype: of activations, and of weights that are not quantised: float32 or bfloat16.

        max_context: positions that may occur, from 0 on.
        weights: what dense weights are rounded to while they are loaded; None, float32, bfloat16: they stay `dtype`.
        kv: how keys and values are kept; None: as `dtype`.
        tuning: the kernels' launch parameters; None: those of the device.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"the cuda backend computes in float32 or bfloat16, not in {dtype}")
        self.dtype = self.hidden_dtype = dtype
        self.device = device
        self._max_context = max_context
        self._quantized = weights if weights in ("fp8", "int8", "int4") else None
        self._kv_dtype = dtype if kv is None else _KV_DTYPES[kv]
        self._tuning = tuning or Tuning.of(device)
        self.workspace = Workspace(device)
        self._cos_sin_PD: torch.Tensor | None = None
        self._scale = 1.0
        self._attention: AttentionShape

    def close(self) -> None:
        """Nothing runs beside the calls."""

    def warm(self) -> None:
        """Nothing to do here: steps of every size (`runner.device.warm`) have kernels compiled."""

    # -- weights and cache

    def pack_linear(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, as_it_is: bool = False) -> Linear:
        weight = weight_NK.to(self.device)
        if self._quantized is not None and not as_it_is:
            return pack_quantized(quantize_weight(weight, self._quantized), self._bias(bias_N))
        return Dense(self._own(weight, weight_NK), self._bias(bias_N))

    def pack_quantized(self, weight: QuantizedWeight, bias_N: torch.Tensor | None) -> Linear:
        moved = weight.copied(self.device)
        if self._quantized is None:
            return Dense(moved.dequantized().to(self.dtype), self._bias(bias_N))
        return pack_quantized(moved, self._bias(bias_N))

    def pack_table(self, weight_VH: torch.Tensor) -> Dense:
        return Dense(self._own(weight_VH.to(self.device), weight_VH), None)

    def pack_head(self, weight_VH: torch.Tensor) -> Dense:
        return self.pack_table(weight_VH)

    def linear_bytes(self, weight: Linear) -> int:
        return weight.bytes

    def pack_vector(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.to(self.device, copy=True)

    def _bias(self, bias_N: torch.Tensor | None) -> torch.Tensor | None:
        return None if bias_N is None else bias_N.to(self.device, self.dtype, copy=True)

    @staticmethod
    def _own(moved: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Memory of its own: what was given may be a view of a file that goes away."""
        return moved.clone() if moved is given else moved.contiguous()

    def allocate_kv(self, layers: int, kv_blocks: int, block_size: int, attention: AttentionShape) -> KvCache:
        size = (kv_blocks, attention.kv_heads, block_size, attention.head_dim)

        def layer() -> KvLayer:
            pair = tuple(torch.zeros(size, dtype=self._kv_dtype, device=self.device) for _ in range(2))
            if self._kv_dtype != torch.float8_e4m3fn:
                return pair
            return (*pair, *(torch.ones(attention.kv_heads, device=self.device) for _ in range(2)))

        return KvCache(tuple(layer() for _ in range(layers)), block_size)

    # -- a forward pass

    def begin(self, batch: ForwardBatch, attention: AttentionShape, block_size: int) -> None:
        self._attention = attention
        if self._cos_sin_PD is None:
            # On the CPU, whose cosines are the same everywhere.
            self._cos_sin_PD = rope_table(attention.inverse_frequencies, self._max_context).to(self.device)
            self._scale = float(attention.head_dim) ** -0.5

    def embed(self, tokens_T: torch.Tensor, table_VH: Linear, first_token: int) -> torch.Tensor:
        assert isinstance(table_VH, Dense)
        table = table_VH.weight_NK
        out_TH = self._take("residual", len(tokens_T), table.shape[1])
        return embedding(tokens_T, table, first_token, out_TH=out_TH, tuning=self._tuning)

    def add_rms_norm(
        self,
        residual_TH: torch.Tensor,
        delta_TH: torch.Tensor | None,
        weight_H: torch.Tensor,
        eps: float,
        into: Linear | None = None,
    ) -> Input:
        form = None if into is None else into.form
        if form is None:
            out_TH = self._take("normed", *residual_TH.shape)
            return add_rms_norm(residual_TH, delta_TH, weight_H, eps, out_TH=out_TH, tuning=self._tuning)
        result, how = self._quantizing("normed", len(residual_TH), residual_TH.shape[1], form)
        add_rms_norm_quantized(residual_TH, delta_TH, weight_H, eps, out_TH=result.codes_TK, **how)
        return result

    def add(self, residual_TH: torch.Tensor, delta_TH: torch.Tensor) -> torch.Tensor:
        return residual_TH.add_(delta_TH)

    def rows(self, x_TH: torch.Tensor, rows_R: torch.Tensor, out: str) -> torch.Tensor:
        return embedding(rows_R, x_TH, out_TH=self._take(out, len(rows_R), x_TH.shape[1]), tuning=self._tuning)

    def linear(self, x_TK: Input, weight: Linear, out: str) -> torch.Tensor:
        t = len(x_TK.codes_TK if isinstance(x_TK, Quantized) else x_TK)
        result = self._take(out, t, weight.n)
        weight.product(x_TK, result, self._tuning)
        return result

    def rope_and_store(self, qkv: torch.Tensor, layer: KvLayer, batch: ForwardBatch) -> None:
        assert self._cos_sin_PD is not None
        keys, values, *scales = layer
        key_scales, value_scales = scales or (None, None)
        rope_and_store(
            qkv,
            self._cos_sin_PD,
            batch.positions_T,
            batch.slots_T,
            keys,
            values,
            key_scales_K=key_scales,
            value_scales_K=value_scales,
            tuning=self._tuning,
        )

    def attention(self, qkv: torch.Tensor, layer: KvLayer, batch: ForwardBatch, into: Linear | None = None) -> Input:
        shape = self._attention
        keys, values, *scales = layer
        key_scales, value_scales = scales or (None, None)
        t = len(qkv)
        out = self._take("attended", t, shape.q_size)
        queries = qkv[:, : shape.q_size].view(t, shape.heads, shape.head_dim)
        out_TAD = out.view(t, shape.heads, shape.head_dim)
        if batch.decodes and t * shape.kv_heads <= _FEW * self._tuning.multiprocessors:
            decode_attention(
                queries,
                keys,
                values,
                batch.block_tables_BP,
                batch.context_lengths_B,
                scale=self._scale,
                window=shape.sliding_window,
                key_scales=key_scales,
                value_scales=value_scales,
                out=out_TAD,
                tuning=self._tuning,
            )
        else:
            paged_attention(
                queries,
                keys,
                values,
                batch.block_tables_BP,
                batch.query_starts_B1,
                batch.context_lengths_B,
                scale=self._scale,
                window=shape.sliding_window,
                key_scales=key_scales,
                value_scales=value_scales,
                out=out_TAD,
                tuning=self._tuning,
            )
        if into is None or into.form is None:
            return out
        result, how = self._quantizing("attended", t, shape.q_size, into.form)
        quantize(out, out_TN=result.codes_TK, **how)
        return result

    def silu_mul(self, gate_up: torch.Tensor, into: Linear | None = None) -> Input:
        t, i = len(gate_up), gate_up.shape[1] // 2
        form = None if into is None else into.form
        if form is None:
            return silu_mul(gate_up, out_TI=self._take("activated", t, i), tuning=self._tuning)
        result, how = self._quantizing("activated", t, i, form)
        silu_mul_quantized(gate_up, out_TI=result.codes_TK, **how)
        return result

    def logits(self, x_RH: Input, head: Linear) -> torch.Tensor:
        assert isinstance(x_RH, torch.Tensor)
        result = self.workspace.take("logits", len(x_RH), head.n, dtype=torch.float32)
        head.product(x_RH, result, self._tuning)
        return result

    def _take(self, name: str, *sizes: int) -> torch.Tensor:
        return self.workspace.take(name, *sizes, dtype=self.dtype)

    def _quantizing(self, name: str, t: int, n: int, form: Form) -> tuple[Quantized, dict[str, Any]]:
        """Where a quantising operation writes to, and what tells it how, but for the name of its output."""
        sizes = (t, -(-n // form.group)) if form.scaling.name == "GROUP" else (t,)
        scales = self.workspace.take(f"{name}_scales", *sizes, dtype=torch.float32)
        result = Quantized(self.workspace.take(name, t, n, dtype=form.dtype), scales)
        how = {"dtype": form.dtype, "scaling": form.scaling, "group": form.group, "scales": scales}
        return result, {**how, "tuning": self._tuning}
