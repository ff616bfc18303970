"""From a LlamaDeployment and a model's shape to a plan: who holds what, and whether it fits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict

from arriero_plan.launch import Layout, Stage
from arriero_plan.layout import (
    MAX_CHOSEN_PIPELINE,
    candidates,
    pods_per_stage,
    share_layers,
    tensor_problem,
    valid_tensors,
)
from arriero_plan.memory import (
    DEVICE_BYTES,
    GIB,
    ComputeDtype,
    KvFormat,
    Limits,
    Precision,
    WeightFormat,
    ceil_div,
    count_parameters,
    embedding_bytes,
    final_norm_bytes,
    kv_bytes_per_token,
    layer_bytes_all,
    reserve_bytes,
    workspace_bytes,
)
from arriero_plan.model import ModelShape
from arriero_plan.resource import LlamaDeployment

__all__ = ["Plan", "PlanError", "StagePlan", "make_plan"]

_GPUS_PER_NODE = 8
_CPU_KV_TOKENS = 65_536
_CPU_KV_BYTES = 2 * GIB
_SHORTEST_HINT = 1024


class PlanError(ValueError):
    """A deployment that the model or the devices do not allow; the message says why, with the arithmetic."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StagePlan(_Frozen):
    """One rank of a stage, in bytes; all ranks of a stage hold equally much."""

    first_layer: int
    end_layer: int
    embedding_bytes: int
    layer_bytes: int
    head_bytes: int
    """The final norm and the head; of a tied embedding only where the stage does not already hold it."""
    kv_bytes: int
    workspace_bytes: int
    reserve_bytes: int

    @property
    def weight_bytes(self) -> int:
        return self.embedding_bytes + self.layer_bytes + self.head_bytes

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes + self.reserve_bytes


class Plan(_Frozen):
    """What the operator, the launcher and people need to know about one replica; serialisable as JSON."""

    deployment: str
    model: str
    parameters: int
    backend: Literal["cpu", "cuda"]
    accelerator: str
    device_bytes: int | None
    """Memory of one device; None for a cpu without a stated limit."""
    layout: Layout
    world: int
    ranks_per_pod: int
    pods_per_stage: int
    pods_per_group: int
    dtype: ComputeDtype
    weights: WeightFormat
    kv_dtype: KvFormat
    checkpoint_quantization: str | None
    """The checkpoint's quant_method, where it is quantised."""
    max_context: int
    block_size: int
    kv_blocks: int
    stages: tuple[StagePlan, ...]

    @property
    def kv_tokens(self) -> int:
        return self.kv_blocks * self.block_size


@dataclass(frozen=True, slots=True)
class _Request:
    """What a deployment asks of the planner."""

    shape: ModelShape
    precision: Precision
    limits: Limits
    cpu: bool
    device_bytes: int | None
    per_node: int | None
    tensor: int | None
    pipeline: int | None
    max_context: int
    block_size: int

    @property
    def context_blocks(self) -> int:
        return ceil_div(self.max_context, self.block_size)

    def layouts(self) -> Iterator[tuple[int, int]]:
        if self.cpu:
            return iter([(self.tensor or 1, self.pipeline or 1)])
        return candidates(self.shape, self.tensor, self.pipeline, self.per_node or _GPUS_PER_NODE)


def make_plan(deployment: LlamaDeployment, shape: ModelShape) -> Plan:
    """Choose the smallest layout that holds the model and at least one sequence of maxContext. Raises PlanError."""
    request = _request(deployment, shape)
    lightest: list[StagePlan] | None = None
    tried = (0, 0)
    for tensor, pipeline in request.layouts():
        stages = _place(request, tensor, pipeline)
        if _fits(request, stages):
            return _finish(deployment, request, tensor, pipeline, stages)
        if lightest is None or _heaviest(stages).total_bytes < _heaviest(lightest).total_bytes:
            lightest, tried = stages, (tensor, pipeline)
    assert lightest is not None
    raise PlanError(f"{deployment.metadata.name}: {_refusal(request, lightest, *tried)}")


def _request(deployment: LlamaDeployment, shape: ModelShape) -> _Request:
    spec = deployment.spec
    cpu = spec.accelerator.type == "cpu"
    tensor, pipeline = spec.parallelism.tensor, spec.parallelism.pipeline
    if tensor is not None and (problem := tensor_problem(shape, tensor)) is not None:
        allowed = ", ".join(str(t) for t in valid_tensors(shape, shape.num_heads))
        raise PlanError(f"spec.parallelism.tensor is {tensor}, which {problem}; the model allows {allowed}")
    if pipeline is not None and pipeline > shape.num_layers:
        raise PlanError(f"spec.parallelism.pipeline is {pipeline}, above the model's {shape.num_layers} layers")
    max_context = spec.model.max_context or shape.max_position_embeddings
    if max_context > shape.max_position_embeddings:
        raise PlanError(
            f"spec.model.maxContext is {max_context}, "
            f"above the model's max_position_embeddings {shape.max_position_embeddings}"
        )
    memory = spec.accelerator.memory_gib
    return _Request(
        shape=shape,
        precision=_precision(deployment, shape, cpu=cpu),
        limits=Limits(max_batch_tokens=spec.engine.max_batch_tokens, max_running=spec.engine.max_running),
        cpu=cpu,
        device_bytes=DEVICE_BYTES.get(spec.accelerator.type) if memory is None else math.ceil(memory * GIB),
        per_node=spec.accelerator.per_node,
        tensor=tensor,
        pipeline=pipeline,
        max_context=max_context,
        block_size=spec.engine.block_size,
    )


