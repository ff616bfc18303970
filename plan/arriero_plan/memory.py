"""Bytes of one rank: weights, KV cache, workspace, and what the runtime keeps for itself.

How weights are cut. Within a stage, query heads, KV heads and the MLP's inner size are shared out over `tensor` ranks;
embedding and head are cut along the vocabulary, rounded up to equal shards; norms and the biases of row-parallel layers
are on every rank. When there are fewer KV heads than ranks, each KV head is on tensor / num_kv_heads ranks. A tied
embedding is on the first stage (to embed) and on the last (to score), once where those are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from arriero_plan.checkpoint import Quantization
from arriero_plan.model import ModelShape

GIB = 1 << 30

ComputeDtype = Literal["float32", "bfloat16"]
WeightFormat = Literal["float32", "bfloat16", "fp8", "int8", "int4"]
KvFormat = Literal["float32", "bfloat16", "fp8"]

_BYTES = {"float32": 4, "bfloat16": 2, "fp8": 1, "int8": 1}

MIB = 1 << 20

DEVICE_BYTES = {"H100-80GB": 81_000 * MIB, "H200-141GB": 143_156 * MIB}
"""What CUDA offers on an empty device, 79.1 and 139.8 GiB; nvidia-smi shows the driver's own 0.6 GiB on top."""

CUDA_CONTEXT_BYTES = int(0.6 * GIB)
"""One process's CUDA context, loaded kernels and cuBLAS workspaces."""

CUDA_GRAPH_BYTES = int(1.0 * GIB)
"""Private memory pools of the captured decode graphs."""

COLLECTIVE_BYTES = int(1.0 * GIB)
"""NCCL's channel buffers towards the ranks of the stage and the neighbouring stages; none when a rank is alone."""

FRAGMENTATION = 0.02
"""Part of a device that the caching allocator cannot hand out because of holes between live tensors."""

CPU_PROCESS_BYTES = int(0.5 * GIB)
"""A rank's interpreter, libraries and message buffers on a CPU."""

_INT4_GROUP = 128
_SCALE_BYTES = 4  # A float32 scale, or for groups a float16 scale and a float16 zero point.
_ATTENTION_SPLITS = 16


