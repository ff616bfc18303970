"""Llama 3.1 8B, 70B and 405B on 80 GB and 141 GB devices, checked by arithmetic that does not use the planner's.

Public figures: 8.030 B, 70.554 B and 405.853 B parameters, of which embedding and head are 128,256 x hidden each.
A token's keys and values in bfloat16 take 128, 320 and 504 KiB over all layers (2 x layers x 8 heads x 128 x 2 bytes).
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from arriero_plan.plan import PlanError, make_plan

GIB = 1 << 30
PARAMETERS = {"8B": 8.030261e9, "70B": 70.553706e9, "405B": 405.853389e9}
HIDDEN = {"8B": 4096, "70B": 8192, "405B": 16384}
KV_KIB = {"8B": 128, "70B": 320, "405B": 504}
DEVICE = {"H100-80GB": 79.10, "H200-141GB": 139.80}

# GiB of the last stage's step of 2,048 tokens and 256 sequences, summed by hand from the stated formula:
# 2,048 x (3, or in a pipeline 5, hidden + 3 inner/tensor) x 2 + 256 x heads/tensor x 16 x 130 x 4
# + 256 x (vocabulary/tensor + 2 vocabulary) x 4.
WORKSPACE = {
    ("8B", 1, 1): (226_492_416 + 68_157_440 + 394_002_432) / GIB,
    ("70B", 1, 1): (452_984_832 + 136_314_880 + 394_002_432) / GIB,
    ("70B", 2, 1): (276_824_064 + 68_157_440 + 328_335_360) / GIB,
    ("70B", 4, 1): (188_743_680 + 34_078_720 + 295_501_824) / GIB,
    ("405B", 4, 1): (364_904_448 + 68_157_440 + 295_501_824) / GIB,
    ("405B", 8, 1): (283_115_520 + 34_078_720 + 279_085_056) / GIB,
    ("405B", 8, 2): (417_333_248 + 34_078_720 + 279_085_056) / GIB,
}


class Row(NamedTuple):
    size: str
    device: str
    weights: str
    context: int
    tensor: int
    pipeline: int
    layers: list[int]
    weights_gib: float
    kv_gib: float
    too_small: tuple[int, int] | None
    """The next smaller layout, which must be refused."""


H100, H200 = "H100-80GB", "H200-141GB"
K8, K128 = 8192, 131072
GOLDEN = [
    Row("8B", H100, "bfloat16", K8, 1, 1, [32], 14.96, 60.32, None),
    Row("8B", H100, "bfloat16", K128, 1, 1, [32], 14.96, 60.32, None),
    Row("8B", H100, "fp8", K8, 1, 1, [32], 8.46, 66.81, None),
    Row("8B", H100, "fp8", K128, 1, 1, [32], 8.46, 66.81, None),
    Row("8B", H200, "bfloat16", K8, 1, 1, [32], 14.96, 119.80, None),
    Row("8B", H200, "bfloat16", K128, 1, 1, [32], 14.96, 119.80, None),
    Row("8B", H200, "fp8", K8, 1, 1, [32], 8.46, 126.30, None),
    Row("8B", H200, "fp8", K128, 1, 1, [32], 8.46, 126.30, None),
    # 131.4 GiB of weights on two devices leave 8.6 GiB each for KV; one longest sequence of 128K needs 40 GiB over all.
    Row("70B", H100, "bfloat16", K8, 2, 1, [80], 65.71, 8.58, (1, 1)),
    Row("70B", H100, "bfloat16", K128, 4, 1, [80], 32.86, 41.58, (2, 1)),
    Row("70B", H100, "fp8", K8, 1, 1, [80], 67.69, 7.31, None),
    Row("70B", H100, "fp8", K128, 2, 1, [80], 33.85, 40.44, (1, 1)),
    Row("70B", H200, "bfloat16", K8, 1, 1, [80], 131.42, 3.07, None),
    Row("70B", H200, "bfloat16", K128, 2, 1, [80], 65.71, 68.07, (1, 1)),
    Row("70B", H200, "fp8", K8, 1, 1, [80], 67.69, 66.80, None),
    Row("70B", H200, "fp8", K128, 1, 1, [80], 67.69, 66.80, None),
    # 756 GiB: a node of eight 80 GB devices is too small, so a second stage; eight of 141 GB are enough.
    Row("405B", H100, "bfloat16", K8, 8, 2, [63, 63], 47.25, 26.99, (8, 1)),
    Row("405B", H100, "bfloat16", K128, 8, 2, [63, 63], 47.25, 26.99, (8, 1)),
    Row("405B", H100, "fp8", K8, 8, 1, [126], 47.77, 26.60, (4, 1)),
    Row("405B", H100, "fp8", K128, 8, 1, [126], 47.77, 26.60, (4, 1)),
    Row("405B", H200, "bfloat16", K8, 8, 1, [126], 94.50, 39.35, (4, 1)),
    Row("405B", H200, "bfloat16", K128, 8, 1, [126], 94.50, 39.35, (4, 1)),
    Row("405B", H200, "fp8", K8, 4, 1, [126], 95.51, 38.22, (2, 1)),
    Row("405B", H200, "fp8", K128, 4, 1, [126], 95.51, 38.22, (2, 1)),
]


def row_id(row):
    return f"{row.size}-{row.device}-{row.weights}-{row.context}"


@pytest.fixture
def plan_of(deploy, shape):
    def plan(row, tensor=None, pipeline=None):
        deployment = deploy(
            model__maxContext=row.context,
            model__weights=row.weights,
            accelerator__type=row.device,
            parallelism__tensor=tensor,
            parallelism__pipeline=pipeline,
        )
        return make_plan(deployment, shape(row.size))

    return plan


@pytest.mark.parametrize("row", GOLDEN, ids=row_id)
def test_chosen_layout_and_bytes_per_device(plan_of, row):
    plan = plan_of(row)
    assert (plan.layout.tensor, plan.layout.pipeline) == (row.tensor, row.pipeline)
    assert [stage.end_layer - stage.first_layer for stage in plan.stages] == row.layers
    fullest = max(plan.stages, key=lambda stage: stage.total_bytes)
    assert fullest.weight_bytes / GIB == pytest.approx(row.weights_gib, abs=0.01)
    assert fullest.kv_bytes / GIB == pytest.approx(row.kv_gib, abs=0.01)


@pytest.mark.parametrize("row", GOLDEN, ids=row_id)
def test_the_table_agrees_with_arithmetic_from_public_figures(plan_of, row):
    world = row.tensor * row.pipeline
    tables = 2 * 128_256 * HIDDEN[row.size]
    element = 2 if row.weights == "bfloat16" else 1
    total = (PARAMETERS[row.size] - tables) * element + tables * 2
    # Scales of fp8 and norms on every rank add less than 0.2%.
    assert row.weights_gib == pytest.approx(total / world / GIB, rel=2e-3)

    reserve = 0.6 + 1.0 + (1.0 if world > 1 else 0.0) + 0.02 * DEVICE[row.device]
    left = DEVICE[row.device] - row.weights_gib - reserve - WORKSPACE[row.size, row.tensor, row.pipeline]
    assert row.kv_gib == pytest.approx(left, abs=0.02)

    tokens = row.kv_gib * 2**20 / (KV_KIB[row.size] / world)
    plan = plan_of(row)
    assert plan.kv_blocks * 16 == pytest.approx(tokens, rel=2e-3)
    assert plan.kv_blocks * 16 >= row.context


@pytest.mark.parametrize("row", [row for row in GOLDEN if row.too_small], ids=row_id)
def test_the_next_smaller_layout_is_refused(plan_of, row):
    with pytest.raises(PlanError, match=r"needs .* GiB per device"):
        plan_of(row, *row.too_small)


def test_a_refusal_shows_the_arithmetic_and_what_would_fit(deploy, shape):
    """131.42 GiB of weights over 2, 40 GiB of KV over 2, 0.627 of workspace, 4.182 of reserve: 90.52."""
    with pytest.raises(PlanError) as caught:
        make_plan(deploy(parallelism__tensor=2, parallelism__pipeline=1), shape("70B"))
    assert str(caught.value) == (
        "llama: needs 90.6 GiB per device, has 79.1: weights 65.8 + KV 20.0 + workspace 0.6 + reserve 4.2 "
        "(stage 0 of tensor 2 x pipeline 1, KV for one sequence of 131072 tokens); tensor: 4 would fit"
    )


def test_pipelines_count_embedding_and_head_as_layers(deploy, shape):
    """70B: an embedding is 1.23 layers. 80 + 2.46 over 4 stages: 21 inside, 19 + 1.23 at the ends."""
    plan = make_plan(deploy(parallelism__tensor=2, parallelism__pipeline=4), shape("70B"))
    assert [stage.end_layer - stage.first_layer for stage in plan.stages] == [19, 21, 21, 19]
    # 405B: a layer has 3.19 B parameters, a table 2.10 B, so 0.66 of a layer each: 127.3 over 3.
    plan = make_plan(deploy(parallelism__tensor=8, parallelism__pipeline=3), shape("405B"))
    assert [stage.end_layer - stage.first_layer for stage in plan.stages] == [42, 42, 42]


@pytest.mark.parametrize(
    ("tensor", "pipeline", "per_node", "pods_per_stage", "ranks_per_pod", "pods"),
    [(8, 2, 8, 1, 8, 2), (16, 1, 8, 2, 8, 2), (16, 2, 8, 2, 8, 4), (4, 2, 8, 1, 4, 2), (8, 1, 3, 4, 2, 4)],
)
def test_pods_of_a_group(deploy, shape, tensor, pipeline, per_node, pods_per_stage, ranks_per_pod, pods):
    deployment = deploy(
        parallelism__tensor=tensor, parallelism__pipeline=pipeline, accelerator__perNode=per_node, model__weights="int4"
    )
    plan = make_plan(deployment, shape("405B" if tensor == 16 else "70B"))
    assert (plan.pods_per_stage, plan.ranks_per_pod, plan.pods_per_group) == (pods_per_stage, ranks_per_pod, pods)
