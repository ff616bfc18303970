"""The LlamaDeployment resource: the one description that planner, launcher and operator share.

Field names in YAML are camelCase. Every field is described and bounded here, because the cluster's schema is generated
from this model. Values are strict: "2" is not 2.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

API_VERSION = "serving.arriero.dev/v1alpha1"
KIND = "LlamaDeployment"

WeightsChoice = Literal["auto", "float32", "bfloat16", "fp8", "int8", "int4"]
KvChoice = Literal["auto", "float32", "bfloat16", "fp8"]
AcceleratorType = Literal["H100-80GB", "H200-141GB", "cpu"]
RouterPolicy = Literal["prefix", "least-load", "power-of-two", "round-robin", "hash"]

DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
DNS_SUBDOMAIN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
DATA_KEY = r"^[-._a-zA-Z0-9]+$"
QUALIFIED_NAME = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
MODEL_NAME = r"^[A-Za-z0-9]([-A-Za-z0-9._:/]*[A-Za-z0-9])?$"
HUB_REPO = r"^[A-Za-z0-9][-A-Za-z0-9._]*/[A-Za-z0-9][-A-Za-z0-9._]*$"
RELATIVE_PATH = r"^[^/].*$"
OBJECT_URI = r"^(s3|gs)://[^/]+(/.*)?$"

PATTERN_WORDS = {
    DNS_LABEL: "lower-case letters, digits and '-', beginning and ending with a letter or digit",
    DNS_SUBDOMAIN: "lower-case letters, digits, '-' and '.', beginning and ending with a letter or digit",
    DATA_KEY: "letters, digits, '-', '_' and '.'",
    QUALIFIED_NAME: "a name such as nvidia.com/gpu",
    MODEL_NAME: "letters, digits and -._:/, beginning and ending with a letter or digit",
    HUB_REPO: "owner/name",
    RELATIVE_PATH: "a path inside the volume, not beginning with '/'",
    OBJECT_URI: "s3://bucket/prefix or gs://bucket/prefix",
}
"""What each pattern means, for messages."""

# A group is named <deployment>-<replica>, its pods <group>-<index>; Kubernetes adds an 11-character hash to labels of a
# StatefulSet's pods and 17 characters to names of a Deployment's, all within 63.
_NAME_LIMIT = 40

Name = Annotated[str, Field(pattern=DNS_SUBDOMAIN, min_length=1, max_length=253)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, alias_generator=to_camel)


class Metadata(_Part):
    """Kubernetes' ObjectMeta: what people write, and what the API server adds when a resource is read back."""

    name: str = Field(pattern=DNS_LABEL, min_length=1, max_length=_NAME_LIMIT, description="name of the deployment")
    namespace: str | None = Field(default=None, pattern=DNS_LABEL, max_length=63, description="namespace it lives in")
    labels: dict[str, str] = Field(default_factory=dict, description="labels of the resource")
    annotations: dict[str, str] = Field(default_factory=dict, description="annotations of the resource")
    generate_name: Any = Field(default=None, description="set by the API server")
    uid: Any = Field(default=None, description="set by the API server")
    resource_version: Any = Field(default=None, description="set by the API server")
    generation: Any = Field(default=None, description="set by the API server")
    creation_timestamp: Any = Field(default=None, description="set by the API server")
    deletion_timestamp: Any = Field(default=None, description="set by the API server")
    deletion_grace_period_seconds: Any = Field(default=None, description="set by the API server")
    finalizers: Any = Field(default=None, description="set by controllers")
    owner_references: Any = Field(default=None, description="set by controllers")
    managed_fields: Any = Field(default=None, description="set by the API server")
    self_link: Any = Field(default=None, description="set by old API servers")


class PersistentVolumeClaimSource(_Part):
    """A directory in a volume that every worker pod can read."""

    claim_name: Name = Field(description="name of a PersistentVolumeClaim in the deployment's namespace")
    path: str = Field(
        default=".", pattern=RELATIVE_PATH, max_length=4096, description="directory of the checkpoint in the volume"
    )

    @model_validator(mode="after")
    def _inside(self) -> PersistentVolumeClaimSource:
        if ".." in self.path.split("/"):
            raise ValueError(f"path is {self.path!r}, which leaves the volume")
        return self


class HostPathSource(_Part):
    """A directory on the node (or, on one machine, on this machine)."""

    path: str = Field(
        min_length=1,
        max_length=4096,
        description="directory of the checkpoint; on one machine a relative path begins at the file's own directory",
    )


