"""The parts of the router's configuration. Names in YAML are camelCase, values are strict.

What a field means and its bounds are said here and nowhere else: the table in docs/router.md is generated from them.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from pydantic.alias_generators import to_camel

from arriero_faces.http.server import HttpLimits
from arriero_plan.resource import DNS_LABEL, MODEL_NAME, PATTERN_WORDS, RouterPolicy
from arriero_router.core.replica import Endpoint

HOST = r"^[A-Za-z0-9:]([-A-Za-z0-9._:%]*[A-Za-z0-9:])?$"
HEADER = r"^[a-z0-9][-a-z0-9]*$"
URL_PATH = r"^/[!-~]*$"
HTTP_URL = r"^https?://[!-~]+$"
PORT_NAME = r"^([0-9]{1,5}|[a-z0-9]([-a-z0-9]*[a-z0-9])?)$"
NO_SPACE = r"^\S*$"
LABEL_OR_NONE = rf"^$|{DNS_LABEL}"

WORDS = {
    **PATTERN_WORDS,
    HOST: "a host name or an IP address",
    HEADER: "the name of a header in lower-case letters, digits and '-'",
    URL_PATH: "a path such as /health/ready",
    HTTP_URL: "http://... or https://...",
    PORT_NAME: "a port's name or number",
    NO_SPACE: "no white space",
    LABEL_OR_NONE: PATTERN_WORDS[DNS_LABEL],
}
"""What each pattern means, for messages."""


def _beside_config(path: str, info: ValidationInfo) -> str:
    """A relative path begins at the configuration file's own directory."""
    directory = (info.context or {}).get("directory")
    return path if directory is None else str(Path(directory, path))


def _log_path(path: str, info: ValidationInfo) -> str:
    return path if path in ("stdout", "off") else _beside_config(path, info)


def _off(path: Any) -> Any:
    return "off" if path is False else path  # YAML 1.1 reads a bare off as false


def _port_text(port: Any) -> Any:
    return str(port) if isinstance(port, int) and not isinstance(port, bool) else port


def _host(host: str) -> str:
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError(f"{host!r} is no IPv6 address; a port has its own field") from None
    return host


Seconds = Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)]
SomeSeconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=1024, le=2**40)]
Port = Annotated[int, Field(ge=1, le=65535)]
PortOrNone = Annotated[int, Field(ge=0, le=65535)]
PortName = Annotated[str, Field(pattern=PORT_NAME, min_length=1, max_length=63), BeforeValidator(_port_text)]
Host = Annotated[str, Field(pattern=HOST, min_length=1, max_length=253), AfterValidator(_host)]
ModelName = Annotated[str, Field(pattern=MODEL_NAME, min_length=1, max_length=256)]
FilePath = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_beside_config)]