def _precision(deployment: LlamaDeployment, shape: ModelShape, *, cpu: bool) -> Precision:
    """Resolve `auto`: as the checkpoint holds them, but float16 becomes bfloat16, and on GPUs float32 does too."""
    asked = deployment.spec.model.weights
    stored = shape.quantization
    weights: WeightFormat
    if asked == "auto":
        if stored is not None:
            weights = stored.weights
        else:
            weights = "float32" if cpu and shape.dtype == "float32" else "bfloat16"
    else:
        weights = asked
    if stored is not None and weights not in (stored.weights, "float32", "bfloat16"):
        raise PlanError(f"spec.model.weights is {weights}, but the checkpoint already holds {stored.weights}")
    compute: ComputeDtype = "float32" if weights == "float32" else "bfloat16"
    kv = deployment.spec.model.kv_cache.dtype
    return Precision(
        compute=compute,
        weights=weights,
        kv=compute if kv == "auto" else kv,
        stored=stored if stored is not None and stored.weights == weights else None,
    )


def _place(request: _Request, tensor: int, pipeline: int) -> list[StagePlan]:
    """The stages of one layout, with the KV of one longest sequence.

    Stages are balanced by their weights, which is what a decode step reads and so its time; where that does not fit, by
    all they must hold, so that a layout is refused only when no division of its layers fits.
    """
    stages = _divide(request, tensor, pipeline, by_weights=True)
    if not _fits(request, stages):
        stages = min(
            stages, _divide(request, tensor, pipeline, by_weights=False), key=lambda s: _heaviest(s).total_bytes
        )
    return stages


def _divide(request: _Request, tensor: int, pipeline: int, *, by_weights: bool) -> list[StagePlan]:
    shape, precision = request.shape, request.precision
    table = embedding_bytes(shape, tensor, precision)
    layers = layer_bytes_all(shape, tensor, precision)
    kv = kv_bytes_per_token(shape, tensor, precision) * request.context_blocks * request.block_size
    reserve = reserve_bytes(tensor * pipeline, request.device_bytes or 0, cpu=request.cpu)
    last = pipeline - 1
    embeddings = [table if stage == 0 else 0 for stage in range(pipeline)]
    heads = [0] * pipeline
    heads[last] = final_norm_bytes(shape, precision) + (0 if shape.tie_word_embeddings and last == 0 else table)
    workspaces = [
        workspace_bytes(shape, tensor, pipeline, precision, request.limits, last=stage == last)
        for stage in range(pipeline)
    ]
    fixed = [e + h + (0 if by_weights else w) for e, h, w in zip(embeddings, heads, workspaces, strict=True)]
    mean_layer = sum(layers) // len(layers) + (0 if by_weights else kv)
    stages, end = [], 0
    for stage, count in enumerate(share_layers(shape.num_layers, fixed, mean_layer)):
        first, end = end, end + count
        stages.append(
            StagePlan(
                first_layer=first,
                end_layer=end,
                embedding_bytes=embeddings[stage],
                layer_bytes=sum(layers[first:end]),
                head_bytes=heads[stage],
                kv_bytes=kv * count,
                workspace_bytes=workspaces[stage],
                reserve_bytes=reserve,
            )
        )
    return stages


def _heaviest(stages: list[StagePlan]) -> StagePlan:
    return max(stages, key=lambda stage: stage.total_bytes)


def _fits(request: _Request, stages: list[StagePlan]) -> bool:
    return request.device_bytes is None or _heaviest(stages).total_bytes <= request.device_bytes


def _finish(
    deployment: LlamaDeployment, request: _Request, tensor: int, pipeline: int, stages: list[StagePlan]
) -> Plan:
    blocks = _kv_blocks(request, tensor, stages)
    block_bytes = kv_bytes_per_token(request.shape, tensor, request.precision) * request.block_size
    pods = pods_per_stage(tensor, request.per_node or (tensor if request.cpu else _GPUS_PER_NODE))
    return Plan(
        deployment=deployment.metadata.name,
        model=deployment.spec.model.name,
        parameters=count_parameters(request.shape),
        backend="cpu" if request.cpu else "cuda",
        accelerator=deployment.spec.accelerator.type,
        device_bytes=request.device_bytes,
        layout=Layout(
            tensor=tensor,
            pipeline=pipeline,
            stages=tuple(Stage(first_layer=s.first_layer, end_layer=s.end_layer) for s in stages),
        ),
        world=tensor * pipeline,
        ranks_per_pod=tensor // pods,
        pods_per_stage=pods,
        pods_per_group=pods * pipeline,
        dtype=request.precision.compute,
        weights=request.precision.weights,
        kv_dtype=request.precision.kv,
        checkpoint_quantization=request.shape.quantization.method if request.shape.quantization else None,
        max_context=request.max_context,
        block_size=request.block_size,
        kv_blocks=blocks,
        stages=tuple(
            s.model_copy(update={"kv_bytes": blocks * block_bytes * (s.end_layer - s.first_layer)}) for s in stages
        ),
    )


