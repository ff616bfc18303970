"""What holds for every plan and every refusal, over random models and devices."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero_plan.layout import pods_per_stage, share_layers, tensor_problem, valid_tensors
from arriero_plan.memory import GIB, Precision, kv_bytes_per_token, linear_bytes
from arriero_plan.model import ModelShape
from arriero_plan.plan import Plan, PlanError, make_plan

ARITHMETIC = re.compile(
    r"needs ([\d.]+) GiB per device, has ([\d.]+): "
    r"weights ([\d.]+) \+ KV ([\d.]+) \+ workspace ([\d.]+) \+ reserve ([\d.]+) "
    r"\(stage \d+ of tensor \d+ x pipeline \d+, KV for one sequence of \d+ tokens\); (.+)$"
)
HINT = re.compile(r"(tensor|pipeline|maxContext|weights): (\w+) would fit")
FIELD = {
    "tensor": "parallelism__tensor",
    "pipeline": "parallelism__pipeline",
    "maxContext": "model__maxContext",
    "weights": "model__weights",
}

property_test = settings(max_examples=200, deadline=None, derandomize=True)


@st.composite
def models(draw: st.DrawFn) -> ModelShape:
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 8]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4, 8]))
    return ModelShape(
        hidden_size=256 * draw(st.integers(1, 64)),
        num_layers=draw(st.integers(1, 100)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 64, 128])),
        intermediate_size=240 * draw(st.integers(1, 200)),
        vocab_size=draw(st.integers(16, 130_000)),
        tie_word_embeddings=draw(st.booleans()),
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        max_position_embeddings=draw(st.sampled_from([512, 8192, 131072])),
        sliding_window=None,
        dtype="bfloat16",
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        eos_token_ids=(2,),
        bos_token_id=1,
        quantization=None,
    )


@st.composite
def requests(draw: st.DrawFn) -> tuple[ModelShape, dict[str, object]]:
    """A model, and a spec that the model allows."""
    shape = draw(models())
    cpu = draw(st.booleans())
    spec: dict[str, object] = {
        "accelerator__type": "cpu" if cpu else "H100-80GB",
        "accelerator__memoryGiB": draw(st.floats(2.0, 24.0)),
        "accelerator__perNode": draw(st.sampled_from([1, 2, 3, 8])),
        "model__weights": draw(st.sampled_from(["auto", "float32", "bfloat16", "fp8", "int8", "int4"])),
        "engine__maxBatchTokens": draw(st.sampled_from([256, 2048])),
        "engine__maxRunning": draw(st.sampled_from([1, 256])),
        "engine__blockSize": draw(st.sampled_from([1, 7, 16, 64])),
        "parallelism__tensor": draw(st.none() | st.sampled_from(valid_tensors(shape, shape.num_heads))),
        "parallelism__pipeline": draw(st.none() | st.integers(1, min(shape.num_layers, 4))),
    }
    return shape, spec


def attempt(deploy, shape, spec) -> Plan | PlanError:
    try:
        return make_plan(deploy(**spec), shape)
    except PlanError as error:
        return error


@property_test
@given(requests())
def test_a_plan_covers_the_model_and_fits_and_a_refusal_shows_why(deploy, asked):
    shape, spec = asked
    result = attempt(deploy, shape, spec)
    if isinstance(result, PlanError):
        found = ARITHMETIC.search(str(result))
        assert found, str(result)
        need, has, *parts = (float(text) for text in found.groups()[:6])
        assert need > has
        assert sum(parts) == pytest.approx(need, abs=1e-6)
        return
    plan = result
    ends = [0, *(stage.end_layer for stage in plan.stages)]
    assert ends[-1] == shape.num_layers
    assert all(stage.first_layer == start < stage.end_layer for stage, start in zip(plan.stages, ends, strict=False))
    assert all(stage.total_bytes <= plan.device_bytes for stage in plan.stages)
    assert plan.kv_tokens >= plan.max_context == shape.max_position_embeddings
    assert tensor_problem(shape, plan.layout.tensor) is None
    assert plan.pods_per_group * plan.ranks_per_pod == plan.world == plan.layout.world
    assert plan.ranks_per_pod <= spec["accelerator__perNode"]
    for given_, chosen in (("tensor", plan.layout.tensor), ("pipeline", plan.layout.pipeline)):
        assert spec[f"parallelism__{given_}"] in (None, chosen)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


@property_test
@given(requests())
def test_no_weight_is_lost_between_ranks(deploy, asked):
    """All ranks together hold the model at least once, and not more than padding and replication explain."""
    shape, spec = asked
    spec |= {"accelerator__memoryGiB": 4096.0, "model__weights": "bfloat16"}
    plan = attempt(deploy, shape, spec)
    assert isinstance(plan, Plan)
    tensor = plan.layout.tensor
    held = sum(stage.weight_bytes for stage in plan.stages) * tensor
    hidden, layers = shape.hidden_size, shape.num_layers
    second_table = shape.vocab_size * hidden if shape.tie_word_embeddings and plan.layout.pipeline > 1 else 0
    padding = 2 * (tensor - 1) * hidden
    replicas = max(1, tensor // shape.num_kv_heads)
    kv = 2 * (hidden + 1) * shape.kv_size * (replicas - 1)
    whole = (tensor - 1) * (4 * hidden * layers + hidden)  # Norms, and the biases of o and down.
    at_most = plan.parameters + second_table + padding + kv * layers + whole
    assert plan.parameters <= held / 2 <= at_most


@property_test
@given(requests(), st.floats(1.0, 8.0))
def test_more_memory_never_hurts(deploy, asked, factor):
    shape, spec = asked
    before = attempt(deploy, shape, spec)
    if isinstance(before, PlanError):
        return
    after = attempt(deploy, shape, spec | {"accelerator__memoryGiB": spec["accelerator__memoryGiB"] * factor})
    assert isinstance(after, Plan)
    assert after.world <= before.world
    if after.layout == before.layout:
        assert after.kv_blocks >= before.kv_blocks


@property_test
@given(requests())
def test_what_a_refusal_proposes_does_fit(deploy, asked):
    shape, spec = asked
    refused = attempt(deploy, shape, spec)
    if isinstance(refused, Plan):
        return
    found = HINT.search(str(refused))
    if found is None:
        assert "no other layout would fit" in str(refused)
        return
    field, value = found.groups()
    tried = re.search(r"tensor (\d+) x pipeline (\d+)", str(refused))
    layout = {"parallelism__tensor": int(tried[1]), "parallelism__pipeline": int(tried[2])}
    changed = spec | layout | {FIELD[field]: value if field == "weights" else int(value)}
    assert isinstance(attempt(deploy, shape, changed), Plan)


@property_test
@given(st.integers(1, 9), st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(1, 12))
def test_shared_layers_make_the_heaviest_stage_as_light_as_any_division(layers, fixed, layer):
    fixed = fixed[:layers]
    counts = share_layers(layers, fixed, layer)
    assert sum(counts) == layers
    assert min(counts) >= 1

    def heaviest(division):
        return max(base + count * layer for base, count in zip(fixed, division, strict=True))

    every = itertools.product(range(1, layers + 1), repeat=len(fixed))
    assert heaviest(counts) == min(heaviest(division) for division in every if sum(division) == layers)


@given(st.integers(1, 512), st.integers(1, 64))
def test_pods_of_a_stage_are_equal_and_within_a_node(tensor, per_node):
    pods = pods_per_stage(tensor, per_node)
    assert tensor % pods == 0
    assert tensor // pods <= per_node
    assert all(tensor % fewer or tensor // fewer > per_node for fewer in range(1, pods))


@property_test
@given(models(), st.sampled_from(["bfloat16", "fp8"]))
def test_kv_heads_are_replicated_only_when_ranks_outnumber_them(shape, kv):
    precision = Precision("bfloat16", "bfloat16", kv)
    whole = kv_bytes_per_token(shape, 1, precision)
    for tensor in valid_tensors(shape, shape.num_heads):
        copies = max(1, tensor // shape.num_kv_heads)
        assert kv_bytes_per_token(shape, tensor, precision) * tensor == whole * copies


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_smaller_formats_are_smaller_where_rows_are_long_enough_to_pay_for_scales(rows, columns):
    sizes = [
        linear_bytes(rows, columns, Precision("bfloat16", weights, "bfloat16"))
        for weights in ("float32", "bfloat16", "int8", "int4")
    ]
    assert sizes[2] == linear_bytes(rows, columns, Precision("bfloat16", "fp8", "bfloat16"))
    if columns >= 128:
        assert sizes == sorted(sizes, reverse=True)


def test_a_cpu_without_a_stated_limit_gets_a_modest_cache(deploy, shape):
    """8B in bfloat16: 128 KiB a token, so 2 GiB hold 16,384; float32 takes twice that; maxRunning caps it too."""
    spec = {"accelerator__type": "cpu", "model__maxContext": 8192}
    assert make_plan(deploy(**spec), shape("8B")).kv_tokens == 16_384
    assert make_plan(deploy(**spec, model__weights="float32"), shape("8B")).kv_tokens == 8_192
    assert make_plan(deploy(**spec, parallelism__tensor=8), shape("8B")).kv_tokens == 65_536
    assert make_plan(deploy(**spec, engine__maxRunning=1), shape("8B")).kv_tokens == 8_192
    long = make_plan(deploy(accelerator__type="cpu"), shape("8B"))
    assert (long.kv_tokens, long.device_bytes, long.world) == (131_072, None, 1)


def test_a_cpu_with_a_stated_limit_fills_it_or_refuses(deploy, shape):
    spec = {"accelerator__type": "cpu", "model__maxContext": 8192, "parallelism__tensor": 2}
    plan = make_plan(deploy(**spec, accelerator__memoryGiB=16.0), shape("8B"))
    stage = plan.stages[0]
    assert 0 <= 16 * GIB - stage.total_bytes < 64 * 1024 * 16
    assert stage.reserve_bytes == GIB // 2
    with pytest.raises(PlanError, match=r"has 6\.00: .*; tensor: 4 would fit"):
        make_plan(deploy(**spec, accelerator__memoryGiB=6.0), shape("8B"))


@pytest.mark.parametrize(
    ("spec", "changes", "sentence"),
    [
        (
            {"parallelism__tensor": 3},
            {},
            "tensor is 3, which does not divide the model's 32 attention heads; the model allows 1,",
        ),
        (
            {"parallelism__tensor": 4},
            {"intermediate_size": 14},
            "tensor is 4, which does not divide the model's intermediate_size",
        ),
        (
            {"parallelism__tensor": 4},
            {"num_attention_heads": 24, "num_key_value_heads": 6, "head_dim": 64},
            "tensor is 4, which neither divides the model's 6 KV heads nor is a multiple of them",
        ),
        ({"parallelism__pipeline": 33}, {}, "pipeline is 33, above the model's 32 layers"),
        ({"model__maxContext": 200000}, {}, "maxContext is 200000, above the model's max_position_embeddings 131072"),
        (
            {"model__weights": "int4"},
            {"quantization_config": {"quant_method": "fbgemm_fp8"}},
            "weights is int4, but the checkpoint already holds fp8",
        ),
    ],
)
def test_what_the_model_does_not_allow_is_refused(deploy, shape, spec, changes, sentence):
    with pytest.raises(PlanError) as caught:
        make_plan(deploy(**spec), shape("8B", **changes))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("device", "checkpoint", "asked", "weights", "compute"),
    [
        ("cpu", "float32", "auto", "float32", "float32"),
        ("cpu", "float16", "auto", "bfloat16", "bfloat16"),
        ("cpu", "bfloat16", "auto", "bfloat16", "bfloat16"),
        ("cpu", "bfloat16", "float32", "float32", "float32"),
        ("H100-80GB", "float32", "auto", "bfloat16", "bfloat16"),
        ("H100-80GB", "bfloat16", "fp8", "fp8", "bfloat16"),
    ],
)
def test_types_that_auto_chooses(deploy, shape, device, checkpoint, asked, weights, compute):
    deployment = deploy(accelerator__type=device, model__weights=asked, model__maxContext=1024)
    plan = make_plan(deployment, shape("8B", torch_dtype=checkpoint))
    assert (plan.weights, plan.dtype, plan.kv_dtype) == (weights, compute, compute)


def test_a_quantised_checkpoint_is_kept_unless_asked_otherwise(deploy, shape):
    fp8 = shape("8B", quantization_config={"quant_method": "fp8"})
    assert make_plan(deploy(), fp8).weights == "fp8"
    assert make_plan(deploy(model__weights="bfloat16"), fp8).weights == "bfloat16"