class Part(BaseModel):
    """What every mapping of a file has in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, alias_generator=to_camel)


class Listen(Part):
    """Where clients reach the router."""

    address: Host = Field(default="0.0.0.0", description="address to listen on; 0.0.0.0 or '::': all, IPv6 included")
    http_port: Port = Field(default=8000, description="port of the HTTP face")
    grpc_port: PortOrNone = Field(default=9000, description="port of the gRPC face; 0: none")


class StaticEndpoint(Part):
    """One replica: the address of its leader pod."""

    name: str = Field(
        default="", pattern=NO_SPACE, max_length=253, description="name in logs and metrics; omitted: host:httpPort"
    )
    host: Host = Field(description="host name or IP address of the replica's leader")
    http_port: Port = Field(default=8000, description="port of its HTTP face")
    grpc_port: PortOrNone = Field(default=9000, description="port of its gRPC face; 0: none, as with another engine")
    control_port: PortOrNone = Field(
        default=9100, description="port that tells its status; 0: none, its health is asked over HTTP"
    )

    def endpoint(self) -> Endpoint:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return Endpoint(
            name=self.name or f"{host}:{self.http_port}",
            host=self.host,
            http_port=self.http_port,
            grpc_port=self.grpc_port,
            control_port=self.control_port,
        )


StaticEndpoints = Annotated[tuple[StaticEndpoint, ...], Field(strict=False, max_length=1024)]


def _distinct_endpoints(entries: tuple[StaticEndpoint, ...]) -> None:
    names = Counter(entry.endpoint().name for entry in entries)
    addresses = Counter((entry.host, entry.http_port) for entry in entries)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"the replica {twice[0]} is named twice")
    if again := [address for address, count in addresses.items() if count > 1]:
        raise ValueError(f"two replicas have the address {again[0][0]}, port {again[0][1]}")


class KubernetesPorts(Part):
    """Ports of an EndpointSlice, by name or number."""

    http: PortName = Field(default="http", description="port of the HTTP face")
    grpc: PortName = Field(default="grpc", description="port of the gRPC face; ignored where there is none")
    control: PortName = Field(default="control", description="port that tells status; ignored where there is none")


class KubernetesEndpoints(Part):
    """EndpointSlices of a Service, or of all Services with some labels; exactly one of service and labelSelector."""

    namespace: str = Field(
        default="",
        pattern=LABEL_OR_NONE,
        max_length=63,
        description="namespace; omitted: the router's own, with a kubeconfig that of its context",
    )
    service: str = Field(
        default="",
        pattern=LABEL_OR_NONE,
        max_length=63,
        description="name of the Service in front of the replicas",
    )
    label_selector: str = Field(
        default="",
        max_length=1024,
        description="labels of the slices, as `serving.arriero.dev/deployment=llama-70b`",
    )
    ports: KubernetesPorts = Field(default_factory=KubernetesPorts, description="which port is which")
    address_family: Literal["IPv4", "IPv6"] = Field(default="IPv4", description="addresses taken of dual-stack pods")
    kubeconfig: FilePath | None = Field(
        default=None,
        description="file that says how to reach the API server; omitted: as KUBECONFIG says, else as the pod's "
        "service account, else ~/.kube/config",
    )
    context: str = Field(
        default="", pattern=NO_SPACE, max_length=253, description="context of the kubeconfig; omitted: its current one"
    )

    @model_validator(mode="after")
    def _one_choice(self) -> KubernetesEndpoints:
        if bool(self.service) == bool(self.label_selector):
            found = "both" if self.service else "neither"
            raise ValueError(f"expected exactly one of service and labelSelector, found {found}")
        return self


class Endpoints(Part):
    """Where the replicas of a model are: exactly one of static, file and kubernetes."""

    static: StaticEndpoints | None = Field(default=None, description="the replicas, listed here")
    file: FilePath | None = Field(
        default=None, description="file with a list `endpoints` of the same entries as static; watched"
    )
    kubernetes: KubernetesEndpoints | None = Field(default=None, description="the replicas that a cluster knows of")
    health_path: str = Field(
        default="/health/ready",
        pattern=URL_PATH,
        max_length=1024,
        description="answers 200 while a replica without control port is ready",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Endpoints:
        sources = ("static", "file", "kubernetes")
        chosen = [name for name in sources if getattr(self, name) is not None]
        if len(chosen) != 1:
            raise ValueError(f"expected exactly one of {', '.join(sources)}, found {' and '.join(chosen) or 'none'}")
        _distinct_endpoints(self.static or ())
        return self


class PrefixTuning(Part):
    """How the `prefix` policy trades cached prefixes against load."""

    max_marks: int = Field(
        default=2**18,
        ge=1024,
        le=2**30,
        description="chunks of 256 bytes of prompts that the index knows, all replicas of the model together; some 200 "
        "bytes of memory each, in each worker process",
    )
    max_expected: int = Field(
        default=2**14,
        ge=64,
        le=2**30,
        description="chunks that one replica is expected to have by what was sent to it, not by its own word",
    )
    expected_seconds: SomeSeconds = Field(
        default=30, description="how long a replica that tells its cache is expected to have what it does not tell"
    )


class Model(Part):
    """One served model: who answers for it, and how one of them is picked."""

    name: ModelName = Field(description="name that requests ask for")
    aliases: Annotated[tuple[ModelName, ...], Field(strict=False, max_length=64)] = Field(
        default=(), description="other names for it"
    )
    endpoints: Endpoints = Field(description="where its replicas are")
    policy: RouterPolicy = Field(default="prefix", description="how a replica is picked for a request")
    max_in_flight_per_replica: int = Field(
        default=256,
        ge=0,
        le=2**20,
        description="requests on one replica at once, beyond which they are held; 0: no limit; each worker process "
        "has an equal share, rounded up",
    )
    prefix: PrefixTuning = Field(default_factory=PrefixTuning, description="tuning of the prefix policy")
    session_header: str = Field(
        default="x-session-id",
        pattern=HEADER,
        max_length=128,
        description="header whose value the hash policy keeps on one replica; without it the request's `user` counts",
    )


class Hold(Part):
    """Requests that no replica can take yet wait here."""

    max_queue: int = Field(
        default=1024,
        ge=0,
        le=2**20,
        description="requests of one model held at once by each worker process, beyond which they get 429",
    )
    timeout_seconds: Seconds = Field(default=60, description="longest wait for a replica; then 503")
    after_seconds: Seconds = Field(
        default=1, description="a held stream is begun (status 200, keep-alive comments) after so long"
    )
    keep_alive_seconds: Seconds = Field(
        default=10, description="time between two keep-alive comments of a held or paused stream; 0: none"
    )


class Replay(Part):
    """Requests whose replica broke go on at another."""

    attempts: int = Field(
        default=3,
        ge=0,
        le=100,
        description="times in a row that a request is sent again without gaining a token; 0: never sent again",
    )
    stall_seconds: Seconds = Field(
        default=60, description="silence within an answer after which its replica counts as broken; 0: never"
    )


class Ejection(Part):
    """Replicas that keep failing are left out for a while; never the last one, never for a client's error."""

    failures: int = Field(default=3, ge=0, le=1000, description="failures in a row that eject a replica; 0: never")
    base_seconds: SomeSeconds = Field(default=1, description="time out of service the first time; doubles each time")
    max_seconds: SomeSeconds = Field(default=30, description="longest time out of service")

    @model_validator(mode="after")
    def _ordered(self) -> Ejection:
        if self.base_seconds > self.max_seconds:
            raise ValueError(f"baseSeconds is {self.base_seconds:g}, above maxSeconds ({self.max_seconds:g})")
        return self


