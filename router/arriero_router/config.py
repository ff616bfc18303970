"""The router's configuration file: one frozen model, validated once, and what of it can change while requests run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from arriero_plan.document import DocumentError, read_document
from arriero_router.settings import (
    WORDS,
    AccessLog,
    Auth,
    Ejection,
    Endpoints,
    Health,
    Hold,
    Limits,
    Listen,
    Model,
    ModelName,
    Part,
    Replay,
    Seconds,
    StaticEndpoint,
    StaticEndpoints,
    Tls,
    Tracing,
    UpstreamTls,
)

__all__ = [
    "WORDS",
    "Change",
    "Config",
    "ConfigError",
    "Endpoints",
    "Model",
    "ModelName",
    "Part",
    "StaticEndpoint",
    "StaticEndpoints",
    "Tls",
    "UpstreamTls",
    "changes",
    "load_config",
    "parse_config",
    "read_file",
]

AT_START = ("listen", "workers", "auth", "tls", "upstream_tls", "tracing")
"""Fields taken at the start and kept. The files that they name are followed where their descriptions say so."""


class ConfigError(DocumentError):
    """A configuration file that cannot be used; the message has a line with file and field for each problem."""


class Config(Part):
    """What `arriero-router` is started with."""

    models: Annotated[tuple[Model, ...], Field(strict=False, min_length=1, max_length=1024)] = Field(
        description="the models served; a request that names none gets the first"
    )
    listen: Listen = Field(default_factory=Listen, description="where clients reach the router")
    workers: int = Field(default=1, ge=1, le=256, description="processes that share the ports")
    hold: Hold = Field(default_factory=Hold, description="requests that no replica can take yet")
    replay: Replay = Field(default_factory=Replay, description="requests whose replica broke")
    slow_start_seconds: Seconds = Field(
        default=10, description="time in which a replica that became ready comes to its full share of load"
    )
    ejection: Ejection = Field(default_factory=Ejection, description="replicas that keep failing")
    health: Health = Field(default_factory=Health, description="how replicas are watched")
    auth: Auth | None = Field(default=None, description="API keys; omitted: anybody may ask")
    tls: Tls | None = Field(default=None, description="TLS towards clients; omitted: plain text")
    upstream_tls: UpstreamTls | None = Field(default=None, description="TLS towards replicas; omitted: plain text")
    access_log: AccessLog = Field(default_factory=AccessLog, description="a line per request")
    tracing: Tracing | None = Field(default=None, description="spans of requests; omitted: none")
    drain_seconds: Seconds = Field(default=120, description="time that running requests get when the router is stopped")
    leave_seconds: Seconds = Field(
        default=5,
        description="of these, how long new requests are still taken after SIGTERM, until load balancers have heard "
        "that it is not ready",
    )
    answer_tokens: int = Field(
        default=256,
        ge=1,
        le=2**24,
        description="tokens that an answer counts, for fairness and rate limits, until its real number is known and "
        "where the request names no limit",
    )
    limits: Limits = Field(default_factory=Limits, description="bounds on clients")

    @model_validator(mode="after")
    def _distinct_names(self) -> Config:
        counted = Counter(name for model in self.models for name in (model.name, *model.aliases))
        if twice := [name for name, count in counted.items() if count > 1]:
            raise ValueError(f"models: the name {twice[0]} is given twice")
        return self


def parse_config(text: str, origin: str, directory: str | None = None) -> Config:
    """Validate a configuration's text; `origin` names it in messages, relative paths begin at `directory`.

    Raises ConfigError.
    """
    return read_document(Config, text, origin, "router configuration", WORDS, ConfigError, {"directory": directory})


def load_config(path: str) -> Config:
    """Read and validate a configuration file. Raises ConfigError."""
    return parse_config(read_file(path, ConfigError), path, str(Path(path).absolute().parent))


def read_file(path: str, error: type[DocumentError]) -> str:
    """A file's text. Raises `error` with one sentence."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as caught:
        raise error(path, [caught.strerror or str(caught)]) from caught
    except UnicodeDecodeError as caught:
        raise error(path, ["not a text in UTF-8"]) from caught


@dataclass(frozen=True, slots=True)
class Change:
    """What a new configuration changes in a running router."""

    config: Config
    """What holds from now on."""
    applied: tuple[str, ...]
    """Paths of what changed, as `hold.maxQueue` or `models[llama].policy`."""
    refused: tuple[str, ...]
    """A sentence for each change that takes a restart; the old values hold."""


def changes(old: Config, new: Config) -> Change:
    """What of `new` a router that runs with `old` can take over."""
    config = new.model_copy(update={name: getattr(old, name) for name in AT_START})
    refused = tuple(
        f"{path} changed from {was} to {becomes}: that takes a restart"
        for path, was, becomes in _differences("", config, new)
    )
    return Change(config, tuple(path for path, _, _ in _differences("", old, config)), refused)


def _differences(path: str, old: Any, new: Any) -> Iterator[tuple[str, str, str]]:
    """Path, old and new value of whatever differs: of parts their fields, of models each by its name."""
    if old == new:
        return
    if isinstance(old, BaseModel) and type(old) is type(new):
        for name, field in type(old).model_fields.items():
            inner = f"{path}.{field.alias}" if path else str(field.alias)
            yield from _differences(inner, getattr(old, name), getattr(new, name))
    elif path == "models":
        before, after = ({model.name: model for model in models} for models in (old, new))
        for name in before | after:
            yield from _differences(f"models[{name}]", before.get(name), after.get(name))
        if list(before) != list(after) and before.keys() == after.keys():
            yield path, "one order", "another"
    else:
        yield path, _shown(old), _shown(new)


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return "a mapping" if isinstance(value, BaseModel) else str(value)