@dataclass(frozen=True, slots=True)
class Precision:
    """Types of what a rank computes in, and of the weights and keys and values that it keeps."""

    compute: ComputeDtype
    weights: WeightFormat
    kv: KvFormat
    stored: Quantization | None = None
    """The checkpoint's own quantisation, where its weights are kept as they are."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What sizes the workspace."""

    max_batch_tokens: int
    max_running: int


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def kv_heads_per_rank(shape: ModelShape, tensor: int) -> int:
    return max(1, shape.num_kv_heads // tensor)


def linear_bytes(rows: int, columns: int, precision: Precision, *, quantized: bool = True) -> int:
    """A weight of `rows` outputs and `columns` inputs, with its scales.

    fp8 and int8 keep a float32 scale per row (or per block or group, where the checkpoint has those); int4 packs two
    weights in a byte and keeps a float16 scale and zero point per 128 inputs of a row.
    """
    kind = precision.weights if quantized else precision.compute
    if kind in ("float32", "bfloat16"):
        return rows * columns * _BYTES[kind]
    stored = precision.stored
    if kind == "int4":
        group = (stored.group_size if stored else None) or _INT4_GROUP
        return ceil_div(rows * columns, 2) + rows * ceil_div(columns, group) * _SCALE_BYTES
    if stored is not None and stored.block is not None:
        scales = ceil_div(rows, stored.block[0]) * ceil_div(columns, stored.block[1])
    elif stored is not None and stored.group_size is not None:
        scales = rows * ceil_div(columns, stored.group_size)
    else:
        scales = rows
    return rows * columns + scales * _SCALE_BYTES


def layer_bytes(shape: ModelShape, tensor: int, precision: Precision, layer: int) -> int:
    """One decoder layer on one rank."""
    hidden = shape.hidden_size
    queries = shape.q_size // tensor
    keys = kv_heads_per_rank(shape, tensor) * shape.head_dim
    inner = shape.intermediate_size // tensor
    linears = (
        ("self_attn.q_proj", queries, hidden),
        ("self_attn.k_proj", keys, hidden),
        ("self_attn.v_proj", keys, hidden),
        ("self_attn.o_proj", hidden, queries),
        ("mlp.gate_proj", inner, hidden),
        ("mlp.up_proj", inner, hidden),
        ("mlp.down_proj", hidden, inner),
    )
    stored = precision.stored
    weights = sum(
        linear_bytes(
            rows,
            columns,
            precision,
            quantized=stored is None or not stored.ignores(f"model.layers.{layer}.{name}"),
        )
        for name, rows, columns in linears
    )
    plain = 2 * hidden  # The two norms.
    if shape.attention_bias:
        plain += queries + 2 * keys + hidden
    if shape.mlp_bias:
        plain += 2 * inner + hidden
    return weights + plain * _BYTES[precision.compute]


def layer_bytes_all(shape: ModelShape, tensor: int, precision: Precision) -> list[int]:
    """layer_bytes of every layer; they differ only where the checkpoint leaves some layers unquantised."""
    if precision.stored is None or not precision.stored.ignore:
        return [layer_bytes(shape, tensor, precision, 0)] * shape.num_layers
    return [layer_bytes(shape, tensor, precision, layer) for layer in range(shape.num_layers)]


def embedding_bytes(shape: ModelShape, tensor: int, precision: Precision) -> int:
    """A rank's shard of the embedding, or of the head: they have the same shape and are never quantised."""
    return ceil_div(shape.vocab_size, tensor) * shape.hidden_size * _BYTES[precision.compute]


def final_norm_bytes(shape: ModelShape, precision: Precision) -> int:
    return shape.hidden_size * _BYTES[precision.compute]


def kv_bytes_per_token(shape: ModelShape, tensor: int, precision: Precision) -> int:
    """Key and value of one token in one layer on one rank."""
    return 2 * kv_heads_per_rank(shape, tensor) * shape.head_dim * _BYTES[precision.kv]


def workspace_bytes(
    shape: ModelShape, tensor: int, pipeline: int, precision: Precision, limits: Limits, *, last: bool
) -> int:
    """What one step needs besides weights and KV, at its largest.

    - For each of the step's tokens: three rows of the hidden size (residual, normed, all-reduced), and the larger of
      attention's part (queries, keys, values, output) and the MLP's (gate, up, product).
    - In a pipeline two more hidden rows, to receive one micro-batch while another is sent.
    - For each running sequence: partial sums of split attention in float32.
    - On the last stage, for each running sequence in float32: the rank's shard of the logits, all logits, and a
      sorted copy.
    """
    width = _BYTES[precision.compute]
    attention = (2 * shape.q_size) // tensor + 2 * kv_heads_per_rank(shape, tensor) * shape.head_dim
    mlp = 3 * shape.intermediate_size // tensor
    hidden_rows = 3 if pipeline == 1 else 5
    tokens = limits.max_batch_tokens * (hidden_rows * shape.hidden_size + max(attention, mlp)) * width
    partials = limits.max_running * (shape.num_heads // tensor) * _ATTENTION_SPLITS * (shape.head_dim + 2) * 4
    logits = limits.max_running * (ceil_div(shape.vocab_size, tensor) + 2 * shape.vocab_size) * 4 if last else 0
    return tokens + partials + logits


def reserve_bytes(world: int, device_bytes: int, *, cpu: bool) -> int:
    """What the runtime keeps for itself on one device."""
    if cpu:
        return CPU_PROCESS_BYTES
    collectives = COLLECTIVE_BYTES if world > 1 else 0
    return CUDA_CONTEXT_BYTES + CUDA_GRAPH_BYTES + collectives + int(FRAGMENTATION * device_bytes)


def count_parameters(shape: ModelShape) -> int:
    """Parameters of the whole model, a tied embedding counted once."""
    hidden, queries, keys, inner = shape.hidden_size, shape.q_size, shape.kv_size, shape.intermediate_size
    layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * inner + 2 * hidden
    if shape.attention_bias:
        layer += queries + 2 * keys + hidden
    if shape.mlp_bias:
        layer += 2 * inner + hidden
    tables = 1 if shape.tie_word_embeddings else 2
    return shape.num_layers * layer + tables * shape.vocab_size * hidden + hidden