class Health(Part):
    """How replicas are watched."""

    interval_seconds: SomeSeconds = Field(
        default=1, description="time between two questions to a replica that has no control port"
    )
    timeout_seconds: SomeSeconds = Field(
        default=2,
        description="a replica that is silent for so long is not ready; with a control port it is asked once more",
    )


class Auth(Part):
    """Who may ask, and how much."""

    keys_file: FilePath = Field(description="file with a list of keys, or directory with a file per key; watched")


class Tls(Part):
    """TLS of both faces; with clientCaFile, clients must show a certificate of their own (mTLS)."""

    cert_file: FilePath = Field(description="the router's certificate chain, PEM; its content is watched")
    key_file: FilePath = Field(description="the certificate's private key, PEM")
    client_ca_file: FilePath | None = Field(
        default=None,
        description="authorities of clients' certificates, PEM; watched: new connections go by its latest content",
    )


class UpstreamTls(Part):
    """TLS towards the replicas' HTTP and gRPC faces."""

    ca_file: FilePath | None = Field(
        default=None, description="authorities of the replicas' certificates, PEM; omitted: the system's"
    )
    cert_file: FilePath | None = Field(default=None, description="certificate that the router shows, PEM")
    key_file: FilePath | None = Field(default=None, description="the certificate's private key, PEM")
    server_name: Host | None = Field(
        default=None, description="name that certificates must bear; omitted: the endpoint's host"
    )

    @model_validator(mode="after")
    def _both(self) -> UpstreamTls:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("certFile and keyFile belong together: expected both or none")
        return self


class AccessLog(Part):
    """One line of JSON per answered request."""

    path: Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_log_path), BeforeValidator(_off)] = (
        Field(default="stdout", description="stdout, off, or a file to append to")
    )


class Tracing(Part):
    """Spans of requests, sent by OTLP over HTTP; W3C traceparent is passed on in any case."""

    otlp_endpoint: str = Field(
        pattern=HTTP_URL, max_length=2048, description="where spans go, as http://collector:4318/v1/traces"
    )
    sample_ratio: float = Field(
        default=0.01,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="share of requests traced, of those whose traceparent does not decide",
    )
    service_name: str = Field(default="arriero-router", min_length=1, max_length=256, description="service.name")


class Limits(Part):
    """Bounds on what one client, and all of them, may ask of the router; each worker process has its own."""

    max_body_bytes: Bytes = Field(default=16 * 2**20, description="largest body of a request, or gRPC message")
    max_head_bytes: Bytes = Field(default=65536, description="largest request line and headers together")
    max_headers: int = Field(default=100, ge=8, le=10_000, description="headers of one request")
    max_connections: int = Field(default=4096, ge=1, le=2**20, description="open connections of clients")
    max_pipelined: int = Field(default=16, ge=1, le=1024, description="requests read ahead of the one being answered")
    max_held_bytes: Bytes = Field(default=512 * 2**20, description="bodies of all unanswered requests together")
    write_buffer_bytes: Bytes = Field(
        default=65536, description="bytes that a client has not taken yet, beyond which its replica waits"
    )
    head_seconds: SomeSeconds = Field(default=10, description="time that a client has for a request's head")
    body_seconds: SomeSeconds = Field(default=60, description="time that a client has for a request's body")
    idle_seconds: SomeSeconds = Field(default=90, description="time that a client's connection may be idle")
    take_seconds: SomeSeconds = Field(default=30, description="time that a client may take nothing of its answer")
    connect_seconds: SomeSeconds = Field(default=2, description="time that a replica has to accept a connection")
    answer_seconds: Seconds = Field(
        default=1800,
        description="time that a replica has for the head of its answer (of one that is not streamed: for all of it), "
        "after which the request goes to another; 0: no limit",
    )
    upstream_idle_seconds: SomeSeconds = Field(
        default=60, description="time that an unused connection to a replica is kept"
    )

    def http(self) -> HttpLimits:
        """The part of them that the HTTP server keeps."""
        return HttpLimits(
            max_head=self.max_head_bytes,
            max_headers=self.max_headers,
            max_body=self.max_body_bytes,
            max_connections=self.max_connections,
            max_pipelined=self.max_pipelined,
            max_unanswered=self.max_held_bytes,
            write_buffer=self.write_buffer_bytes,
            head_seconds=self.head_seconds,
            body_seconds=self.body_seconds,
            idle_seconds=self.idle_seconds,
            stall_seconds=self.take_seconds,
        )
