"""The operator's configuration file: what a chart's values become."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from arriero_operator.settings import Settings

Seconds = Annotated[float, Field(ge=0, le=86_400)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
Image = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^\S+$")]

_OTHER = Settings(worker_image="-", router_image="-")
"""For what is not said."""


class ConfigError(Exception):
    """The file cannot be used; the message says what to change."""


class Config(BaseModel):
    """The file, camelCase. Unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)

    worker_image: Image = Field(description="image of worker pods, and of those that look at or fetch a model")
    router_image: Image = Field(description="image of router pods")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="of all pods that the operator makes"
    )
    image_pull_secrets: tuple[Name, ...] = Field(
        default=(), description="names of Secrets, which each deployment's namespace must have"
    )
    watch_namespaces: tuple[Name, ...] = Field(default=(), description="where resources are served; empty: everywhere")
    metrics_namespace: Annotated[str, Field(max_length=63)] = Field(
        default=_OTHER.metrics_namespace, description="whose pods may read /metrics of workers; empty: nobody's"
    )
    cluster_domain: Annotated[str, Field(max_length=253)] = Field(
        default=_OTHER.cluster_domain, description="appended to DNS names of pods; empty: their search list does"
    )
    download_command: tuple[str, ...] = Field(
        default=_OTHER.download_command, min_length=1, description="program of the worker image that fetches a model"
    )
    lost_seconds: Seconds = Field(
        default=_OTHER.lost_seconds, description="how long a node is not ready before its pods count as lost"
    )
    bind_seconds: Seconds = Field(
        default=_OTHER.bind_seconds, description="how long a placed pod may be without its node before it is made anew"
    )
    patience_seconds: Seconds = Field(
        default=_OTHER.patience_seconds,
        description="how long a group waits for room before later groups leave it what it could use",
    )
    unready_seconds: Seconds = Field(
        default=_OTHER.unready_seconds,
        description="how long an old group is not ready before it makes room for one of the new revision",
    )

    def settings(self) -> Settings:
        """What decisions are made with. The operator's own namespace is its pod's."""
        fields = {field.name for field in dataclasses.fields(Settings)}
        given = {name: getattr(self, name) for name in type(self).model_fields if name in fields}
        return Settings(**given, operator_namespace=own_namespace())


def own_namespace() -> str:
    """Of the operator's pod, by ARRIERO_POD_NAMESPACE."""
    return os.environ.get("ARRIERO_POD_NAMESPACE") or _OTHER.operator_namespace


def load_config(path: str | Path) -> Config:
    """Read and check the file. Raises ConfigError."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold a mapping such as {{workerImage: ..., routerImage: ...}}")
    try:
        return Config.model_validate(found)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path}: {problems}") from None