class ImageSource(_Part):
    """An OCI image whose root is the checkpoint, mounted as an image volume."""

    reference: str = Field(min_length=1, max_length=1024, pattern=r"^\S+$", description="reference of the image")


class SecretKeyRef(_Part):
    """One key of a Secret in the deployment's namespace."""

    name: Name = Field(description="name of the Secret")
    key: str = Field(default="token", pattern=DATA_KEY, max_length=253, description="key in the Secret")


class SecretRef(_Part):
    """A Secret in the deployment's namespace; its keys become environment variables of the loader."""

    name: Name = Field(description="name of the Secret")


class HuggingFaceSource(_Part):
    """A repository of the Hugging Face hub."""

    repo: str = Field(pattern=HUB_REPO, max_length=256, description="repository, owner/name")
    revision: str = Field(
        default="main", min_length=1, max_length=256, pattern=r"^\S+$", description="branch, tag or commit"
    )
    token_secret_ref: SecretKeyRef | None = Field(default=None, description="where the access token is kept")


class ObjectStoreSource(_Part):
    """A prefix of an object store."""

    uri: str = Field(pattern=OBJECT_URI, max_length=2048, description="prefix that holds the checkpoint")
    secret_ref: SecretRef | None = Field(default=None, description="where the store's credentials are kept")


class ModelSource(_Part):
    """Where the checkpoint lies: exactly one of these."""

    persistent_volume_claim: PersistentVolumeClaimSource | None = Field(default=None, description="a shared volume")
    host_path: HostPathSource | None = Field(default=None, description="a directory of the node")
    image: ImageSource | None = Field(default=None, description="an OCI image")
    hugging_face: HuggingFaceSource | None = Field(default=None, description="the Hugging Face hub")
    object_store: ObjectStoreSource | None = Field(default=None, description="an object store")

    @model_validator(mode="after")
    def _exactly_one(self) -> ModelSource:
        chosen = [to_camel(name) for name in type(self).model_fields if getattr(self, name) is not None]
        if len(chosen) != 1:
            known = ", ".join(to_camel(name) for name in type(self).model_fields)
            raise ValueError(f"expected exactly one of {known}, found {' and '.join(chosen) or 'none'}")
        return self


class KvCache(_Part):
    """How keys and values are kept."""

    dtype: KvChoice = Field(default="auto", description="type of keys and values; auto: that of the computation")


class Model(_Part):
    """What is served."""

    name: str = Field(pattern=MODEL_NAME, min_length=1, max_length=256, description="name that requests ask for")
    source: ModelSource = Field(description="where the checkpoint lies")
    max_context: int | None = Field(
        default=None,
        ge=1,
        le=2**24,
        description="longest prompt plus answer, in tokens; omitted: what the model allows",
    )
    weights: WeightsChoice = Field(
        default="auto", description="type of the weights; auto: what the checkpoint holds (a GPU computes in bfloat16)"
    )
    kv_cache: KvCache = Field(default_factory=KvCache, description="how keys and values are kept")


class Parallelism(_Part):
    """How one replica is cut; what is omitted the planner chooses."""

    tensor: int | None = Field(default=None, ge=1, le=1024, description="devices that share every layer of a stage")
    pipeline: int | None = Field(default=None, ge=1, le=1024, description="stages, each a slice of the layers")


class Accelerator(_Part):
    """The devices that ranks run on."""

    type: AcceleratorType = Field(description="kind of device")
    per_node: int | None = Field(
        default=None, ge=1, le=64, description="devices of one node; omitted: 8, or on cpu as many as a stage has ranks"
    )
    resource_name: str | None = Field(
        default=None,
        pattern=QUALIFIED_NAME,
        max_length=253,
        description="extended resource a pod asks for; omitted: nvidia.com/gpu",
    )
    memory_gib: float | None = Field(
        default=None,
        alias="memoryGiB",
        gt=0,
        le=4096,
        allow_inf_nan=False,
        description="memory of one device in GiB; omitted: what the type has, and on cpu as much as the plan needs",
    )

    @model_validator(mode="after")
    def _cpu_has_no_resource(self) -> Accelerator:
        if self.type == "cpu" and self.resource_name is not None:
            raise ValueError(f"resourceName is {self.resource_name!r}, but a cpu is no extended resource: leave it out")
        return self


class Router(_Part):
    """The router in front of the replicas."""

    replicas: int = Field(default=1, ge=0, le=100, description="router pods")
    policy: RouterPolicy = Field(default="prefix", description="how a replica is picked for a request")


