"""Bytes of one rank, against arithmetic written out by hand.

The small shape: hidden 8, 4 heads and 2 KV heads of 4, inner 12, vocabulary 10. Rows x columns of its layer:
q 16x8, k 8x8, v 8x8, o 8x16, gate 12x8, up 12x8, down 8x12: 672 elements in 72 rows; two norms of 8.
"""

from __future__ import annotations

import dataclasses

import pytest

from arriero_plan.checkpoint import Quantization
from arriero_plan.memory import (
    GIB,
    Limits,
    Precision,
    count_parameters,
    embedding_bytes,
    kv_bytes_per_token,
    layer_bytes,
    layer_bytes_all,
    linear_bytes,
    reserve_bytes,
    workspace_bytes,
)

BF16 = Precision("bfloat16", "bfloat16", "bfloat16")
FP32 = Precision("float32", "float32", "float32")
FP8 = Precision("bfloat16", "fp8", "fp8")
INT8 = Precision("bfloat16", "int8", "bfloat16")
INT4 = Precision("bfloat16", "int4", "bfloat16")


@pytest.fixture
def small(shape):
    return shape(
        "8B",
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=12,
        vocab_size=10,
        bos_token_id=None,
        eos_token_id=None,
    )


@pytest.mark.parametrize(
    ("precision", "tensor", "expected"),
    [
        (BF16, 1, (672 + 16) * 2),
        (FP32, 1, (672 + 16) * 4),
        (BF16, 2, (336 + 16) * 2),
        # One KV head on each of four ranks, though there are only two: k and v stay 4x8.
        (BF16, 4, (32 + 32 + 32 + 32 + 3 * 24 + 16) * 2),
        (FP8, 1, 672 + 72 * 4 + 16 * 2),
        (INT8, 1, 672 + 72 * 4 + 16 * 2),
        (INT4, 1, 336 + 72 * 4 + 16 * 2),
        # Row-parallel layers (o, down) keep all 8 rows, the others half: 8 + 4 + 4 + 8 + 6 + 6 + 8 rows.
        (FP8, 2, 336 + 44 * 4 + 16 * 2),
    ],
)
def test_a_layer(small, precision, tensor, expected):
    assert layer_bytes(small, tensor, precision, 0) == expected


def test_biases(small):
    both = dataclasses.replace(small, attention_bias=True, mlp_bias=True)
    assert layer_bytes(both, 1, BF16, 0) - layer_bytes(small, 1, BF16, 0) == (16 + 8 + 8 + 8 + 12 + 12 + 8) * 2
    # Column-parallel biases are cut, those of o and down are whole on every rank.
    assert layer_bytes(both, 2, BF16, 0) - layer_bytes(small, 2, BF16, 0) == (8 + 4 + 4 + 8 + 6 + 6 + 8) * 2


@pytest.mark.parametrize(("tensor", "rows"), [(1, 10), (2, 5), (4, 3)])
def test_the_vocabulary_is_padded_to_equal_shards(small, tensor, rows):
    assert embedding_bytes(small, tensor, BF16) == rows * 8 * 2


def test_embedding_and_head_are_never_quantised(small):
    assert embedding_bytes(small, 1, INT4) == embedding_bytes(small, 1, BF16)


@pytest.mark.parametrize(
    ("precision", "tensor", "expected"),
    [(BF16, 1, 2 * 2 * 4 * 2), (BF16, 2, 2 * 1 * 4 * 2), (BF16, 4, 2 * 1 * 4 * 2), (FP8, 1, 16), (FP32, 1, 64)],
)
def test_kv_of_a_token_in_a_layer(small, precision, tensor, expected):
    assert kv_bytes_per_token(small, tensor, precision) == expected


@pytest.mark.parametrize(("size", "kib"), [("8B", 128), ("70B", 320), ("405B", 504)])
def test_kv_of_a_token_in_public_models(shape, size, kib):
    """2 x layers x 8 KV heads x 128 x 2 bytes."""
    model = shape(size)
    assert kv_bytes_per_token(model, 1, BF16) * model.num_layers == kib * 1024


