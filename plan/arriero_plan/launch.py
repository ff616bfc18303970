"""The launch file: all that a worker pod is started with, besides its pod index.

The operator mounts it from a ConfigMap, `arriero up` writes it to a run directory; `arriero-worker --launch FILE
--pod-index I` reads it. One file serves every pod of a group.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from arriero_plan.memory import KvFormat, WeightFormat


class LaunchError(ValueError):
    """A launch file that cannot be used; the message names the field."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Stage(_Frozen):
    """A contiguous slice of layers, [first_layer, end_layer)."""

    first_layer: int = Field(ge=0)
    end_layer: int = Field(gt=0)


class Layout(_Frozen):
    """Which rank runs what: rank = stage * tensor + tp_rank."""

    tensor: int = Field(ge=1)
    pipeline: int = Field(ge=1)
    stages: tuple[Stage, ...]

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline

    @model_validator(mode="after")
    def _stages_cover(self) -> Layout:
        if len(self.stages) != self.pipeline:
            raise ValueError(f"{len(self.stages)} stages for pipeline {self.pipeline}")
        end = 0
        for i, stage in enumerate(self.stages):
            if stage.first_layer != end or stage.end_layer <= stage.first_layer:
                raise ValueError(
                    f"stage {i} runs layers [{stage.first_layer}, {stage.end_layer}), expected to begin at {end}"
                )
            end = stage.end_layer
        return self


class Pod(_Frozen):
    """One pod of the group: its address as the other pods dial it, its ports, and the ranks it runs."""

    host: str
    ranks: tuple[int, ...]
    control_port: int = Field(default=9100, ge=1, le=65535)
    store_port: int = Field(default=29500, ge=1, le=65535)
    http_port: int = Field(default=8000, ge=0, le=65535)
    """Public HTTP on the leader's pod; on every pod /health and /metrics."""
    grpc_port: int = Field(default=9000, ge=0, le=65535)
    first_device: int = Field(
        default=0, ge=0, description="its first rank's, counted among the CUDA devices that the pod sees"
    )


class EngineSettings(_Frozen):
    """Limits of the engine, the same on every rank."""

    dtype: Literal["float32", "bfloat16"]
    weights: WeightFormat | None = Field(default=None, description="of the linear layers; null: dtype")
    kv_dtype: KvFormat | None = Field(default=None, description="of keys and values; null: dtype")
    max_context: int = Field(ge=1)
    block_size: int = Field(default=16, ge=1)
    kv_blocks: int = Field(ge=1)
    max_running: int = Field(default=256, ge=1, description="sequences with a slot at once")
    max_waiting: int = Field(default=1024, ge=1, description="queued requests beyond which new ones are refused")
    max_batch_tokens: int = Field(
        default=2048, ge=1, description="tokens of one step, prefill chunks and decodes together"
    )
    max_chunk_tokens: int = Field(
        default=0, ge=0, description="tokens of one sequence's prefill chunk; 0: only the budget"
    )
    prefix_cache: bool = True
    queue_timeout_seconds: float = Field(
        default=0, ge=0, description="default for requests that bring none; 0: no limit"
    )
    run_timeout_seconds: float = Field(default=0, ge=0)
    threads: int = Field(default=1, ge=1, description="CPU threads of one rank")

    @model_validator(mode="after")
    def _budget_holds_decodes(self) -> EngineSettings:
        if self.max_batch_tokens < self.max_running:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_running ({self.max_running}): each "
                "running sequence may decode a token in one step"
            )
        return self


class Launch(_Frozen):
    version: Literal[1] = 1
    deployment: str
    group: str
    backend: Literal["cpu", "cuda"] = "cpu"
    model_path: str
    served_names: tuple[str, ...] = Field(min_length=1)
    layout: Layout
    pods: tuple[Pod, ...]
    engine: EngineSettings
    drain_seconds: float = Field(default=120, ge=0)
    bind_address: str = Field(default="0.0.0.0", description="where the pods' servers listen; loopback on one machine")
    run_directory: str = Field(description="a private directory of the pod, for its sockets and shared memory names")

    @model_validator(mode="after")
    def _pods_cover_ranks(self) -> Launch:
        ranks = [rank for pod in self.pods for rank in pod.ranks]
        if ranks != list(range(self.layout.world)):
            raise ValueError(f"pods run ranks {ranks}, expected 0 to {self.layout.world - 1} in order, each once")
        return self

    @property
    def digest(self) -> str:
        """Names this launch: ranks of one group must have been started with the same file."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def pod_of(self, rank: int) -> int:
        return next(i for i, pod in enumerate(self.pods) if rank in pod.ranks)


def parse_launch(text: str, origin: str) -> Launch:
    """Validate a launch file's text; `origin` names the file in messages. Raises LaunchError."""
    try:
        return Launch.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise LaunchError(f"{origin}: {where}: {first['msg']}") from error