def _kv_blocks(request: _Request, tensor: int, stages: list[StagePlan]) -> int:
    """Blocks of every rank: what the fullest stage leaves free, and on a cpu no more than can be of use.

    A GPU's memory is of no other use, so all of it goes to KV. A cpu's is shared with everything else on the machine:
    without a stated limit it gets 65,536 tokens, in 2 GiB at most; and never more than maxRunning longest sequences;
    but always one such sequence.
    """
    block_bytes = kv_bytes_per_token(request.shape, tensor, request.precision) * request.block_size
    per_stage = [block_bytes * (stage.end_layer - stage.first_layer) for stage in stages]
    if request.device_bytes is not None:
        free = [request.device_bytes - stage.total_bytes + stage.kv_bytes for stage in stages]
        blocks = min(space // size for space, size in zip(free, per_stage, strict=True))
    else:
        blocks = min(_CPU_KV_TOKENS // request.block_size, _CPU_KV_BYTES // max(per_stage))
    if request.cpu:
        blocks = min(blocks, request.limits.max_running * request.context_blocks)
    return max(blocks, request.context_blocks)


def _refusal(request: _Request, stages: list[StagePlan], tensor: int, pipeline: int) -> str:
    """The arithmetic of the heaviest stage, and what would help."""
    assert request.device_bytes is not None
    heaviest = _heaviest(stages)
    parts = {
        "weights": heaviest.weight_bytes,
        "KV": heaviest.kv_bytes,
        "workspace": heaviest.workspace_bytes,
        "reserve": heaviest.reserve_bytes,
    }
    need, terms, has = _round_terms(list(parts.values()), request.device_bytes)
    arithmetic = " + ".join(f"{name} {term}" for name, term in zip(parts, terms, strict=True))
    where = f"stage {stages.index(heaviest)} of tensor {tensor} x pipeline {pipeline}"
    return (
        f"needs {need} GiB per device, has {has}: {arithmetic} "
        f"({where}, KV for one sequence of {request.max_context} tokens); {_hint(request, tensor, pipeline)}"
    )


def _round_terms(values: list[int], limit: int) -> tuple[str, list[str], str]:
    """Total, terms and limit in GiB: the total rounded up, the limit down, the terms so that they add up."""
    digits = 1 if limit >= 10 * GIB else 2 if limit >= GIB else 4
    unit = 10**digits
    total = math.ceil(sum(values) * unit / GIB)
    rounded = [round(value * unit / GIB) for value in values]
    rounded[values.index(max(values))] += total - sum(rounded)
    text = [f"{value / unit:.{digits}f}" for value in (total, *rounded, math.floor(limit * unit / GIB))]
    return text[0], text[1:-1], text[-1]


def _hint(request: _Request, tensor: int, pipeline: int) -> str:
    """The smallest change that fits: a wider stage in the node, a longer pipeline, a wider stage, then less to hold."""

    def fits(changed: _Request, tensor: int, pipeline: int) -> bool:
        return _fits(changed, _place(changed, tensor, pipeline))

    wider = [t for t in valid_tensors(request.shape, request.shape.num_heads) if t > tensor]
    node = request.per_node or _GPUS_PER_NODE
    longest = min(request.shape.num_layers, MAX_CHOSEN_PIPELINE)
    tries = [(t, pipeline, f"tensor: {t}") for t in wider if t <= node]
    tries += [(tensor, p, f"pipeline: {p}") for p in range(pipeline + 1, longest + 1)]
    tries += [(t, pipeline, f"tensor: {t}") for t in wider if t > node]
    for t, p, words in tries:
        if fits(request, t, p):
            return f"{words} would fit"
    context = 1 << (request.max_context.bit_length() - 1)
    while context >= _SHORTEST_HINT:
        if context < request.max_context and fits(replace(request, max_context=context), tensor, pipeline):
            return f"maxContext: {context} would fit"
        context //= 2
    if request.precision.weights in ("float32", "bfloat16") and request.shape.quantization is None and not request.cpu:
        smaller: tuple[WeightFormat, ...] = ("fp8", "int4")
        for weights in smaller:
            precision = replace(request.precision, compute="bfloat16", weights=weights)
            if fits(replace(request, precision=precision), tensor, pipeline):
                return f"weights: {weights} would fit"
    return "no other layout would fit: it needs devices with more memory, a shorter maxContext or smaller weights"
