"""Which layouts a model allows, which are tried, and how layers are shared out over stages."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from arriero_plan.memory import ceil_div
from arriero_plan.model import ModelShape

MAX_CHOSEN_PIPELINE = 64
"""Longest pipeline the planner chooses by itself; a longer one only where it is asked for."""


def tensor_problem(shape: ModelShape, tensor: int) -> str | None:
    """Why a model cannot be cut over `tensor` ranks; None where it can."""
    if shape.num_heads % tensor:
        return f"does not divide the model's {shape.num_heads} attention heads"
    if shape.intermediate_size % tensor:
        return f"does not divide the model's intermediate_size {shape.intermediate_size}"
    if shape.num_kv_heads % tensor and tensor % shape.num_kv_heads:
        return f"neither divides the model's {shape.num_kv_heads} KV heads nor is a multiple of them"
    return None


def valid_tensors(shape: ModelShape, limit: int) -> list[int]:
    """Every tensor size up to `limit` that the model allows, ascending."""
    return [tensor for tensor in range(1, min(limit, shape.num_heads) + 1) if tensor_problem(shape, tensor) is None]


def candidates(shape: ModelShape, tensor: int | None, pipeline: int | None, per_node: int) -> Iterator[tuple[int, int]]:
    """Layouts (tensor, pipeline) in the order they are tried; what is given stays.

    Tensor parallelism grows first, inside a node, because its all-reduces need the node's links; then pipelines grow
    across nodes, each stage as wide as a node allows; a stage wider than a node comes last.
    """
    longest = min(shape.num_layers, MAX_CHOSEN_PIPELINE)
    pipelines = range(1, longest + 1) if pipeline is None else range(pipeline, pipeline + 1)
    if tensor is not None:
        yield from ((tensor, p) for p in pipelines)
        return
    tensors = valid_tensors(shape, shape.num_heads)
    inside = [t for t in tensors if t <= per_node]
    for t in inside:
        yield t, pipelines[0]
    for p in pipelines[1:]:
        yield inside[-1], p
    for t in tensors[len(inside) :]:
        for p in pipelines:
            yield t, p


def share_layers(num_layers: int, fixed: list[int], layer: int) -> list[int]:
    """Layers of each stage, such that the heaviest stage is as light as it can be.

    fixed: what each stage holds besides layers (embedding, head); layer: the weight of one layer, in the same unit.
    Every stage gets at least one. Giving each next layer to the stage that stays lightest is optimal because all layers
    weigh the same; ties go to the earliest stage, since the last one also samples.
    """
    assert 1 <= len(fixed) <= num_layers
    counts = [1] * len(fixed)
    heap = [(base + 2 * layer, stage) for stage, base in enumerate(fixed)]
    heapq.heapify(heap)
    for _ in range(num_layers - len(fixed)):
        weight, stage = heap[0]
        counts[stage] += 1
        heapq.heapreplace(heap, (weight + layer, stage))
    return counts


def pods_per_stage(tensor: int, per_node: int) -> int:
    """The fewest pods that hold a stage with equally many ranks in each, none above a node's devices."""
    return next(pods for pods in range(ceil_div(tensor, per_node), tensor + 1) if tensor % pods == 0)