@pytest.mark.parametrize(
    ("stored", "kind", "expected"),
    [
        (Quantization("fp8", "fp8", None, (128, 128), ()), "fp8", 300 * 200 + 3 * 2 * 4),
        (Quantization("awq", "int4", 64, None, ()), "int4", 300 * 100 + 300 * 4 * 4),
        (Quantization("gptq", "int8", 128, None, ()), "int8", 300 * 200 + 300 * 2 * 4),
        (Quantization("gptq", "int4", None, None, ()), "int4", 300 * 100 + 300 * 2 * 4),
    ],
)
def test_scales_as_the_checkpoint_keeps_them(stored, kind, expected):
    assert linear_bytes(300, 200, Precision("bfloat16", kind, "bfloat16", stored)) == expected


@pytest.mark.parametrize(
    "ignore",
    [("model.layers.1.self_attn.q_proj",), ("re:.*layers.1.self_attn.q_proj",), ("layers.1.self_attn.q_proj",)],
)
def test_modules_that_a_checkpoint_leaves_alone_are_counted_unquantised(small, ignore):
    precision = Precision("bfloat16", "fp8", "bfloat16", Quantization("compressed-tensors", "fp8", None, None, ignore))
    quantised = 672 + 72 * 4 + 16 * 2
    plain_q = quantised - (16 * 8 + 16 * 4) + 16 * 8 * 2
    assert layer_bytes_all(small, 1, precision) == [quantised, plain_q, quantised]


def test_parts_of_a_name_match_whole_parts_only(small):
    precision = Precision("bfloat16", "fp8", "bfloat16", Quantization("awq", "fp8", None, None, ("layers.1",)))
    plain = (672 + 16) * 2
    assert layer_bytes_all(small, 1, precision)[1] == plain
    assert layer_bytes_all(small, 1, precision)[0] == layer_bytes_all(small, 1, precision)[2] != plain


@pytest.mark.parametrize(
    ("tensor", "pipeline", "last", "expected"),
    [
        # 2048 tokens of (3 x 4096 + 3 x 14336) bf16; 256 x 32 heads x 16 splits x 130 fp32; 256 x 3 x 128256 fp32.
        (1, 1, True, 226_492_416 + 68_157_440 + 394_002_432),
        # 5 hidden rows in a pipeline, inner size and heads halved, no logits before the last stage.
        (2, 2, False, 2048 * (5 * 4096 + 3 * 7168) * 2 + 34_078_720),
        (2, 2, True, 2048 * (5 * 4096 + 3 * 7168) * 2 + 34_078_720 + 256 * (64_128 + 2 * 128_256) * 4),
    ],
)
def test_workspace_of_llama_8b(shape, tensor, pipeline, last, expected):
    limits = Limits(max_batch_tokens=2048, max_running=256)
    assert workspace_bytes(shape("8B"), tensor, pipeline, BF16, limits, last=last) == expected


def test_attention_sets_the_workspace_where_it_is_wider_than_the_mlp(small):
    limits = Limits(max_batch_tokens=10, max_running=1)
    # q, k, v and output: 16 + 8 + 8 + 16 = 48, above 3 x 12.
    partials = 4 * 16 * 6 * 4
    assert workspace_bytes(small, 1, 1, BF16, limits, last=False) == 10 * (3 * 8 + 48) * 2 + partials


def test_reserve():
    assert reserve_bytes(1, 80 * GIB, cpu=False) / GIB == pytest.approx(0.6 + 1.0 + 1.6)
    assert reserve_bytes(8, 80 * GIB, cpu=False) / GIB == pytest.approx(0.6 + 1.0 + 1.0 + 1.6)
    assert reserve_bytes(8, 80 * GIB, cpu=True) / GIB == pytest.approx(0.5)


def test_parameters_by_hand(shape, small):
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert count_parameters(shape("8B")) == 32 * layer + 2 * 128256 * 4096 + 4096 == 8_030_261_248
    assert count_parameters(shape("8B", tie_word_embeddings=True)) == 8_030_261_248 - 128256 * 4096
    assert count_parameters(small) == 3 * (672 + 16) + 2 * 80 + 8