class Autoscaling(_Part):
    """Replicas follow the load between two bounds."""

    min_replicas: int = Field(default=1, ge=0, le=1000, description="replicas kept when idle; 0: none")
    max_replicas: int = Field(ge=1, le=1000, description="replicas at most")
    target_running_per_replica: int = Field(
        default=64, ge=1, le=65536, description="running requests that one replica should have"
    )
    scale_down_seconds: int = Field(
        default=300, ge=0, le=86_400, description="how long fewer replicas must have been enough before any goes"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"minReplicas is {self.min_replicas}, above maxReplicas ({self.max_replicas})")
        return self


class Rollout(_Part):
    """How replicas are replaced."""

    max_surge: int = Field(default=1, ge=0, le=1000, description="replicas above the wanted number while rolling")
    max_unavailable: int = Field(default=0, ge=0, le=1000, description="replicas below the wanted number while rolling")
    drain_seconds: int = Field(default=120, ge=0, le=86400, description="time that running requests get to finish")

    @model_validator(mode="after")
    def _can_move(self) -> Rollout:
        if self.max_surge == 0 and self.max_unavailable == 0:
            raise ValueError("maxSurge and maxUnavailable are both 0: no replica could ever be replaced")
        return self


class Placement(_Part):
    """Where the pods of one group go."""

    topology_key: str = Field(
        pattern=QUALIFIED_NAME, max_length=316, description="node label that a group stays within"
    )
    mode: Literal["Preferred", "Required"] = Field(default="Preferred", description="whether it must, or should")


class Engine(_Part):
    """Limits of one replica's engine."""

    max_running: int = Field(default=256, ge=1, le=65536, description="sequences that run at once")
    max_waiting: int = Field(default=1024, ge=1, le=2**20, description="queued requests beyond which new ones get 429")
    max_batch_tokens: int = Field(
        default=2048, ge=1, le=2**20, description="tokens of one step, prefill chunks and decodes together"
    )
    max_chunk_tokens: int = Field(
        default=0, ge=0, le=2**20, description="tokens of one sequence's prefill chunk; 0: up to maxBatchTokens"
    )
    block_size: int = Field(default=16, ge=1, le=256, description="token slots of one KV block")
    prefix_cache: bool = Field(default=True, description="reuse KV blocks of equal prefixes")
    queue_timeout_seconds: float = Field(
        default=0, ge=0, le=86400, allow_inf_nan=False, description="longest wait in the queue; 0: no limit"
    )
    run_timeout_seconds: float = Field(
        default=0, ge=0, le=86400, allow_inf_nan=False, description="longest run of a request; 0: no limit"
    )
    threads_per_rank: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="CPU threads of one rank; omitted: the starter shares out the machine's",
    )

    @model_validator(mode="after")
    def _chunk_within_batch(self) -> Engine:
        if self.max_chunk_tokens > self.max_batch_tokens:
            raise ValueError(
                f"maxChunkTokens is {self.max_chunk_tokens}, above maxBatchTokens ({self.max_batch_tokens})"
            )
        if self.max_running > self.max_batch_tokens:
            raise ValueError(
                f"maxRunning is {self.max_running}, above maxBatchTokens ({self.max_batch_tokens}): "
                "each running sequence may decode a token in one step"
            )
        return self


class Spec(_Part):
    """What is wanted."""

    model: Model = Field(description="what is served")
    replicas: int = Field(default=1, ge=0, le=1000, description="whole copies of the model")
    parallelism: Parallelism = Field(default_factory=Parallelism, description="how one replica is cut")
    accelerator: Accelerator = Field(description="the devices that ranks run on")
    router: Router = Field(default_factory=Router, description="the router in front of the replicas")
    autoscaling: Autoscaling | None = Field(
        default=None, description="let the number of replicas follow the load; `replicas` is where it begins"
    )
    rollout: Rollout = Field(default_factory=Rollout, description="how replicas are replaced")
    placement: Placement | None = Field(default=None, description="where the pods of one group go")
    engine: Engine = Field(default_factory=Engine, description="limits of one replica's engine")
    pod_template: dict[str, Any] = Field(
        default_factory=dict, description="strategic overlay on worker pods: tolerations, env, volumes, resources"
    )


class LlamaDeployment(_Part):
    """One model, served by replicas that are each cut over several devices."""

    api_version: Literal["serving.arriero.dev/v1alpha1"] = Field(description="version of this schema")
    kind: Literal["LlamaDeployment"] = Field(description="kind of this resource")
    metadata: Metadata = Field(description="Kubernetes' metadata")
    spec: Spec = Field(description="what is wanted")
    status: dict[str, Any] | None = Field(default=None, description="what is observed; written by the operator only")
