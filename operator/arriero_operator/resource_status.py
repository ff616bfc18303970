"""The status of a LlamaDeployment: its schema, for the cluster and for whoever fills it in."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

Phase = Literal["Invalid", "Planning", "Idle", "Waiting", "Loading", "Progressing", "Updating", "Ready", "Degraded"]
GroupPhase = Literal[
    "Waiting",
    "Starting",
    "Downloading",
    "Loading",
    "Warming",
    "Joining",
    "Serving",
    "Recovering",
    "Draining",
    "Leaving",
    "Failed",
]
RankPhase = Literal["Starting", "Loading", "Warming", "Joining", "Serving", "Draining", "Failed"]

Message = Annotated[str, Field(max_length=4096)]
Word = Annotated[str, Field(max_length=253)]
Time = Annotated[str, Field(json_schema_extra={"format": "date-time"}, max_length=64)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Long = Annotated[int, Field(ge=0, le=2**62)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


class Condition(_Part):
    """One aspect of the deployment."""

    type: Annotated[str, Field(max_length=316)] = Field(
        description="Accepted, Planned, Scheduled, ModelLoaded, Available, Progressing or Degraded"
    )
    status: Literal["True", "False", "Unknown"] = Field(description="whether it holds")
    reason: Annotated[str, Field(max_length=1024)] = Field(description="why, in one word")
    message: Annotated[str, Field(max_length=32768)] = Field(description="why, for people")
    last_transition_time: Time = Field(description="when `status` last changed")
    observed_generation: Long = Field(description="generation of the spec that this was said of")


class PlanStatus(_Part):
    """How one replica is cut."""

    layout: Word = Field(description="as TP8xPP2")
    tensor: Count = Field(description="devices that share every layer of a stage")
    pipeline: Count = Field(description="stages, each a slice of the layers")
    pods_per_group: Count = Field(description="worker pods of one replica")
    devices_per_pod: Count = Field(description="devices, and so ranks, of one pod")
    bytes_per_device: Long = Field(description="memory that the fullest device holds")
    device_bytes: Long | None = Field(default=None, description="memory of one device, where there is a limit")
    weights: Word = Field(description="type of the weights")
    max_context: Count = Field(description="longest prompt plus answer, in tokens")
    kv_tokens: Long = Field(description="tokens whose keys and values one replica keeps")


class RankStatus(_Part):
    """One worker process bound to one device."""

    rank: Count = Field(description="its place: stage * tensor + place in the stage")
    pod: Word = Field(description="the pod that it runs in")
    node: Word | None = Field(default=None, description="the node that it runs on")
    phase: RankPhase = Field(description="where it is in its life, by the engine's own word")
    epoch: Long = Field(default=0, description="membership number of its group that it takes part in")
    bytes_loaded: Long | None = Field(default=None, description="bytes of weights read so far, in steps of 5 %")
    bytes_total: Long | None = Field(default=None, description="bytes of weights that it will hold")
    eta_seconds: Count | None = Field(default=None, description="when the weights will be there, roughly")
    reason: Message | None = Field(default=None, description="why it failed")


class DownloadStatus(_Part):
    """The model on its way to the pods of one group."""

    pods: Count = Field(description="pods that are still fetching it")
    bytes_fetched: Long = Field(description="bytes that these have so far, in steps of 5 %")
    bytes_total: Long = Field(description="bytes that these will have")
    eta_seconds: Count | None = Field(default=None, description="when it will be there, roughly")


class GroupStatus(_Part):
    """The pods of one replica."""

    name: Word = Field(description="name of its StatefulSet")
    revision: Word = Field(description="what its pods were made with")
    phase: GroupPhase = Field(description="where it is in its life")
    since: Time = Field(description="when this phase began")
    message: Message | None = Field(default=None, description="what it waits for, or what is wrong")
    epoch: Long = Field(default=0, description="its membership number; a lost rank raises it")
    download: DownloadStatus | None = Field(default=None, description="the model on its way, while it is")
    ranks: Annotated[list[RankStatus], Field(max_length=1024)] = Field(
        default_factory=list, description="its ranks, as far as they have spoken"
    )


class Endpoint(_Part):
    """Where clients ask, inside the cluster."""

    http: Word = Field(description="the OpenAI-compatible face")
    grpc: Word = Field(description="the gRPC face, host:port")


class AutoscalingStatus(_Part):
    """What the load asks for."""

    replicas: Count = Field(description="replicas wanted now")
    lower: Count | None = Field(default=None, description="replicas that have been enough since `lowerSince`")
    lower_since: Time | None = Field(default=None, description="since when fewer are enough")


class DeploymentStatus(_Part):
    """What is observed; written by the operator only."""

    observed_generation: Long = Field(description="generation of the spec that this status answers to")
    phase: Phase = Field(description="in one word, how it is")
    phase_since: Time = Field(description="when this phase began")
    message: Message | None = Field(default=None, description="in one sentence, what it waits for or what is wrong")
    conditions: Annotated[list[Condition], Field(max_length=16)] = Field(
        default_factory=list, description="the same in parts"
    )
    plan: PlanStatus | None = Field(default=None, description="how one replica is cut")
    replicas: Count = Field(default=0, description="groups there are")
    ready_replicas: Count = Field(default=0, description="groups that answer requests")
    updated_replicas: Count = Field(default=0, description="groups of the present revision")
    ready: Word = Field(default="0/0", description="groups that answer requests, of those wanted")
    autoscaling: AutoscalingStatus | None = Field(default=None, description="what the load asks for")
    revision: Word | None = Field(default=None, description="what new pods are made with")
    selector: Annotated[str, Field(max_length=1024)] = Field(default="", description="label selector of worker pods")
    endpoint: Endpoint | None = Field(default=None, description="where clients ask, inside the cluster")
    tokens_per_second: Count | None = Field(
        default=None, description="tokens generated by all groups, to two digits, where it is measured"
    )
    groups: Annotated[list[GroupStatus], Field(max_length=2000)] = Field(
        default_factory=list, description="the replicas' groups"
    )
